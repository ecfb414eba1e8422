"""Values of another type in a configuration file: what has one meaning is taken."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.config.file_values import is_not_given, read_file_value
from sfumato.config.schema import vocabulary


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("network_dim = 64.0", 64),
        ("network_dim = '64'", 64),
        ("network_dim = ' 64.0 '", 64),
        ("max_train_steps = '1e3'", 1000),
        ("network_dim = [16]", 16),
        ("learning_rate = '1e-4'", 1e-4),
        ("learning_rate = 1", 1.0),
        ("noise_offset = 0", 0.0),
        ("cache_latents = 'True'", True),
        ("cache_latents = 1", True),
        ("report = 'false'", False),
        ("report = 0", False),
        ("output_name = 7", "7"),
        ("mixed_precision = 'BF16'", "bf16"),
        ("loss_type = 'L2'", "l2"),
        ("max_token_length = 255", 225),
        ("max_token_length = '255'", 225),
        ("max_token_length = 75", None),
        ("max_token_length = '75'", None),
        ("max_token_length = 150.0", 150),
        ("text_encoder_lr = 1", (1.0,)),
        ("text_encoder_lr = '1e-5'", (1e-5,)),
        ("text_encoder_lr = '1e-5,2e-5'", (1e-5, 2e-5)),
        ("text_encoder_lr = '[1e-5, 2e-5]'", (1e-5, 2e-5)),
        ("text_encoder_lr = ['1e-5', 0]", (1e-5, 0.0)),
        ("ema_sigma_rel = '0.05 0.1'", (0.05, 0.1)),
        ("network_args = 'conv_dim=4 conv_alpha=1'", {"conv_dim": 4, "conv_alpha": 1}),
        ("""optimizer_args = '"betas=0.9, 0.99" eps=1e-8'""", {"betas": (0.9, 0.99), "eps": 1e-8}),
        ("optimizer_args = 'betas=0.9, 0.99 eps=1e-8'", {"betas": (0.9, 0.99), "eps": 1e-8}),
        ("optimizer_args = 'eps=1e-8'", {"eps": 1e-8}),
        ("face_crop_aug_range = '1.0, 2.0'", (1.0, 2.0)),
        ("face_crop_aug_range = [1, 2]", (1.0, 2.0)),
        ("lr_warmup_steps = '10%'", 0.1),
        ("lr_warmup_steps = '100'", 100),
    ],
)
def test_what_has_one_meaning_is_taken(load, write, line, value):
    config = load(write(f"{line}\nlr_scheduler = 'cosine'"))
    found = config.value(line.partition(" =")[0])
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "line",
    [
        "vae = ''", "vae = false", "network_dim = false", "network_args = ''", "network_args = ['']", "clip_skip = '0'",
        "min_snr_gamma = 0.0", "save_every_n_epochs = 0", "sample_every_n_steps = 0", "network_weights = []",
        "text_encoder_lr = []", "cache_latents = 'false'", "optimizer_args = []", "max_train_epochs = '0'",
    ],
)  # fmt: skip
def test_what_means_not_given(load, write, line):
    name = line.partition(" =")[0]
    config = load(write(line))
    assert config.source(name) == "default"
    assert config.value(name) == vocabulary()[name].default


@pytest.mark.parametrize("line", ["seed = 0", "max_grad_norm = 0", "unet_lr = 0.0", "caption_separator = ' '"])
def test_what_is_a_value(load, write, line):
    name = line.partition(" =")[0]
    assert load(write(line)).source(name) == "run.toml"


NUMBERS = [option for option in vocabulary().values() if option.metavar in ("N", "X")]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, -(10**400)]) | st.floats() | st.text(),
    lambda inner: st.lists(inner),
    max_leaves=4,
)


@given(option=st.sampled_from(NUMBERS), number=st.integers(1, 900))
def test_a_number_is_the_same_however_it_is_written(option, number):
    plain = read_file_value(option, number)
    for written in (float(number), str(number), f"{number}.0", [number], f" {number} "):
        value = read_file_value(option, written)
        if plain != number or isinstance(read_file_value(option, str(number)), str):
            continue  # beyond the option's limits: reported where values are checked
        assert value == number
        assert not is_not_given(option, written)


@given(option=st.sampled_from(list(vocabulary().values())), value=JSON_VALUES)
def test_no_value_breaks_the_reader(option, value):
    """Whatever JSON can hold is taken or given back; numbers that are taken are finite, and true is no number."""
    is_not_given(option, value)
    found = read_file_value(option, value)
    if isinstance(value, bool) and option.arity != "flag":
        assert found is value
    if isinstance(found, float) and found is not value:
        assert math.isfinite(found)


@given(text=st.text(max_size=60))
def test_no_text_breaks_the_reading_of_a_json_file(tmp_path_factory, text):
    from sfumato.config.config_file import read_config_file
    from sfumato.errors import Problems

    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps({text: text}), encoding="utf-8")
    problems = Problems()
    source = read_config_file(path, problems)
    assert source is not None
    assert set(source.values) <= set(vocabulary())
