"""The validation loss: the same question at every step of every run, put without touching training."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from data.test_batch_sampler import make_plan
from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.config import load_config
from sfumato.config.noise import NoiseOptions
from sfumato.data.batch_sampler import ValidationSampler
from sfumato.data.split import choose_validation_seed
from sfumato.diffusion.timesteps import timestep_quantiles
from sfumato.errors import UserError
from sfumato.plan import with_seed
from sfumato.track.report_curves import Curves
from sfumato.track.report_page import render_page
from toy_runs import equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy
from track.report_pages import NO_SAMPLES, PageParser, make_description
from warm_python import run_ranks

Toy = Mapping[str, Path]
FAMILIES = ("sdxl", "flux", "chroma", "sd3", "lumina")
MAIN = "loss/validation/step_average"
SCRIPT = Path(__file__).parents[2] / "launchers" / "train_network.py"
HALF: dict[str, Any] = {"validation_split": 0.5, "train_batch_size": 2}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures: five to train on, each twice, and five that are held out."""
    return make_images(tmp_path_factory.mktemp("images"), 10)


@pytest.fixture(scope="module")
def sd(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("sd")


def told(output: Path) -> dict[int, float]:
    """Step -> validation loss."""
    return {int(row["step"]): row[MAIN] for row in read_metrics(output) if MAIN in row}


def without_validation(output: Path) -> list[dict[str, float]]:
    rows = ({name: row[name] for name in row if not name.startswith("loss/validation")} for row in read_metrics(output))
    return [row for row in rows if set(row) != {"step"}]


def file_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# ---------------------------------------------------------------- what is looked at


DATASETS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=3)


def held_out(datasets: list[list[int]], **options: Any) -> list[ValidationSampler]:
    """The order of each process over so many images by dataset and subset."""
    most, size, processes = options.get("most"), options.get("batch_size", 1), options.get("processes", 1)
    plan = make_plan([[(1, count) for count in counts] for counts in datasets], batch_size=size, processes=processes)
    object.__setattr__(plan, "validation", plan.datasets)
    seed = options.get("seed", 0)
    return [ValidationSampler(plan, seed=seed, max_batches=most, rank=rank) for rank in range(processes)]


def seen_by(order: ValidationSampler) -> list[Any]:
    return [sample for step in order.steps() for batch in step.batches for sample in batch.samples]


@given(DATASETS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_each_held_out_image_is_seen_once(datasets: list[list[int]], size: int, processes: int, seed: int) -> None:
    """By one of the processes; each has as many batches, of one bucket; an id does not depend on the batch size."""
    orders = held_out(datasets, batch_size=size, processes=processes, seed=seed)
    total = sum(map(sum, datasets))
    real = [sample for order in orders for sample in seen_by(order) if sample.real]
    assert sorted(sample.id for sample in real) == list(range(total))
    assert len({sample.item.image.caption for sample in real}) == total == orders[0].num_samples == orders[0].num_ids
    assert len({len(list(order.steps())) for order in orders}) == 1
    for order in orders:
        for step in order.steps():
            (batch,) = step.batches
            assert {sample.item.choice.bucket for sample in batch.samples} == {batch.bucket}
        some = [sample for sample in seen_by(order) if sample.id % 2]
        assert order.find_images([sample.id for sample in some]) == [sample.item.image for sample in some]
    alone = seen_by(held_out(datasets)[0])
    assert {s.id: s.item.image.path for s in real} == {s.id: s.item.image.path for s in alone}


@given(DATASETS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))
def test_the_most_batches_are_the_same_images_for_any_number_of_processes(
    datasets: list[list[int]], size: int, processes: int, most: int
) -> None:
    orders = held_out(datasets, batch_size=size, processes=processes, most=most)
    seen = Counter(sample.id for order in orders for sample in seen_by(order) if sample.real)
    (alone,) = held_out(datasets, batch_size=size, most=most)
    assert seen == Counter(sample.id for sample in seen_by(alone))
    assert sum(seen.values()) == alone.num_samples <= most * size


@given(st.integers(0, 999), st.integers(1, 1000), st.integers(1, 9))
def test_times_are_the_inner_points_of_the_trained_range(low: int, high: int, count: int) -> None:
    found = timestep_quantiles(NoiseOptions(min_timestep=low, max_timestep=high), count)
    if low >= high:
        assert found == [high - 1]
    else:
        assert found == sorted({int(t) for t in np.linspace(low, high, count + 2)[1:-1] + 1e-9})
        assert all(low <= t < high for t in found)


