"""Training on a cache that was filled elsewhere, where the files of the encoders are not."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from families.toys import ToyShelf
from sfumato.config import load_config
from sfumato.demo.toy import write_toy
from sfumato.errors import SeveralErrors, UserError
from sfumato.families.part import DENOISER_PREFIX
from sfumato.formats.network_record import read_network_records
from sfumato.plan import make_run_plan
from sfumato.tools.dataset_cache import fill_dataset_caches
from sfumato.tools.rehearse import rehearse_plan
from toy_runs import equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy

Toy = Mapping[str, Path]
CACHED: dict[str, Any] = {
    "cache_latents_to_disk": True,
    "cache_text_encoder_outputs_to_disk": True,
    "network_train_unet_only": True,
    "max_train_steps": 2,
}
MODEL = "pretrained_model_name_or_path"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 3)


@pytest.fixture
def flux(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("flux")


def move_to_other_machine(toy: Toy, folder: Path) -> dict[str, Path]:
    """The denoiser alone; the paths of encoders are those of the first machine and do not exist."""
    model = toy[MODEL]
    folder.mkdir()
    if model.is_dir():
        ours = folder / "model"
        names = [name for name in ("unet", "transformer", "scheduler", "model_index.json") if (model / name).exists()]
        for name in names:
            copy: Any = shutil.copytree if (model / name).is_dir() else shutil.copy
            ours.mkdir(exist_ok=True)
            copy(model / name, ours / name)
    else:
        ours = folder / model.name
        with safe_open(model, "pt") as file:
            inner = [name for name in file.keys() if name.startswith(DENOISER_PREFIX)]  # noqa: SIM118
            kept = inner or list(file.keys())
            save_file({name: file.get_tensor(name) for name in kept}, ours, metadata=file.metadata())
    others = {name: Path("/elsewhere", path.name) for name, path in toy.items() if name != MODEL}
    return {MODEL: ours, **others}


def copy_cache(cache: Path, folder: Path) -> Path:
    return shutil.copytree(cache, folder, copy_function=shutil.copy)


def codes_of(error: UserError) -> list[str]:
    return error.codes if isinstance(error, SeveralErrors) else [error.code]


@pytest.mark.parametrize(
    ("family", "layout", "variant"),
    [
        ("sd", "original", ""),
        ("sdxl", "diffusers", ""),
        ("flux", "original", ""),
        ("lumina", "original", ""),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("sd3", "original", ""),
                ("chroma", "original", ""),
                ("sd", "diffusers", ""),
                ("sd", "original", "2"),
                ("sd", "diffusers", "2"),
                ("sdxl", "original", ""),
                ("sd3", "diffusers", ""),
                ("sd3", "original", "3.5-medium"),
                ("flux", "diffusers", ""),
                ("chroma", "diffusers", ""),
                ("lumina", "diffusers", ""),
            )
        ),
    ],
)
def test_training_goes_on_without_the_encoders(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, family: str, layout: Any, variant: str
) -> None:
    toy, options = toy_shelf.paths(family, layout, variant), {**CACHED, "apply_t5_attn_mask": family == "chroma"}
    here = train_toy(toy, images, tmp_path / "here", **options, cache_dir=tmp_path / "cache")
    other = move_to_other_machine(toy, tmp_path / "other")
    moved, cache = shutil.copytree(images, tmp_path / "moved"), copy_cache(tmp_path / "cache", tmp_path / "copied")
    records = sorted(record.part for record in read_network_records(cache))
    assert "vae" in records
    chosen = [f"t5={record.id}" for record in read_network_records(cache) if (family, record.part) == ("sd3", "t5")]
    there = train_toy(other, moved, tmp_path / "there", **options, cache_dir=cache, cached_encoder=chosen or None)
    assert equal_tensors(read_weights(here), read_weights(there))
    assert read_metrics(here) == read_metrics(there)


@pytest.fixture(scope="module")
def filled(toy_shelf: ToyShelf, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with everything that the images need, and with the prompt "a cat" of previews."""
    folder = tmp_path_factory.mktemp("filled")
    prompts = write_prompts(folder, "a cat")
    arguments = make_arguments(toy_shelf.paths("flux"), images, folder / "out", **CACHED, sample_prompts=prompts)
    fill_dataset_caches(load_config([*arguments, "--cache_dir", str(folder / "cache")])).close()
    return folder / "cache"


