"""`sfumato compare`: the checkpoints of any run, found, attached in turn, measured; what it refuses."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.config import load_config
from sfumato.config.run_record import find_run_record
from sfumato.data.find.index import get_default_cache_dir
from sfumato.tools.compare.checkpoints import SavedCheckpoint, choose_some, find_checkpoints
from sfumato.tools.compare.validation import ValidationLosses
from toy_runs import make_images, train_toy

QUICK = ["--steps", "1", "--scale", "1", "--images_per_prompt", "2"]
SAVED = {"save_every_n_steps": 2, "max_train_steps": 4}


def read_text(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        return dict(image.text)  # pyright: ignore[reportAttributeAccessIssue]


def read_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def write_prompts(folder: Path, more: str = "") -> list[str]:
    """One prompt about the cat, and two that are not. more: options of each."""
    end = f"--w 64 --h 64{more}\n"
    (folder / "prompts.txt").write_text(f"a photo of zwx, a cat {end}")
    (folder / "neutral.txt").write_text(f"a tree {end}a house {end}")
    return ["--prompts", str(folder / "prompts.txt"), "--neutral_prompts", str(folder / "neutral.txt")]


def read_result(output: Path) -> dict[str, Any]:
    return json.loads((output / "lora.compare.json").read_text())


OTHERS = Path("others")  # further images of the same names
RUNS = {
    "lora": ("sd", {}),
    "lora of FLUX": ("flux", {"network_train_unet_only": True}),
    "whole": ("sd", {"method": "full", "network_dim": None, "learning_rate": "1e-5"}),
    "words": (
        "sd",
        {"method": "textual_inversion", "network_dim": None, "token_string": "zwx", "caption_prefix": "zwx"},
    ),
    "sdxl": ("sdxl", {"network_train_unet_only": True}),
    "sd3": ("sd3", {"network_train_unet_only": True}),
    "chroma": ("chroma", {"network_train_unet_only": True}),
    "lumina": ("lumina", {"network_train_unet_only": True}),
    "a ControlNet": (
        "sd", {"method": "control_net", "network_dim": None, "conditioning_data_dir": OTHERS, "learning_rate": "1e-1"}
    ),
    "an LLLite": (
        "sdxl",
        {"method": "lllite", "network_dim": 8, "cond_emb_dim": 4, "conditioning_data_dir": OTHERS,
         "learning_rate": "1e-1"},
    ),
    "edits": (
        "flux_kontext",
        {"model_type": "flux_kontext", "network_module": "networks.lora_flux", "network_train_unet_only": True,
         "guidance_scale": 1.0, "reference_data_dirs": [OTHERS]},
    ),
}  # fmt: skip


@pytest.mark.fast_for("[lora]")
@pytest.mark.parametrize("run", RUNS)
def test_every_run_can_be_compared(
    tmp_path: Path, toy_shelf: ToyShelf, run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The images of each checkpoint are those of `sfumato generate` with it alone, though they are made in turn."""
    monkeypatch.chdir(tmp_path)
    family, options = RUNS[run]
    toy = toy_shelf.paths(family)
    further = make_images(tmp_path / OTHERS) / "2_cat" / "0.png"
    reads = {"conditioning_data_dir": f" --cn {further}", "reference_data_dirs": f" --ref {further}"}
    more = "".join(line for option, line in reads.items() if option in options)
    output = train_toy(toy, make_images(tmp_path / "images"), tmp_path / "out", **{**SAVED, **options})
    assert main(["compare", str(output), *QUICK, *write_prompts(tmp_path, more)]) == 0
    assert [(each["file"].partition(".")[0], each["step"]) for each in read_result(output)["checkpoints"]] == [
        ("lora-step00000002", 2),
        ("lora", 4),
    ]
    folder = output / "lora.compare"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        f"{name}_{end}_{i}.png"
        for name in ("base", "lora-step00000002", "lora")
        for end in ("c00", "n00", "n01")
        for i in (0, 1)
    }
    images = [read_pixels(folder / f"{name}_c00_1.png") for name in ("base", "lora-step00000002", "lora")]
    assert all((a != b).any() for a, b in ((images[0], images[1]), (images[1], images[2])))
    assert "lora.compare.html" in capsys.readouterr().out
    for name, image in (("lora-step00000002", images[1]), ("base", images[0])):
        program, *argv = shlex.split(read_text(folder / f"{name}_c00_1.png")["command"])
        assert program == "sfumato"
        argv = [str(restore(word, [*toy.values(), *output.iterdir(), further])) for word in argv]
        assert main([*argv, "--outdir", f"again {name}"]) == 0
        (made,) = Path(f"again {name}").glob("*.png")
        assert np.abs(read_pixels(made) - image).max() == 0


