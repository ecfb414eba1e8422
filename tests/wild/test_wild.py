"""Configurations in the style of front ends, notebooks and guides: all of them plan, some of each kind train.

A file is what a front end writes or a guide shows: SCRIPT.NAME.toml or .json for --config_file, NAME.sh for a command
line; NAME.dataset.toml beside it is the file of --dataset_config. {home} is the folder of `layout.make_home`, {dataset}
the dataset file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from families.toys import ToyShelf
from sfumato.compat.launch import main as run_script
from sfumato.compat.scripts import SCRIPTS
from sfumato.formats.checkpoint import open_checkpoint
from toy_runs import read_metrics
from wild.layout import fill, make_home, write

WILD = Path(__file__).parent
KINDS = (
    "colab",
    "concepts",
    "control",
    "easy_training",
    "fluxgym",
    "kohya_ss",
    "lora_scripts",
    "lycoris",
    "sd_scripts",
    "textual_inversion",
    "whole_models",
)
DATASET = ".dataset.toml"
TRAINED = (  # three of each kind of program
    "colab/train_network.standard.toml",
    "colab/train_network.several_folders.toml",
    "colab/train_network.sections.toml",
    "control/control_net_command.sh",
    "control/lllite_second_version.sh",
    "control/sdxl_train_control_net_lllite.window.toml",
    "easy_training/train_network.standard.toml",
    "easy_training/train_network.wildcards.toml",
    "easy_training/sdxl_train_network.cached.toml",
    "fluxgym/large_card.sh",
    "fluxgym/adafactor.sh",
    "fluxgym/advanced.sh",
    "kohya_ss/train_network.locon.toml",
    "kohya_ss/train_network.saved_standard.json",
    "kohya_ss/train_db.standard.toml",
    "lora_scripts/train_network.standard.toml",
    "lora_scripts/train_network.prodigy.toml",
    "lora_scripts/lumina_train_network.standard.toml",
    "sd_scripts/lora_base_weights.sh",
    "sd_scripts/masked_loss.sh",
    "sd_scripts/fine_tuning.sh",
    "textual_inversion/dreambooth.sh",
    "textual_inversion/sdxl_train_textual_inversion.window.toml",
    "textual_inversion/style_template.sh",
    "whole_models/sd3_text_encoders.sh",
    "whole_models/lumina_train.saved.toml",
    "whole_models/lumina_command.sh",
)
LYCORIS = tuple(  # one of each kind of adapter
    f"lycoris/train_network.{name}.toml"
    for name in (
        "locon_standard", "loha_standard", "lokr_factor", "full_standard", "ia3_preset", "glora_standard",
        "diag_oft_constraint", "boft_standard", "dylora_blocks",
    )
)  # fmt: skip
METHODS = ("textual_inversion", "whole_models", "control")  # whose configurations all train, the others in full runs
SMALL = (  # what makes any of them a run of two steps, whatever it says itself
    *("--max_train_steps", "2", "--mixed_precision", "no", "--no_full_bf16", "--save_precision", "float"),
    *("--max_data_loader_n_workers", "0", "--no_gradient_checkpointing", "--train_batch_size", "1"),
    *("--min_bucket_reso", "64", "--max_bucket_reso", "128"),
)
SAVED = (".safetensors", ".ckpt", ".pt")
SMALL_ADAPTER = ("--network_dim", "2")


def list_configurations(*kinds: str) -> list[str]:
    files = [path for kind in kinds for path in sorted((WILD / kind).iterdir())]
    return [path.relative_to(WILD).as_posix() for path in files if not path.name.endswith(DATASET)]


@pytest.fixture(scope="session")
def home(toy_shelf: ToyShelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(toy_shelf, tmp_path_factory.mktemp("home"))


def make_command(name: str, home: Path, folder: Path, change: Callable[[str], str] = str) -> list[str]:
    """The script and its options; files are written to `folder`. change: what happens to their texts before."""
    file = WILD / name
    dataset = file.with_name(file.stem + DATASET)
    place = folder / "dataset.toml" if dataset.is_file() else None
    if place:
        write(place, change(fill(dataset.read_text(encoding="utf-8"), home)))
    text = change(fill(file.read_text(encoding="utf-8"), home, place))
    if file.suffix == ".sh":
        return read_command_line(text)
    config = folder / f"config{file.suffix}"
    write(config, text)
    return [
        file.name.partition(".")[0],
        "--config_file",
        str(config),
        *(["--dataset_config", str(place)] if place else []),
    ]


def read_command_line(text: str) -> list[str]:
    """What a shell would start, without the launcher before the script."""
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    script = next(number for number, word in enumerate(words) if word.endswith(".py"))
    return [Path(words[script]).stem, *words[script + 1 :]]


@pytest.mark.fast_for(*TRAINED)
@pytest.mark.parametrize("name", list_configurations(*KINDS))
def test_it_plans(name: str, home: Path, tmp_path: Path, codes: list[str]) -> None:
    command = make_command(name, home, tmp_path / "files")
    before = sorted(home.rglob("*"))
    assert run_script([*command, "--plan"]) == 0, codes
    assert sorted(home.rglob("*")) == before


def shrink(text: str) -> str:
    """The same with images of 64 pixels and without a number of epochs."""
    text = re.sub(r'^\s*"?(max_train_epochs|epoch)"?\s*[=:].*\n', "", text, flags=re.MULTILINE)
    text = re.sub(r"--max_train_epochs[ =]\d+", "", text)
    text = re.sub(r"(\bmin_bucket_reso\"?\s*[=:]?\s*)\d+", r"\g<1>64", text)
    text = re.sub(r"(\bmax_bucket_reso\"?\s*[=:]?\s*)\d+", r"\g<1>128", text)
    return re.sub(r'(\b(?:max_)?resolution"?\s*[=:]\s*)("?)[\[\d, \]]*[\d\]]\2', r"\g<1>\g<2>64\g<2>", text)


FURTHER = [*LYCORIS, *(name for name in list_configurations(*METHODS) if name not in TRAINED)]


@pytest.mark.fast_for(*TRAINED[::3])
@pytest.mark.parametrize("name", [*TRAINED, *FURTHER])
def test_it_trains_two_steps_and_saves(name: str, home: Path, tmp_path: Path, codes: list[str]) -> None:
    script, *options = make_command(name, home, tmp_path / "files", shrink)
    changes_rank = SCRIPTS[script].method == "adapter" and name not in LYCORIS
    small = [*SMALL, *(SMALL_ADAPTER if changes_rank else ())]
    places = ["--output_dir", str(tmp_path / "out"), "--output_name", "x", "--logging_dir", str(tmp_path / "logs")]
    assert run_script([script, *options, *small, *places]) == 0, codes
    assert len(read_metrics(tmp_path / "out", "x")) == 2
    (saved,) = (path for path in (tmp_path / "out").iterdir() if path.stem == "x" and path.suffix in SAVED)
    if name == "whole_models/sd3_text_encoders.sh":
        assert {path.name for path in saved.parent.glob("x_*.safetensors")} == {f"x_clip_{c}.safetensors" for c in "lg"}
    with open_checkpoint(saved) as file:
        assert all(file.read(key).isfinite().all() for key in file.header.tensors)


def test_there_are_enough_of_them() -> None:
    assert len(list_configurations(*KINDS)) >= 60
    assert len(list_configurations("lycoris")) >= 40
    tried = [kind for kind in KINDS if kind not in ("lycoris", "concepts")]
    assert all(sum(name.startswith(kind) for name in TRAINED) == 3 for kind in tried)
    scripts = {name.split("/")[1].split(".")[0] for name in list_configurations("kohya_ss", "colab", "lora_scripts")}
    assert scripts <= set(SCRIPTS)