def test_the_usual_times() -> None:
    assert timestep_quantiles(NoiseOptions(), 4) == [200, 400, 600, 800]


def test_a_seed_that_is_drawn_has_no_say(sd: Toy, images: Path, tmp_path: Path) -> None:
    """Else a resumed run would validate with images that it was trained on before."""
    for options, expected in (({"seed": None}, 0), ({"seed": 3}, 3), ({"seed": None, "validation_seed": 5}, 5)):
        config = with_seed(load_config(make_arguments(sd, images, tmp_path, **options)))
        assert config.loop.seed is not None
        assert choose_validation_seed(config) == expected


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"network_dropout": 0.3, "max_validation_steps": 1}, id="dropout"),
        pytest.param(
            {"optimizer_type": "AdamWScheduleFree", "network_train_unet_only": True},
            id="schedule-free", marks=pytest.mark.full,
        ),
        pytest.param(
            {"method": "full", "network_dim": None, "train_text_encoder": True, "gradient_checkpointing": True},
            id="full", marks=pytest.mark.full,
        ),
    ],
)  # fmt: skip
@pytest.mark.full
def test_training_does_not_notice(sd: Toy, images: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """After each step or hardly ever: weights and losses are the same to the last bit."""
    if "ScheduleFree" in options.get("optimizer_type", ""):
        pytest.importorskip("schedulefree")
    often = train_toy(sd, images, tmp_path / "often", **HALF, **options, validate_every_n_steps=1)
    rarely = train_toy(sd, images, tmp_path / "rarely", **HALF, **options, validate_every_n_steps=1000)
    assert list(told(often)) == [0, 1, 2, 3, 4]
    assert list(told(rarely)) == [0, 4]
    assert equal_tensors(read_weights(often), read_weights(rarely))
    assert without_validation(often) == without_validation(rarely)
    assert told(rarely).items() <= told(often).items()


@pytest.mark.parametrize("family", ["sd", *(pytest.param(each, marks=pytest.mark.full) for each in FAMILIES)])
def test_every_family_validates_cached_or_not(family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    options = {**HALF, "max_train_steps": 1, "network_train_unet_only": True, "shuffle_caption": True}
    toy = toy_shelf.paths(family)
    plain = train_toy(toy, images, tmp_path / "plain", **options, flip_aug=True)
    caches = {"cache_latents": True, "cache_text_encoder_outputs": True, "text_cache_variants": 2}
    cached = train_toy(toy, images, tmp_path / "cached", **options, **caches)
    first, last = told(plain).values()
    assert told(cached)[0] == first > 0
    assert last != first


@pytest.mark.full
def test_held_out_images_are_shown_as_they_are(sd: Toy, images: Path, tmp_path: Path) -> None:
    """Whatever happens to pictures and captions of training, and whatever the batch size."""
    chance = {"shuffle_caption": True, "caption_dropout_rate": 0.5, "caption_tag_dropout_rate": 0.5, "color_aug": True}
    chance |= {"flip_aug": True, "random_crop": True, "token_warmup_step": 10, "caption_dropout_every_n_epochs": 1}
    first = train_toy(sd, images, tmp_path / "1", **HALF, max_train_steps=1, validate_every_n_epochs=1)
    second = train_toy(sd, images, tmp_path / "2", **{**HALF, "train_batch_size": 1}, **chance, max_train_steps=1)
    assert told(second)[0] == pytest.approx(told(first)[0], rel=1e-6)
    other = train_toy(sd, images, tmp_path / "3", **HALF, max_train_steps=1, validation_seed=8)
    assert abs(told(other)[0] - told(first)[0]) > 1e-4


@pytest.mark.full
def test_levels_make_the_average(sd: Toy, images: Path, tmp_path: Path) -> None:
    """Validation at the end of each epoch of five steps, before the first step and after the last."""
    output = train_toy(sd, images, tmp_path, **HALF, max_train_steps=7, min_timestep=500, min_snr_gamma=5)
    found = {row["step"]: {name: row[name] for name in row if "validation" in name} for row in read_metrics(output)}
    assert [step for step, row in found.items() if row] == [0, 5, 7]
    assert found[5].pop("loss/validation/epoch_average") == found[5][MAIN]
    for step in (0, 5, 7):
        levels = {name: value for name, value in found[step].items() if name != MAIN}
        assert list(levels) == [f"loss/validation/t{t}" for t in (600, 700, 800, 900)]
        assert found[step][MAIN] == pytest.approx(np.mean(list(levels.values())), rel=1e-12)


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="adapter"),
        pytest.param({"method": "full", "network_dim": None}, id="full"),
        pytest.param({"optimizer_type": "AdamWScheduleFree"}, id="schedule-free"),
    ],
)
def test_what_is_validated_is_what_is_saved(sd: Toy, images: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """The loss after the last step is that before the first of a run that starts from the saved file."""
    if options.get("optimizer_type"):
        pytest.importorskip("schedulefree")
    common = {**HALF, "max_train_steps": 3, "network_dropout": None if "method" in options else 0.5, **options}
    output = train_toy(sd, images, tmp_path / "first", **common, save_precision="float")
    file = output / "lora.safetensors"
    start: dict[str, Any] = {"network_weights": file}
    if "method" in options:
        start = {"pretrained_model_name_or_path": file, "tokenizer": sd["tokenizer"]}
    again = train_toy(sd, images, tmp_path / "again", **{**common, "max_train_steps": 1, **start})
    assert told(again)[0] == pytest.approx(told(output)[3], rel=1e-6)
    assert told(output)[3] != pytest.approx(told(output)[0], rel=1e-6)


@pytest.mark.full
def test_resume_is_exact_and_remembers_the_best(sd: Toy, images: Path, tmp_path: Path) -> None:
    """The rate is so high that the loss rises again."""
    options = {**HALF, "learning_rate": 0.1, "network_train_unet_only": True, "max_train_steps": 6}
    options |= {"max_validation_steps": 1}
    options |= {"validate_every_n_steps": 2, "save_best": True, "cache_latents": True}
    straight = train_toy(sd, images, tmp_path / "straight", **options, save_every_n_steps=2)
    parts = tmp_path / "parts"
    train_toy(sd, images, parts, **options, save_every_n_steps=2, save_state=True)
    (parts / "lora-best.safetensors").unlink()
    resumed = train_toy(sd, images, parts, **options, resume=parts / "lora-step00000002-state")
    assert read_metrics(straight) == read_metrics(resumed)
    found = told(straight)
    step = min((step for step in found if step), key=lambda step: found[step])
    best = straight / "lora-best.safetensors"
    name = "lora" if step == 6 else f"lora-step{step:08d}"
    assert equal_tensors(read_weights(straight, "lora-best"), read_weights(straight, name))
    assert float(file_metadata(best)["ss_validation_loss"]) == pytest.approx(found[step], rel=1e-5)
    assert file_metadata(best)["ss_steps"] == str(step)
    assert (resumed / "lora-best.safetensors").exists() == (step > 2)


@pytest.mark.full
def test_another_split_after_a_resume_starts_anew(sd: Toy, images: Path, tmp_path: Path) -> None:
    """What was lowest over other images says nothing of these."""
    options = {"network_train_unet_only": True, "save_best": True, "save_state": True}
    train_toy(sd, images, tmp_path, **HALF, **options, max_train_steps=1)
    first = (tmp_path / "lora-best.safetensors").stat().st_mtime_ns
    resumed = {**HALF, "max_validation_steps": 1, "max_train_steps": 2, "resume": tmp_path}
    train_toy(sd, images, tmp_path, **options, **resumed)
    assert "the best so far no longer counts" in (tmp_path / "lora.report.json").read_text()
    assert (tmp_path / "lora-best.safetensors").stat().st_mtime_ns > first
    assert file_metadata(tmp_path / "lora-best.safetensors")["ss_steps"] == "2"


@pytest.mark.full
def test_a_best_that_cannot_be_written_leaves_the_one_before(
    sd: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.training.saving import save_output

    def once(run: Any, path: Path, step: int, *rest: Any) -> None:
        if step == 2:
            raise OSError("no room")
        save_output(run, path, step, *rest)

    monkeypatch.setattr("sfumato.training.saving.save_output", once)
    options = {**HALF, "validate_every_n_steps": 1, "save_best": True, "max_train_steps": 2}
    with pytest.raises(UserError) as caught:
        train_toy(sd, images, tmp_path, **options)
    assert caught.value.code == "saves-failed"
    assert told(tmp_path)[2] < told(tmp_path)[1]  # it was worth a save
    assert file_metadata(tmp_path / "lora-best.safetensors")["ss_steps"] == "1"


@pytest.mark.full
def test_two_processes_validate_what_one_does(sd: Toy, images: Path, tmp_path: Path) -> None:
    """Three batches of held-out images for two processes. Training differs by rounding, the first validation not."""
    options = {"max_train_steps": 3, "optimizer_args": "eps=0.01", "validate_every_n_steps": 1, "save_best": True}
    options |= {"validation_split": 0.5, "max_validation_steps": 3, "network_train_unet_only": True}
    alone = train_toy(sd, images, tmp_path / "alone", train_batch_size=1, **options)
    command = make_arguments(sd, images, tmp_path / "both", train_batch_size=1, **options)
    run_ranks(SCRIPT, *command)
    assert told(alone)[0] == told(tmp_path / "both")[0]
    assert list(told(tmp_path / "both")) == [0, 1, 2, 3]
    assert (tmp_path / "both" / "lora-best.safetensors").is_file()


# ---------------------------------------------------------------- what the user is told


def test_the_plan_says_what_it_takes(sd: Toy, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = make_arguments(sd, images, tmp_path, **HALF, max_validation_steps=2)
    assert main(["plan", *argv]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    place = lines.index("validation")
    assert re.fullmatch(r"images 5, \d of them are used", lines[place + 1])
    assert lines[place + 2] == "batches 2, each at 4 noise levels"


@pytest.mark.full
def test_a_split_that_holds_out_nothing_is_refused(
    sd: Toy, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"validation_split 0.01 of 10 images holds out none"):
        train_toy(sd, images, tmp_path, validation_split=0.01)
    argv = make_arguments(sd, images, tmp_path, max_validation_steps=2, save_best=True)
    assert main(["plan", *argv]) == 0
    assert "--max_validation_steps, --save_best: no effect because no image is held out" in capsys.readouterr().out
    assert main(["plan", *argv, "--strict"]) == 2


@pytest.mark.full
def test_a_dataset_file_may_split_a_part(sd: Toy, images: Path, tmp_path: Path) -> None:
    """The first validation is that of the same split on the command line."""
    file = tmp_path / "data.toml"
    subset = f"[[datasets.subsets]]\nimage_dir = '{images / '2_cat'}'\nnum_repeats = 2\ncaption_extension = '.txt'\n"
    head = "[[datasets]]\nresolution = 64\nbatch_size = 2\nvalidation_split = 0.5\nvalidation_seed = 7\n"
    file.write_text(f"{head}enable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 128\n{subset}")
    options = {"max_train_steps": 1, "network_train_unet_only": True}
    of_file = train_toy(
        sd, images, tmp_path / "file", **options, dataset_config=file, train_data_dir=None, resolution=None,
        enable_bucket=None, min_bucket_reso=None, max_bucket_reso=None, caption_extension=None,
    )  # fmt: skip
    of_line = train_toy(sd, images, tmp_path / "line", **HALF, **options)
    assert told(of_file)[0] == told(of_line)[0]


def test_the_report_shows_it_beside_training(tmp_path: Path) -> None:
    levels = {f"loss/validation/t{t}": t / 1000 for t in (200, 800)}
    rows: list[dict[str, Any]] = [{"step": 0, MAIN: 0.625, **levels}]
    rows += [{"step": step, "loss/current": 1 / step, "loss/average": 1 / step} for step in range(1, 5)]
    rows[3] |= {MAIN: 0.375, **levels}
    rows[4] |= {MAIN: 0.5, **levels}
    (tmp_path / "cat.run.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = Curves(tmp_path / "cat.run.jsonl")
    curves.read()
    assert curves.nonfinite_steps() == []
    found = PageParser(render_page(make_description(), curves, NO_SAMPLES))
    lines = [attributes["data-name"] for tag, attributes in found.tags if tag == "polyline"]
    assert lines == ["each step", "average", "validation", "t = 200", "t = 800"]
    assert "lowest 0.375, step 3" in found.text