def restore(word: str, paths: list[Path]) -> str:
    """A word of a command with the path whose name stands in it."""
    name, _, rest = word.partition("=")
    return next((f"{path}={rest}" if rest else str(path) for path in paths if path.name == name), word)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, toy_shelf: ToyShelf) -> Path:
    """A run with held-out images and a validation after each step."""
    folder = tmp_path_factory.mktemp("run")
    options = {**SAVED, "validation_split": 0.4, "validate_every_n_steps": 1, "ema_decay": 0.5}
    return train_toy(toy_shelf.paths("sd"), make_images(folder / "images"), folder / "out", **options)


@pytest.mark.full
def test_the_validation_loss_is_what_the_run_wrote_or_the_same_measured_now(trained: Path, tmp_path: Path) -> None:
    assert main(["compare", str(trained), *QUICK, *write_prompts(tmp_path)]) == 0
    written = read_result(trained)["checkpoints"]
    metrics = trained / "lora.run.jsonl"
    before = metrics.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    by_step = {row["step"]: row.get("loss/validation/step_average") for row in rows}
    expected = [(each["file"], by_step[each["step"]]) for each in written if "ema" not in each["file"]]
    assert [(each["file"], each["validation_loss"]) for each in written if "ema" not in each["file"]] == expected
    try:
        metrics.write_text("".join(f"{json.dumps({'step': row['step']})}\n" for row in rows))
        assert main(["compare", str(trained), *QUICK, *write_prompts(tmp_path)]) == 0
        measured = {each["file"]: each["validation_loss"] for each in read_result(trained)["checkpoints"]}
    finally:
        metrics.write_text(before)
    for file, loss in expected:
        assert measured[file] == pytest.approx(loss, rel=1e-5)
    assert all(loss is not None for loss in measured.values()), "those of EMAs, too"


@pytest.mark.full
def test_what_is_there_is_not_made_again(trained: Path, tmp_path: Path) -> None:
    argv = ["compare", str(trained), *QUICK, *write_prompts(tmp_path)]
    assert main(argv) == 0
    folder = trained / "lora.compare"
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    removed, torn = folder / "lora_c00_0.png", folder / "lora_n01_1.png"
    pixels = [read_pixels(removed), read_pixels(torn)]
    removed.unlink()
    torn.write_bytes(torn.read_bytes()[:200])
    assert main(argv) == 0
    changed = {path for path in folder.iterdir() if path.stat().st_mtime_ns != times[path]}
    assert changed == {removed, torn}
    assert all((read_pixels(path) == old).all() for path, old in zip((removed, torn), pixels, strict=True))
    assert main([*argv, "--first_seed", "3"]) == 0
    assert {path for path in folder.iterdir() if path.stat().st_mtime_ns == times[path]} == set()


@pytest.mark.full
def test_the_run_is_found_without_its_options(trained: Path, tmp_path: Path, codes: list[str]) -> None:
    """Those that hold paths are in the user's cache folder alone, and only for this folder."""
    record = find_run_record(get_default_cache_dir(), trained, "lora")
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    assert main(["compare", str(moved), *QUICK]) == 2
    assert codes == ["compare-options-unknown"]
    given = [word for line in record.read_text().splitlines() for word in line.split(" = ") if "safetensors" in word]
    options = ["--pretrained_model_name_or_path", given[0].strip('"'), *write_prompts(tmp_path)]
    assert main(["compare", str(moved), *QUICK, *options]) == 0
    assert read_result(moved)["checkpoints"]
    for path in moved.rglob("*"):
        assert path.is_dir() or str(record.parents[2]).encode() not in path.read_bytes()


