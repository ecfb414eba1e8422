"""--plan on every command that trains or fills caches: what is refused, what is shown, and that nothing is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from compat.helpers import list_needed
from families.toys import ToyShelf
from sfumato.cli.main import main as sfumato
from sfumato.compat.launch import main as run_script
from sfumato.compat.scripts import SCRIPTS
from sfumato.data.find.index import get_default_cache_dir
from sfumato.families.sd import StableDiffusion
from toy_runs import make_arguments, make_images, train_toy

CACHES = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
Toy = Mapping[str, Path]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything that a run might write is below it, caches included."""
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    assert get_default_cache_dir().is_relative_to(tmp_path)
    return tmp_path


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the weights of Stable Diffusion ends the test."""

    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(StableDiffusion, "load", load)


def list_tree(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_launcher_shows_its_plan_and_writes_nothing(
    name: str, toy_shelf: ToyShelf, images: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = SCRIPTS[name]
    is_adapter = script.method == "adapter"
    options = list_needed(script, images)
    options |= CACHES if is_adapter and "cache_text_encoder_outputs" in script.options else {}
    options |= {"network_train_unet_only": True} if "cache_text_encoder_outputs_to_disk" in options else {}
    argv = make_arguments(toy_shelf.paths(script.family or "flux"), images, home / "out" / "deep", **options)
    assert run_script([name, *argv, "--plan", "--logging_dir", str(home / "logs")]) == 0
    shown = capsys.readouterr().out
    for words in ("steps", "4, over ", "seed 7"):
        assert words in shown
    assert list(home.rglob("*")) == []


def test_train_and_plan_say_the_same(
    toy_shelf: ToyShelf, images: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = make_arguments(toy_shelf.paths("sd"), images, home / "out")
    shown: list[list[str]] = []
    for words in (["train", *argv, "--plan"], ["plan", *argv], ["plan", *argv, "--plan"]):
        assert sfumato(words) == 0
        shown.append([line for line in capsys.readouterr().out.splitlines() if not line.startswith("  plan ")])
    assert shown[0] == shown[1] == shown[2]


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_file_may_ask_for_it(suffix: str, toy_shelf: ToyShelf, images: Path, home: Path, no_weights: None) -> None:
    file = home / f"run.{suffix}"
    file.write_text("plan = true" if suffix == "toml" else '{"plan": true}')
    argv = make_arguments(toy_shelf.paths("sd"), images, home / "out", config_file=file)
    assert run_script(["train_network", *argv]) == 0
    assert list(home.iterdir()) == [file]


# What is wrong -> options, and the codes that training begins with.
FAULTS: dict[str, tuple[Callable[[Path], Mapping[str, Any]], list[str]]] = {
    "an output folder that is a file": (lambda home: {"output_dir": home / "file"}, ["folder-not-writable"]),
    "a folder for logs that is a file": (lambda home: {"logging_dir": home / "file"}, ["folder-not-writable"]),
    "a log file that is a folder": (lambda home: {"console_log_file": home}, ["output-file-is-folder"]),
    "a cache folder that cannot be made": (
        lambda home: {"cache_dir": home / "file" / "c", "cache_latents_to_disk": True},
        ["folder-not-writable"],
    ),
    "an optimizer of a package that is missing": (
        lambda home: {"optimizer_type": "no_such_package.Adam"},
        ["class-module-missing"],
    ),
    "arguments that the optimizer refuses": (
        lambda home: {"optimizer_args": "betas=1"},
        ["optimizer-arguments-refused"],
    ),
    "a tokenizer folder without one": (lambda home: {"tokenizer": home}, ["clip-tokenizer-missing"]),
    "a state that does not exist": (lambda home: {"resume": home / "gone"}, ["path-missing"]),
    "a folder that is no state": (lambda home: {"resume": home}, ["no-complete-state"]),
    "images that are damaged behind their headers": (
        lambda home: {"train_data_dir": damage(make_images(home / "cut"))},
        ["image-decode-failed"],
    ),
    "images without headers": (
        lambda home: {"train_data_dir": damage(make_images(home / "cut", 1), keep=False)},
        ["image-header-damaged"],
    ),
    "a file of prompts that cannot be read": (
        lambda home: {"sample_prompts": write(home / "p.json", "[{}"), "sample_at_first": True},
        ["prompt-file-invalid"],
    ),
    "several things at once": (
        lambda home: {
            "output_dir": home / "file",
            "optimizer_type": "no_such_package.Adam",
            "resume": home,
            "tokenizer": home,
            "train_data_dir": damage(make_images(home / "cut")),
        },
        [
            "clip-tokenizer-missing",
            "image-decode-failed",
            "no-complete-state",
            "class-module-missing",
            "folder-not-writable",
        ],
    ),
}


def damage(folder: Path, middle: int = 2000, *, keep: bool = True) -> Path:
    """Every image has other bytes in its middle, or nothing but its first ones."""
    for image in folder.rglob("*.png"):
        data = image.read_bytes()
        image.write_bytes(data[:middle] + bytes(200) + data[middle + 200 :] if keep else data[:4])
    return folder


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("what", FAULTS)
def test_the_plan_refuses_what_training_refuses_before_a_weight_is_read(
    what: str, toy_shelf: ToyShelf, images: Path, home: Path, codes: list[str], no_weights: None
) -> None:
    options, expected = FAULTS[what]
    (home / "file").write_text("")
    argv = make_arguments(toy_shelf.paths("sd"), images, home / "out", **options(home))
    before = list_tree(home)
    assert run_script(["train_network", *argv, "--plan"]) == 2
    assert codes == expected
    assert list_tree(home) == before
    codes.clear()
    assert run_script(["train_network", *argv]) == 2
    if what != "a log file that is a folder":  # which nobody can log the other faults to
        assert codes == expected


def test_a_missing_t5_tokenizer_is_found_before_its_weights(
    toy_shelf: ToyShelf, images: Path, home: Path, codes: list[str]
) -> None:
    argv = make_arguments(toy_shelf.paths("flux"), images, home / "out", tokenizer=[home, home])
    assert run_script(["flux_train_network", *argv, "--plan"]) == 2
    assert codes == ["clip-tokenizer-missing"]
    codes.clear()
    clip = toy_shelf.paths("flux")["tokenizer"]
    argv = make_arguments(toy_shelf.paths("flux"), images, home / "out", tokenizer=[clip, home])
    assert run_script(["flux_train_network", *argv, "--plan"]) == 2
    assert codes == ["t5-tokenizer-missing"]


def test_a_device_that_the_machine_lacks(toy_shelf: ToyShelf, images: Path, home: Path, codes: list[str]) -> None:
    argv = make_arguments(toy_shelf.paths("sd3"), images, home / "out", t5xxl_device="cuda:77")
    assert run_script(["sd3_train_network", *argv, "--plan"]) == 2
    assert codes == ["t5-device-missing"]


@pytest.mark.full
def test_what_a_resumed_run_goes_on_with(
    toy_shelf: ToyShelf, images: Path, home: Path, codes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    toy, state = toy_shelf.paths("sd"), home / "out" / "lora-state"
    train_toy(toy, images, home / "out", save_state=True, max_train_steps=2)
    for total, words in ((3, "step 2 of 3"), (2, "nothing left to do")):
        argv = make_arguments(toy, images, home / "more", resume=state, max_train_steps=total, learning_rate="2e-3")
        assert run_script(["train_network", *argv, "--plan"]) == 0
        shown = capsys.readouterr().out
        assert words in shown
        assert "--learning_rate was 0.001, now it is 0.002" in shown
    argv = make_arguments(toy, images, home / "more", resume=state, optimizer_type="SGDNesterov")
    assert run_script(["train_network", *argv, "--plan"]) == 2
    assert codes == ["resume-optimizer-mismatch"]
    assert not (home / "more").exists()


def test_of_several_processes_one_shows_it_for_all(
    toy_shelf: ToyShelf,
    images: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = make_arguments(toy_shelf.paths("sd"), images, home / "out", ddp_timeout=3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, faults in (("0", []), ("1", []), ("1", ["--nonsense"])):
        monkeypatch.setenv("RANK", rank)
        for words in (["train", "--plan"], ["plan"]):
            assert sfumato([words[0], *argv, *words[1:], *faults]) == 0
            printed = capsys.readouterr()
            assert ("over 2 processes" in printed.out) == (rank == "0")
            assert printed.err == ""
            assert bool(printed.out) == (rank == "0")


@pytest.mark.parametrize("name", ["ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_MEGATRON_LM"])
def test_what_the_launcher_of_accelerate_sets_without_effect(
    name: str,
    toy_shelf: ToyShelf,
    images: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, "true")
    argv = make_arguments(toy_shelf.paths("sd"), images, home / "out")
    assert run_script(["train_network", *argv, "--plan"]) == 0
    assert f"note: {name}=true in the environment has no effect" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["tools/cache_latents", "tools/cache_text_encoder_outputs", "dataset cache"])
def test_the_commands_that_fill_caches_show_it_too(
    command: str, toy_shelf: ToyShelf, images: Path, home: Path, codes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = sfumato if command == "dataset cache" else run_script
    argv = make_arguments(toy_shelf.paths("sd"), images, home / "out", cache_dir=home / "c")
    assert run([*command.split(), *argv, "--plan"]) == 0
    assert "10 samples" in capsys.readouterr().out
    assert list(home.rglob("*")) == []
    argv = make_arguments(toy_shelf.paths("sd"), images, home / "out", cache_dir=home / "c", tokenizer=home)
    assert run([*command.split(), *argv, "--plan"]) == 2
    assert codes == ["clip-tokenizer-missing"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["generate", "--prompt", "a cat"], "option-of-another-script"),
        (["dataset", "inspect", "."], "option-of-another-script"),
        (["dataset", "cache", "--prune"], "plan-without-filling"),
    ],
)
def test_where_there_is_no_plan_it_is_refused(words: list[str], code: str, codes: list[str]) -> None:
    assert sfumato([*words, "--plan"]) == 2
    assert code in codes


def test_instead_of_a_look_at_the_dataset(toy_shelf: ToyShelf, images: Path, home: Path) -> None:
    argv = make_arguments(toy_shelf.paths("sd"), images, home / "out", debug_dataset=True)
    assert sfumato(["train", *argv, "--plan"]) == 0
    assert list(home.rglob("*")) == []