def write_prompts(folder: Path, *texts: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text("".join(f"{text} --w 64 --h 64 --s 1 --l 1\n" for text in texts))
    return path


def plan_notes(toy: Toy, images: Path, **options: Any) -> list[str]:
    arguments = make_arguments(toy, images, images.parent / "out", **{**CACHED, **options})
    return list(make_run_plan(load_config(arguments), processes=1).notes)


def test_the_plan_says_what_stands_for_the_files(flux: Toy, images: Path, tmp_path: Path, filled: Path) -> None:
    other = move_to_other_machine(flux, tmp_path / "other")
    prompts = write_prompts(tmp_path, "a cat")
    notes = plan_notes(other, images, cache_dir=filled, sample_prompts=prompts)
    by_part = {record.part: record for record in read_network_records(filled)}
    for part, option in {"vae": "ae", "clip_l": "clip_l", "t5": "t5xxl"}.items():
        assert sum(note.startswith(f"{part}:") and by_part[part].id in note for note in notes) == 1
        assert any(flux[option].name in note for note in notes)
        assert by_part[part].size == flux[option].stat().st_size
    assert any("--ae FILE" in note for note in notes)
    assert not any("not here" in note for note in plan_notes(flux, images, cache_dir=filled))


def test_missing_entries_are_counted_in_one_error(flux: Toy, tmp_path: Path, filled: Path) -> None:
    """Nothing is encoded first; each encoder says its count and the option of its file."""
    other, more = move_to_other_machine(flux, tmp_path / "other"), make_images(tmp_path / "more", 5)
    with pytest.raises(SeveralErrors) as caught:
        train_toy(other, more, tmp_path / "out", **CACHED, cache_dir=copy_cache(filled, tmp_path / "cache"))
    assert caught.value.codes == ["cached-encoder-file-needed"] * 3
    for error, option in zip(caught.value.errors, ("ae", "clip_l", "t5xxl"), strict=True):
        assert "2 of 5" in error.what
        assert error.fix == f"--{option} FILE"
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_of_several_encoders_one_must_be_chosen(
    flux: Toy, images: Path, tmp_path: Path, filled: Path, toy_shelf: ToyShelf
) -> None:
    cache = copy_cache(filled, tmp_path / "cache")
    second = dict(write_toy("flux", tmp_path / "second", seed=1), **{MODEL: flux[MODEL]})
    mixed = {**flux, "t5xxl": second["t5xxl"]}
    trained = train_toy(mixed, images, tmp_path / "mixed", **CACHED, cache_dir=cache)
    other = move_to_other_machine(flux, tmp_path / "other")
    known = [record for record in read_network_records(cache) if record.part == "t5"]
    assert len(known) == 2
    with pytest.raises(UserError) as caught:
        plan_notes(other, images, cache_dir=cache)
    assert codes_of(caught.value) == ["cached-encoder-ambiguous"]
    assert all(record.id in caught.value.what for record in known)
    (new,) = [record for record in known if not any(record.id == old.id for old in read_network_records(filled))]
    chosen = {"cache_dir": cache, "cached_encoder": f"t5={new.id}"}
    assert equal_tensors(
        read_weights(trained), read_weights(train_toy(other, images, tmp_path / "there", **CACHED, **chosen))
    )


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"cached_encoder": "t5=0123"}, "cached-encoder-unknown"),
        ({"mixed_precision": "bf16"}, "cached-encoder-precision"),
        ({"cache_text_encoder_outputs_to_disk": None}, "path-missing"),
        ({"cache_dir": "empty"}, "model-path-missing"),
        ({"network_train_unet_only": None, "network_args": "train_t5xxl=True"}, "text-cache-of-trained-encoders"),
        ({"network_train_unet_only": None}, "cached-encoder-file-needed"),
    ],
)
def test_what_cannot_do_without_a_file_is_refused(
    flux: Toy,
    images: Path,
    tmp_path: Path,
    filled: Path,
    options: dict[str, Any],
    code: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    other = move_to_other_machine(flux, tmp_path / "other")
    with pytest.raises(UserError) as caught:
        plan_notes(other, images, **{"cache_dir": filled, **options})
    assert code in codes_of(caught.value)


def test_a_model_that_is_saved_whole_needs_its_encoders(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    toy, options = toy_shelf.paths("sd"), {**CACHED, "network_train_unet_only": None, "network_dim": None}
    full = {**options, "method": "full", "cache_dir": tmp_path / "cache"}
    fill_dataset_caches(load_config(make_arguments(toy, images, tmp_path / "out", **full))).close()
    with pytest.raises(UserError) as caught:
        plan_notes(move_to_other_machine(toy, tmp_path / "other"), images, **full)
    assert codes_of(caught.value) == ["cached-encoder-file-needed"]


def test_a_choice_without_effect_is_a_note(flux: Toy, images: Path, filled: Path) -> None:
    notes = plan_notes(flux, images, cache_dir=filled, cached_encoder=["t5=0123", "clip_h=0123"])
    assert [note.partition(" has")[0] for note in notes if note.startswith("--cached_encoder")] == [
        "--cached_encoder t5=0123",
        "--cached_encoder clip_h=0123",
    ]


def test_previews_are_made_of_cached_prompts(
    flux: Toy, images: Path, tmp_path: Path, filled: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the autoencoder's file, without the others'; the same image as on the first machine."""
    other = {**move_to_other_machine(flux, tmp_path / "other"), "ae": flux["ae"]}
    options = {**CACHED, "sample_every_n_steps": 2, "cache_dir": copy_cache(filled, tmp_path / "cache")}
    prompts = write_prompts(tmp_path, "a cat", "a dog")
    there = train_toy(other, images, tmp_path / "there", **options, sample_prompts=prompts)
    here = train_toy(flux, images, tmp_path / "here", **options, sample_prompts=prompts)
    (shown,), both = list((there / "sample").iterdir()), sorted((here / "sample").iterdir())
    assert len(both) == 2
    assert Image.open(shown).tobytes() == Image.open(both[0]).tobytes()
    assert capfd.readouterr().err.count("no preview of 'a dog'") == 1


def test_without_the_autoencoder_no_preview_is_tried(flux: Toy, images: Path, tmp_path: Path, filled: Path) -> None:
    other, prompts = move_to_other_machine(flux, tmp_path / "other"), write_prompts(tmp_path, "a cat")
    options = {**CACHED, "sample_every_n_steps": 1, "sample_prompts": prompts, "cache_dir": filled}
    out = train_toy(other, images, tmp_path / "out", **options)
    assert not (out / "sample").exists()


def test_held_out_images_are_validated_from_the_cache(flux: Toy, images: Path, tmp_path: Path) -> None:
    options = {**CACHED, "validation_split": 0.34, "cache_dir": tmp_path / "cache"}
    here = train_toy(flux, images, tmp_path / "here", **options)
    there = train_toy(move_to_other_machine(flux, tmp_path / "other"), images, tmp_path / "there", **options)
    assert any("loss/validation/step_average" in line for line in read_metrics(here))
    assert read_metrics(here) == read_metrics(there)


def test_a_read_only_copy_of_the_cache_is_used_whole(
    flux: Toy, images: Path, tmp_path: Path, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = copy_cache(filled, tmp_path / "cache")
    other, before = move_to_other_machine(flux, tmp_path / "other"), snapshot(cache)
    make_unwritable(cache, monkeypatch)
    options = {**CACHED, "cache_dir": cache, "sample_prompts": write_prompts(tmp_path, "a cat")}
    there = train_toy(other, images, tmp_path / "there", **options)
    assert snapshot(cache) == before
    here = train_toy(flux, images, tmp_path / "here", **options)
    assert snapshot(cache) == before
    assert equal_tensors(read_weights(here), read_weights(there))


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def make_unwritable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a read-only disk is, for root, too."""
    normal = os.open

    def refuse(path: Any, flags: int, *more: int, **named: Any) -> int:
        if str(path).startswith(str(folder)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return normal(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)


def test_damaged_records_are_passed_over(tmp_path: Path, filled: Path) -> None:
    """Whole ones beside them count; what a killed process leaves does not."""
    cache = copy_cache(filled, tmp_path / "cache")
    whole = {record.part for record in read_network_records(cache)}
    (text,) = (cache / "networks").glob("t5-*")
    shutil.copytree(text, text.with_name(f".{text.name}.01234567.tmp"))
    header = text / "model.safetensors"
    for damage in (header.read_bytes()[:40], header.read_bytes().replace(b"fingerprint", b"fingermarks"), b""):
        header.write_bytes(damage)
        assert {record.part for record in read_network_records(cache)} == whole - {"t5"}


@pytest.mark.full
def test_what_is_merged_into_an_encoder_is_part_of_what_is_cached(flux: Toy, images: Path, tmp_path: Path) -> None:
    """The adapter file is here, the encoder is not; without the adapter nothing in the cache fits."""
    adapter = train_toy(flux, images, tmp_path / "first", learning_rate=0.5, network_args=["train_t5xxl=True"])
    options = {**CACHED, "cache_dir": tmp_path / "cache"}
    merged = {"base_weights": adapter / "lora.safetensors", "base_weights_multiplier": 0.5}
    here = train_toy(flux, images, tmp_path / "here", **options, **merged)
    other = move_to_other_machine(flux, tmp_path / "other")
    there = train_toy(other, images, tmp_path / "there", **options, **merged)
    assert read_metrics(here) == read_metrics(there)
    with pytest.raises(UserError) as caught:
        train_toy(other, images, tmp_path / "without", **options)
    assert codes_of(caught.value) == ["cached-encoder-file-needed"] * 2


@pytest.mark.full
def test_a_rehearsal_needs_no_file(flux: Toy, images: Path, tmp_path: Path, filled: Path) -> None:
    """It is that of the run with every file."""
    plans = [
        make_run_plan(
            load_config(make_arguments(toy, images, tmp_path / "out", **CACHED, cache_dir=filled)), processes=1
        )
        for toy in (flux, move_to_other_machine(flux, tmp_path / "other"))
    ]
    first, second = (rehearse_plan(plan) for plan in plans)
    assert [(stage.name, stage.peak) for stage in first] == [(stage.name, stage.peak) for stage in second]
