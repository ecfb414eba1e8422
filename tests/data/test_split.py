"""Validation images: the recorded ones, of every kind of source, never trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.conftest import Finder, write_image
from data.dataset_files import DATASET_CLASSES, write_archives, write_metadata
from sfumato.config import load_config
from sfumato.config.evaluation import ValidationOptions
from sfumato.data.find.discover import find_data
from sfumato.data.plans import DataPlan, DatasetPlan
from sfumato.data.split import split_positions
from sfumato.errors import Problems, UserError

GOLDENS = Path(__file__).parents[1] / "goldens"


def test_the_split_holds_out_the_recorded_images():
    """The same images as in sd-scripts, but none of them in training (there one overlaps in 18 rows)."""
    overlaps = 0
    for row in json.loads((GOLDENS / "validation_split.json").read_text())["rows"]:
        kept, held = split_positions(row["n"], row["split"], 42)
        assert len(held) == row["val"]
        if row["val_items"] is not None:  # recorded for small sets only
            assert [str(i) for i in held] == row["val_items"]
        assert len(kept) == row["train"] - row["overlap"]
        assert sorted(kept + held) == list(range(row["n"]))
        overlaps += row["overlap"]
    assert overlaps == 18


@given(st.integers(0, 300), st.floats(0, 1), st.integers())
def test_every_image_is_in_exactly_one_part(count, share, seed):
    kept, held = split_positions(count, share, seed)
    assert sorted(kept + held) == list(range(count))
    assert len(held) == round(count * share)
    assert split_positions(count, share, seed) == (kept, held)


def split(find: Finder, share: float, *argv: object, seed: int | None = None, **options: int) -> DataPlan:
    """The plan with these validation options, which no command line takes yet."""
    (find.root / "m.safetensors").touch()
    needed = ["--pretrained_model_name_or_path", find.root / "m.safetensors", "--output_dir", find.root / "out"]
    config = load_config([str(each) for each in (*argv, *needed, "--cache_dir", find.root / "cache")])
    chosen = ValidationOptions(validation_split=share, validation_seed=seed)
    find.problems = Problems()
    plan = find_data(
        config.model_copy(update={"validation": chosen}), bucket_step=16, problems=find.problems, **options
    )
    find.problems.raise_all()
    return plan


def paths(datasets: tuple[DatasetPlan, ...]) -> list[str]:
    found: list[str] = []
    for dataset in datasets:
        for subset in dataset.subsets:
            found += subset.items.images.paths()
    return found


KINDS = {
    "folders": ["--train_data_dir", "t", "--resolution", 64],
    "metadata": ["--in_json", "m.json", "--train_data_dir", "t/2_a", "--resolution", 64, "--dataset_repeats", 2],
    "own class": ["--dataset_class", "my_cats.Cats", "--resolution", 64],
    "archives": ["--dataset_config", "shards.toml"],
}


@pytest.fixture
def data(write_images, tmp_path, monkeypatch) -> Path:
    """Twelve images in each kind of source."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_images(tmp_path / "t" / "2_a", 12)
    write_metadata(tmp_path / "m.json", {f"img{i}": {"caption": str(i)} for i in range(12)})
    classes = DATASET_CLASSES.replace("range(3)", "range(12)").replace("a/img", "t/2_a/img")
    (tmp_path / "split_cats.py").write_text(classes)
    write_archives(tmp_path / "set")
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'set/{000..002}.tar'\n"
    (tmp_path / "shards.toml").write_text(text)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.25, 0.35, 0.5])
def test_every_kind_of_source_is_split(find, data, kind, share):
    argv = [str(each).replace("my_cats", "split_cats") for each in KINDS[kind]]
    whole = paths(split(find, 0, *argv).datasets)
    plan = split(find, share, *argv, seed=42)
    train, held = paths(plan.datasets), paths(plan.validation)
    (row,) = [
        row
        for row in json.loads((GOLDENS / "validation_split.json").read_text())["rows"]
        if row["n"] == 12 and row["split"] == share
    ] or [{"val": round(12 * share)}]
    assert len(whole) == 12
    assert len(held) == row["val"] == plan.num_validation_images  # each once
    assert sorted(train + held) == sorted(whole)
    assert paths(split(find, share, *argv, seed=42).validation) == held
    assert paths(split(find, share, *argv, seed=43).validation) != held


def test_regularization_images_are_never_held_out(find, data, write_images):
    write_images(data / "r" / "1_b", 4)
    plan = split(find, 0.5, *KINDS["folders"], "--reg_data_dir", "r")
    assert not any("1_b" in path for path in paths(plan.validation))
    assert len(plan.datasets[0].subsets[1].items) == 4


def test_everything_or_nothing(find, data):
    assert split(find, 0, *KINDS["folders"]).validation == ()
    with pytest.raises(UserError) as error:
        split(find, 1, *KINDS["folders"])
    assert error.value.code == "no-training-images"


def test_several_sizes_of_a_folder_hold_out_the_same_images(find, data):
    write_image(data / "t" / "2_a" / "large.png", (128, 128), caption="x")
    subset = "[[datasets.subsets]]\nimage_dir = 't/2_a'\n"
    text = (
        f"[[datasets]]\nresolution = 64\n{subset}[[datasets]]\nresolution = 128\nskip_image_resolution = 64\n{subset}"
    )
    (data / "two.toml").write_text(text)
    plan = split(find, 0.5, "--dataset_config", "two.toml", seed=1)
    first, second = (set(paths((dataset,))) for dataset in plan.datasets)
    assert not (first | second) & set(paths(plan.validation))
    assert len(first) == 7


def test_training_on_held_out_images_is_an_error(find, data):
    """Another split for the same folder in a second dataset would train on what the first one holds out."""
    subset = "[[datasets.subsets]]\nimage_dir = 't/2_a'\n"
    text = f"[[datasets]]\nresolution = 64\n{subset}[[datasets]]\nresolution = 128\n{subset}validation_split = 0.0\n"
    (data / "two.toml").write_text(text)
    with pytest.raises(UserError, match=r"datasets\[1\].* 6 images") as error:
        split(find, 0.5, "--dataset_config", "two.toml", seed=1)
    assert error.value.code == "validation-images-trained-on"
