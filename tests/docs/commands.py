"""The commands of a page of the manual, and how they run on toys."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sfumato.compat.scripts import SCRIPTS

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
FILE_NAME = re.compile(r"# ([\w./-]+\.(?:toml|txt|yaml))\n")  # first line of a block that is a file
SHELLS = ("sh",)
OURS = ("sfumato", "python", "accelerate", "torchrun")
SET_UP = ("make", "pip", "git", "cd", "py", "source", "deactivate", "brew", "sudo")  # what is no command of ours
NOT_RUN = {  # beginning of a command -> the test that runs it, or why none does
    "sfumato demo": "tests/demo",
    "sfumato plan --rehearse": "tests/tools/test_rehearse.py",
    "sfumato plan --fit": "tests/tools/test_fit.py",
    "sfumato dataset edit": "tests/tools/test_editor_page.py",
    "sfumato dataset inspect --run": "tests/track/test_loss_watch.py",
    "sfumato dataset tag": "tests/compat/test_dataset_lines.py",
    "sfumato dataset caption": "tests/tools/test_caption_images.py",
    "sfumato dataset face-crop": "tests/tools/test_face_crop.py",
    "sfumato dataset upscale-latents": "tests/tools/test_upscale_latents.py",
    "python launchers/finetune/tag_images_by_wd14_tagger.py": "tests/compat/test_dataset_lines.py",
    "python launchers/flux_train_network.py --model_type flux_kontext": "tests/families/test_flux_kontext.py",
    "sfumato compare": "tests/tools/test_compare.py",
    "torchrun": "tests/training/test_processes.py",
    "accelerate launch --num_processes": "tests/training/test_processes.py",
    "python benchmarks/": "tests/test_benchmarks.py",
    "python recipes/": "takes hours",
}
SMALL = (  # what makes a training of the manual one step on toys, whose attention has several tokens at 128 pixels
    *(
        "--max_train_steps",
        "1",
        "--lr_warmup_steps",
        "0",
        "--resolution",
        "128",
        "--mixed_precision",
        "no",
        "--no_full_bf16",
        "--no_compile",
    ),
    *("--max_data_loader_n_workers", "0", "--train_batch_size", "1", "--min_bucket_reso", "64"),
    *("--max_bucket_reso", "256", "--save_precision", "float", "--sample_every_n_steps", "0"),
)
SMALL_IMAGE = ("--W", "64", "--H", "64", "--steps", "2")


class Piece(NamedTuple):
    """A file of a page, or the words of a command."""

    file: str
    text: str
    words: list[str]


def list_pieces(page: Path) -> Iterator[Piece]:
    """In the order of the page."""
    for _, language, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        text = re.sub(r"^ {1,8}(?=\S)", "", body, flags=re.MULTILINE) if language in SHELLS else body
        if name := FILE_NAME.match(body):
            yield Piece(name[1], body, [])
        elif language in SHELLS:
            yield from list_commands(text)


def list_commands(text: str) -> Iterator[Piece]:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] in OURS:
            yield Piece("", line.strip(), words)


def find_reason(text: str) -> str:
    """Why a command does not run here; empty for those that do."""
    return next((reason for start, reason in NOT_RUN.items() if text.startswith(start)), "")


def read_command(words: list[str]) -> tuple[str, list[str]]:
    """The script, or nothing for `sfumato`, and the arguments that run it on toys."""
    if words[0] == "sfumato":
        return "", [*words[1:], *shrink(words)]
    place = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "sfumato.compat")
    place += words[place] == "sfumato.compat"
    script = words[place].removesuffix(".py").removeprefix("launchers/").removeprefix("./")
    return script, [*words[place + 1 :], *shrink([script])]


def shrink(words: list[str]) -> tuple[str, ...]:
    """Options that make a command small. words: of the command, or the script's name alone."""
    trains = words[0] in SCRIPTS or words[:2] == ["sfumato", "train"]
    makes_images = words[0] in ("gen_img", "sdxl_gen_img") or words[:2] == ["sfumato", "generate"]
    fills_caches = words[:3] == ["sfumato", "dataset", "cache"]
    return SMALL if trains else SMALL_IMAGE if makes_images else ("--mixed_precision", "no") if fills_caches else ()
