"""TOML and JSON files of options and datasets."""

from __future__ import annotations

import json
from pathlib import Path

from fuzz.target import Setup, target, through_file
from sfumato.config import LogOptions
from sfumato.config.config_file import read_config_file
from sfumato.config.dataset_toml import read_dataset_config
from sfumato.config.option_source import check_values
from sfumato.errors import Problems
from sfumato.track.trackers import read_tracker_config

TOML_TOKENS = (
    b"[", b"]", b"[[", b"]]", b"= ", b'"""', b"'''", b"{}", b"[]", b"nan", b"-inf", b"0x7fffffffffffffff", b"1e999",
    b"1979-05-27T07:32:00Z", b"07:32:00", b"true", b"a.b.c = 1", b'"\\', b'"C:\\train"',
)  # fmt: skip
DATASET = b"""[general]
caption_extension = ".txt"
shuffle_caption = true
[[datasets]]
resolution = [512, 768]
batch_size = 4
bucket_reso_steps = 64
[[datasets.subsets]]
image_dir = "images"
num_repeats = 10
custom_attributes = {a = 1}
[[datasets.subsets]]
image_dir = "reg"
is_reg = true
class_tokens = "a cat"
"""
CONFIG = b"""pretrained_model_name_or_path = "model.safetensors"
[training]
network_dim = 16
learning_rate = 1e-4
lr_warmup_steps = 0.1
max_train_steps = 1600
optimizer_args = ["weight_decay=0.01", "betas=0.9,0.99"]
network_args = ["conv_dim=4", "block_dims=1,2,3"]
resolution = "512,512"
noise_offset = 0.05
seed = 42
sample_every_n_steps = 100
metadata_tags = "a, b"
min_snr_gamma = 5
"""


@target(*TOML_TOKENS, b"[[datasets.subsets]]", b"num_repeats = ", b"resolution = ")
def dataset_toml(folder: Path) -> Setup:
    return Setup(seeds=[DATASET], read=through_file(folder / "d.toml", read_dataset))


@target(b'"resolution": ', b"[", b"{", b"null", b"NaN", b'"\\ud800"', b"1e999", b'"image_dir": ')
def dataset_json(folder: Path) -> Setup:
    subsets = [{"image_dir": "images", "num_repeats": 10, "custom_attributes": {"a": 1}}]
    content = {"general": {"shuffle_caption": True}, "datasets": [{"resolution": 512, "subsets": subsets}]}
    return Setup(seeds=[json.dumps(content).encode()], read=through_file(folder / "d.json", read_dataset))


def read_dataset(path: Path) -> object:
    problems = Problems()
    file = read_dataset_config(path, problems)
    problems.raise_all()
    return file


@target(*TOML_TOKENS, b"\nunet_lr = ", b"\noutput_name = ", b"\nblock_lr = ", b"\nsample_at_first = ")
def config_file(folder: Path) -> Setup:
    def read(path: Path) -> object:
        problems = Problems()
        source = read_config_file(path, problems)
        values = check_values(source, problems) if source else None
        problems.raise_all()
        return values

    return Setup(seeds=[CONFIG], read=through_file(folder / "c.toml", read))


@target(*TOML_TOKENS, share=0.3)
def tracker_config(folder: Path) -> Setup:
    path = folder / "t.toml"
    options = LogOptions(log_with="wandb", log_tracker_config=path)
    seed = b'[wandb]\nentity = "a"\ntags = ["a"]\n[tensorboard]\nmax_queue = 10\n'
    return Setup(seeds=[seed], read=through_file(path, lambda _: read_tracker_config(options)))
