"""Command lines and the texts of their values, from the words to the plan of a run."""

from __future__ import annotations

import warnings
from pathlib import Path
from random import Random

from fuzz.captions import decode_argument
from fuzz.images import make_image
from fuzz.target import Setup, target
from sfumato.config import load_config
from sfumato.config.command_line import read_command_line
from sfumato.config.option_source import check_values
from sfumato.config.schema import vocabulary
from sfumato.demo.toy import write_toy
from sfumato.errors import Problems
from sfumato.plan import make_run_plan

VALUES = (
    "", "0", "-1", "1e999", "nan", "inf", "1000000000", "9" * 5000, "1e-400", "1,2,3", "0.5,0.1", ",,,", "a=1", "a=[[[",
    "a=" + "(" * 3000, "x" * 5000, "\udcff", "\0", "10%", "1e30%", "2**64", "true", "None", "all", "0-1000000000", "((",
    "*",     "cosine", "1e-4", "3", "64", "1000000", "1000000,1000000", "[1]", "{}", "a.b.C", "\U0001f431",
    "/dev/null", "-", "--",
)  # fmt: skip
NETWORK_ARGS = (
    "conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "down_lr_weight",
    "mid_lr_weight", "up_lr_weight",
    "block_lr_zero_threshold", "rank_dropout", "module_dropout", "loraplus_lr_ratio", "network_reg_dims",
    "network_reg_lrs",
    "train_blocks", "split_qkv", "in_dims", "img_attn_dim", "exclude_patterns", "include_patterns", "verbose",
)  # fmt: skip
UNUSED = (  # they write, load code by name, or look elsewhere
    "output_config", "config_file", "dataset_class", "console_log_file", "cache_dir", "output_dir", "logging_dir",
    "huggingface_repo_id", "resume_from_huggingface", "optimizer_type", "lr_scheduler_type", "network_module",
    "network_weights", "train_data_dir",
)  # fmt: skip


@target(
    b"\n--",
    b"\n",
    b"=",
    b"--network_args\n",
    b"--optimizer_args\n",
    b"--resolution=",
    b"nan",
    b"inf",
    b"1e999",
    share=2,
)
def command_line(_folder: Path) -> Setup:
    """Words, a line each."""
    seed = (
        b"--network_dim=16\n--learning_rate\n1e-4\n--resolution=512,768\n--network_args\nconv_dim=4\nblock_dims=1,2\n"
        b"--optimizer_args\nweight_decay=0.01\nbetas=0.9,0.99\n--lr_warmup_steps\n10%\n--seed\n42\n--no_metadata\n"
        b"--min_snr_gamma=5\n--noise_offset\n0.1\n--sample_prompts\na.txt\n--metadata_title\nx\n--flip_aug"
    )

    def read(data: bytes) -> object:
        problems = Problems()
        source = read_command_line(decode_argument(data).split("\n"), problems)
        check_values(source, problems)
        return source

    return Setup(seeds=[seed], read=read)


def make_training_words(folder: Path) -> list[str]:
    images = folder / "images" / "2_cat"
    images.mkdir(parents=True)
    for number in range(3):
        (images / f"{number}.png").write_bytes(make_image("PNG", size=(64, 64)))
        (images / f"{number}.txt").write_text("a cat", encoding="utf-8")
    toy = write_toy("sd", folder / "toy")
    given = {**{name: str(path) for name, path in toy.items()}, "train_data_dir": str(folder / "images")}
    given |= {"output_dir": str(folder / "out"), "cache_dir": str(folder / "cache"), "resolution": "64", "seed": "1"}
    given |= {"max_train_steps": "4", "network_dim": "2", "learning_rate": "1e-3", "caption_extension": ".txt"}
    return [f"--{name}={value}" for name, value in given.items()]


def choose_words(random: Random) -> list[str]:
    """A few options with values that are hard to read."""
    words: list[str] = []
    names = [name for name in vocabulary() if name not in UNUSED]
    for _ in range(random.choice((1, 1, 2, 3))):
        if random.random() < 0.3:
            name, value = random.choice(NETWORK_ARGS), random.choice(VALUES)
            words += ["--network_args", f"{name}={value}"]
        else:
            option = vocabulary()[random.choice(names)]
            words.append(f"--{option.name}")
            if option.arity != "flag":
                words.append(random.choice((*VALUES, *option.choices)))
    return words


@target(share=0.06)
def run_plan(folder: Path) -> Setup:
    """Options with strange values, to the plan of the run. The input is no text, but the seed of a choice of words."""
    good = make_training_words(folder)

    def read(data: bytes) -> object:
        words = choose_words(Random(data)) if data != b"good" else []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make_run_plan(load_config([*good, *words]), processes=1)

    return Setup(seeds=[b"good"], read=read)
