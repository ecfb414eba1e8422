"""The report of real runs: it changes no weight, shows each sample's loss, and continues after a resume."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import SecretStr

from families.toys import ToyShelf
from sfumato.config import load_config
from sfumato.config.listing import public_options
from sfumato.data.plans import DataPlan
from sfumato.track.image_list import find_image_list, read_image_list
from sfumato.track.report_facts import describe_run
from toy_runs import equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy
from track.report_pages import PageParser, read_page

Toy = Mapping[str, Path]
PROMPT = "a <script>alert(1)</script> cat & dog"


@pytest.fixture(scope="module")
def sd(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("sd")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def output(sd: Toy, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 5 steps with samples and a report; 5 images twice, in buckets of 3 and 2."""
    folder = tmp_path_factory.mktemp("output")
    prompts = folder / "prompts.txt"
    prompts.write_text(f"{PROMPT} --w 64 --h 64 --s 1 --d 3\na dog --w 64 --h 64 --s 1\n")
    return train_toy(sd, images, folder / "out", **options(prompts))


def options(prompts: Path) -> dict[str, object]:
    return {
        "max_train_steps": 5, "train_batch_size": 4, "sample_prompts": prompts, "sample_every_n_steps": 2,
        "network_train_unet_only": True, "cache_latents": True, "gradient_accumulation_steps": 2,
    }  # fmt: skip


@pytest.mark.full
def test_weights_and_losses_are_the_same_without_it(sd: Toy, images: Path, output: Path, tmp_path: Path) -> None:
    silent = train_toy(sd, images, tmp_path / "out", **options(output.parent / "prompts.txt"), no_report=True)
    assert equal_tensors(read_weights(output), read_weights(silent))
    assert read_metrics(output) == read_metrics(silent)
    assert (output / "lora.report.html").is_file()
    assert not list(silent.glob("*report*"))


def test_the_page_of_a_run(output: Path, images: Path) -> None:
    page = read_page(output, "lora")
    last = read_metrics(output)[-1]
    for text in ("finished", "seed 7", "2_cat", "network_train_unet_only", "command line", f"{last['grad_norm']:.4g}"):
        assert text in page.text
    assert f"{last['loss/average']:.4g}" in page.text
    texts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert texts == [f"{prompt}, after step {step}" for prompt in (PROMPT, "a dog") for step in (2, 4, 5)]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert all((output / str(link)).is_file() for link in links)


def test_no_path_of_this_machine(output: Path, images: Path) -> None:
    content = (output / "lora.report.html").read_text() + (output / "lora.report.json").read_text()
    for folder in (output, images, Path.home(), Path.cwd()):
        assert str(folder) not in content
    assert f"{images.name}" in content  # its own name may be output


def test_no_secret(sd: Toy, images: Path, tmp_path: Path) -> None:
    config = load_config(make_arguments(sd, images, tmp_path))
    secret = config.log.model_copy(update={"wandb_api_key": SecretStr("canary")})
    config = config.model_copy(update={"log": secret})
    data = DataPlan(
        datasets=(), validation=(), processes=1, prior_loss_weight=1.0, from_file=False, notes=("in /home/canary/x",)
    )
    description = describe_run(
        config, data, options=public_options(config), model="m", checkpoint="/home/canary/model.safetensors",
        trained_parts=[], total=1, device="CPU", notes=["see C:\\canary\\y"],
    )  # fmt: skip
    assert "canary" not in json.dumps(description)
    assert description["checkpoint"] == "model.safetensors"
    assert {"network_dim": "2", "learning_rate": "0.001"}.items() <= {
        name: value for name, value, _ in description["options"]
    }.items()


def test_the_samples_of_a_step_make_its_loss(output: Path) -> None:
    """All weigh the same here, so a step's loss is their mean; padding samples of short batches are not among them."""
    rows = read_metrics(output)
    for row in rows:
        samples = row["loss/samples"]
        assert row["loss/current"] == pytest.approx(sum(samples) / len(samples), rel=1e-3)
        assert all(0 <= t <= 1000 for t in row["timesteps"])
    assert len(rows[0]["loss/samples"]) + len(rows[1]["loss/samples"]) == 10  # an epoch: 4 + 2 and 4 images


@pytest.mark.full
def test_a_resumed_run_continues(sd: Toy, images: Path, tmp_path: Path) -> None:
    common = {"network_train_unet_only": True, "cache_latents": True}
    train_toy(sd, images, tmp_path, max_train_steps=2, save_state=True, **common)
    train_toy(sd, images, tmp_path, max_train_steps=4, resume=tmp_path, **common)
    page = read_page(tmp_path, "lora")
    (loss, *_) = [attributes for tag, attributes in page.tags if tag == "polyline"]
    assert len(str(loss["points"]).split()) == 4
    assert "at step 2" in page.text
    assert "--max_train_steps was 2, now it is 4" in page.text  # a warning that was shown
    assert PageParser((tmp_path / "lora.report.html").read_text()).text.count("finished") >= 2


@pytest.mark.full
def test_a_resumed_run_knows_the_images_of_all_samples(sd: Toy, images: Path, tmp_path: Path) -> None:
    """The lines of run and resume are those of a run that never stopped, the numbers of images among them."""
    common = {"network_train_unet_only": True, "cache_latents": True, "train_batch_size": 2}
    straight = train_toy(sd, images, tmp_path / "straight", max_train_steps=5, **common)
    train_toy(sd, images, tmp_path / "parts", max_train_steps=2, save_state=True, **common)
    parts = train_toy(sd, images, tmp_path / "parts", max_train_steps=5, resume=tmp_path / "parts", **common)
    rows = read_metrics(straight)
    assert rows == read_metrics(parts)
    counts = Counter(number for row in rows for number in row["images"])
    assert counts == dict.fromkeys(range(5), 2)  # an epoch: 5 images, twice each
    assert read_image_list(find_image_list(straight, "lora")) == read_image_list(find_image_list(parts, "lora"))