@pytest.mark.full
def test_a_model_that_was_moved(
    trained: Path, tmp_path: Path, codes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = find_run_record(get_default_cache_dir(), trained, "lora")
    text = record.read_text()
    try:
        record.write_text(text.replace(".safetensors", ".gone"))
        assert main(["compare", str(trained), *QUICK]) == 2
    finally:
        record.write_text(text)
    assert codes == ["compare-model-moved"]


@pytest.mark.parametrize(
    ("name", "code"),
    [("nowhere", "report-folder-missing"), ("empty", "report-without-run"), ("unsaved", "compare-without-checkpoints")],
)
def test_folders_that_cannot_be_compared(tmp_path: Path, codes: list[str], name: str, code: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "unsaved").mkdir()
    (tmp_path / "unsaved" / "lora.run.jsonl").write_text('{"step": 1}\n')
    model = ["--pretrained_model_name_or_path", str(tmp_path)]
    assert main(["compare", str(tmp_path / name), *model]) == 2
    assert codes == [code]


@pytest.mark.full
def test_a_folder_without_held_out_images(trained: Path, tmp_path: Path, codes: list[str]) -> None:
    from tools.test_image_encoder import write_dino

    encoder = write_dino(tmp_path / "dino")
    argv = ["compare", str(trained), *QUICK, *write_prompts(tmp_path), "--image_encoder", str(encoder)]
    assert main([*argv, "--held_out", str(tmp_path)]) == 2
    assert codes == ["held-out-folder-empty"]
    assert main([*argv, "--image_encoder", str(tmp_path / "none")]) == 2
    assert codes[1:] == ["image-model-missing"]


def test_checkpoints_are_known_by_their_names(tmp_path: Path) -> None:
    files = ["run-step00000010", "run-step00000010-ema", "run-000002", "run-best", "run", "run2", "other-000001"]
    files += ["run-000003-ema0.05"]
    for name in files:
        (tmp_path / f"{name}.ckpt").touch()
    (tmp_path / "run-step00000005").mkdir()
    (tmp_path / "run-step00000005" / "adapter_model.safetensors").touch()
    (tmp_path / "run-step00000010-state").mkdir()
    (tmp_path / "run-step00000010-state" / "state.safetensors").touch()
    (tmp_path / "run.report.json").touch()
    (tmp_path / "run.compare").mkdir()
    found = find_checkpoints(tmp_path, "run", steps_per_epoch=7, last_step=30, best_step=21)
    assert [(each.path.name.removesuffix(".ckpt"), each.step, each.ema) for each in found] == [
        ("run-step00000005", 5, ""),
        ("run-step00000010", 10, ""),
        ("run-step00000010-ema", 10, "-ema"),
        ("run-000002", 14, ""),
        ("run-000003-ema0.05", 21, "-ema0.05"),
        ("run", 30, ""),
    ]


@pytest.mark.parametrize(("words", "measured"), [("", ""), ("--evaluate_with_ema", "-ema0.05")])
def test_what_is_written_is_of_one_of_several_averages(tmp_path: Path, words: str, measured: str) -> None:
    (tmp_path / "lora.run.jsonl").write_text('{"step": 2, "loss/validation/step_average": 0.5}\n')
    options = ["--ema_sigma_rel", "0.05", "0.1", *words.split(), "--validation_split", "0.2"]
    config = load_config(options, skip_rules=("model-missing", "data-missing", "output-missing"))
    plan: Any = None
    losses = ValidationLosses(config, tmp_path, "lora", plan)
    for ema in ("", "-ema0.05", "-ema0.1"):
        found = losses.find_written(SavedCheckpoint(path=tmp_path / "lora", step=2, ema=ema))
        assert (found == 0.5) is (ema == measured), ema


def test_of_many_checkpoints_some_are_chosen_evenly() -> None:
    many = [SavedCheckpoint(path=Path(str(step)), step=step) for step in range(0, 101, 5)]
    assert [each.step for each in choose_some(many, 5)] == [0, 25, 50, 75, 100]
    assert choose_some(many, 50) == many
    assert [each.step for each in choose_some(many, 1)] == [100]
