"""The report of real runs: it changes no weight, tells each sample's loss, and goes on after a resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import SecretStr

from sfumato.config import load_config
from sfumato.data.plans import DataPlan
from sfumato.demo.toy import write_toy
from sfumato.plan import public_options
from sfumato.track.report_facts import describe_run
from track.test_report import Checked, read
from training import arguments, losses, pictures, run, same, weights

Toy = Mapping[str, Path]
PROMPT = "a <script>alert(1)</script> cat & dog"


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return write_toy("sd", tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def told(sd: Toy, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 5 steps with previews and a report; 5 pictures twice, in buckets of 3 and 2."""
    folder = tmp_path_factory.mktemp("told")
    prompts = folder / "prompts.txt"
    prompts.write_text(f"{PROMPT} --w 64 --h 64 --s 1 --d 3\na dog --w 64 --h 64 --s 1\n")
    return run(sd, images, folder / "out", **options(prompts))


def options(prompts: Path) -> dict[str, object]:
    return {
        "max_train_steps": 5, "train_batch_size": 4, "sample_prompts": prompts, "sample_every_n_steps": 2,
        "network_train_unet_only": True, "cache_latents": True, "gradient_accumulation_steps": 2,
    }  # fmt: skip


def test_weights_and_losses_are_the_same_without_it(sd: Toy, images: Path, told: Path, tmp_path: Path) -> None:
    silent = run(sd, images, tmp_path / "out", **options(told.parent / "prompts.txt"), no_report=True)
    assert same(weights(told), weights(silent))
    assert losses(told) == losses(silent)
    assert (told / "lora.report.html").is_file()
    assert not list(silent.glob("*report*"))


def test_the_page_of_a_run(told: Path, images: Path) -> None:
    page = read(told, "lora")
    last = losses(told)[-1]
    for text in ("finished", "seed 7", "2_cat", "network_train_unet_only", "command line", f"{last['grad_norm']:.4g}"):
        assert text in page.text
    assert f"{last['loss/average']:.4g}" in page.text
    found = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert found == [f"{prompt}, after step {step}" for prompt in (PROMPT, "a dog") for step in (2, 4, 5)]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert all((told / str(link)).is_file() for link in links)


def test_no_path_of_this_machine(told: Path, images: Path) -> None:
    content = (told / "lora.report.html").read_text() + (told / "lora.report.json").read_text()
    for folder in (told, images, Path.home(), Path.cwd()):
        assert str(folder) not in content
    assert f"{images.name}" in content  # its own name may be told


def test_no_secret(sd: Toy, images: Path, tmp_path: Path) -> None:
    config = load_config(arguments(sd, images, tmp_path))
    secret = config.log.model_copy(update={"wandb_api_key": SecretStr("canary")})
    config = config.model_copy(update={"log": secret})
    data = DataPlan(
        datasets=(), validation=(), processes=1, prior_loss_weight=1.0, from_file=False, notes=("in /home/canary/x",)
    )
    description = describe_run(
        config, data, options=public_options(config), model="m", checkpoint="/home/canary/model.safetensors",
        trains=[], total=1, device="CPU", notes=["see C:\\canary\\y"],
    )  # fmt: skip
    assert "canary" not in json.dumps(description)
    assert description["checkpoint"] == "model.safetensors"
    assert {"network_dim": "2", "learning_rate": "0.001"}.items() <= {
        name: value for name, value, _ in description["options"]
    }.items()


def test_the_samples_of_a_step_make_its_loss(told: Path) -> None:
    """All weigh the same here, so a step's loss is their mean; fillers of short batches are not among them."""
    rows = losses(told)
    for row in rows:
        samples = row["loss/samples"]
        assert row["loss/current"] == pytest.approx(sum(samples) / len(samples), rel=1e-3)
        assert all(0 <= t <= 1000 for t in row["timesteps"])
    assert len(rows[0]["loss/samples"]) + len(rows[1]["loss/samples"]) == 10  # an epoch: 4 + 2 and 4 pictures


def test_a_resumed_run_goes_on(sd: Toy, images: Path, tmp_path: Path) -> None:
    common = {"network_train_unet_only": True, "cache_latents": True}
    run(sd, images, tmp_path, max_train_steps=2, save_state=True, **common)
    run(sd, images, tmp_path, max_train_steps=4, resume=tmp_path, **common)
    page = read(tmp_path, "lora")
    (loss, *_) = [attributes for tag, attributes in page.tags if tag == "polyline"]
    assert len(str(loss["points"]).split()) == 4
    assert "at step 2" in page.text
    assert "--max_train_steps was 2, now it is 4" in page.text  # a warning that was shown
    assert Checked((tmp_path / "lora.report.html").read_text()).text.count("finished") >= 2
