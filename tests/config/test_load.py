"""load_config: precedence, all faults at once, secrets."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sfumato.config import Config, load_config
from sfumato.config.schema import vocabulary
from sfumato.errors import SeveralErrors

SOURCE = Path(__file__).parents[2] / "src"


def test_precedence(load, write):
    file = write("network_dim = 2\nseed = 2\nclip_skip = 2")
    config = load([file, "--network_dim", "1"], defaults={"clip_skip": 3, "keep_tokens": 3, "seed": 3})
    found = {name: (config.value(name), config.source(name)) for name in ("network_dim", "seed", "keep_tokens")}
    assert found == {"network_dim": (1, "command line"), "seed": (2, "run.toml"), "keep_tokens": (3, "launcher")}
    assert config.source("max_grad_norm") == "default"
    assert set(config.sources) == set(vocabulary())


def test_a_default_given_on_the_command_line_takes_precedence_over_the_file(load, write):
    config = load([write("cache_latents = true\nmax_train_steps = 5"), "--no_cache_latents", "--max_train_steps=1600"])
    assert (config.cache.cache_latents, config.loop.max_train_steps) == (False, 1600)


def test_values_have_their_types(load):
    config = load(
        "--text_encoder_lr 1e-4 1e-5 --network_args conv_dim=4 algo=x --optimizer_args betas=0.9,0.999"
        " --lr_scheduler cosine --lr_warmup_steps 10% --resolution 512,768 --tokenizer a/b c/d"
    )
    assert config.optim.text_encoder_lr == (1e-4, 1e-5)
    assert config.network.network_args == {"conv_dim": 4, "algo": "x"}
    assert config.optim.optimizer_args == {"betas": (0.9, 0.999)}
    assert config.optim.lr_warmup_steps == 0.1
    assert config.buckets.resolution == (512, 768)
    assert config.model.tokenizer == ("a/b", "c/d")
    assert isinstance(config.save.output_dir, Path)


def test_a_fault_inside_a_list_is_reported(faults, codes_of):
    assert codes_of("--text_encoder_lr 1e-4 -1") == ["option-out-of-range"]
    assert faults("--text_encoder_lr 1e-4 -1")[0].startswith("--text_encoder_lr: '-1' is below 0")
    assert codes_of("--text_encoder_lr 1e-4 x") == ["option-type-wrong"]
    assert faults("--text_encoder_lr 1e-4 x")[0].startswith("--text_encoder_lr: 'x'")
    found = faults("--learning_rate nan --max_grad_norm inf")
    assert [text.partition(" is not")[0] for text in found] == ["--learning_rate: 'nan'", "--max_grad_norm: 'inf'"]


def test_all_faults_at_once(write, tmp_path):
    with pytest.raises(SeveralErrors) as raised:
        load_config(
            [
                write("nettwork_dim = 4\nseed = 'x'"), "--sed", "3", "--learning_rate", "fast",
                "--vae", str(tmp_path / "no.safetensors"), "--dim_from_weights",
                "--max_train_steps", "-1", "--save_model_as", "ckp", "--lr_scheduler", "sine",
            ]
        )  # fmt: skip
    texts = [str(error) for error in raised.value.errors]
    wanted = {
        "--sed": "option-unknown",
        "run.toml:1: nettwork_dim": "config-key-misspelled",
        "run.toml:2: seed: 'x'": "option-type-wrong",
        "--learning_rate: 'fast'": "option-type-wrong",
        "--lr_scheduler: 'sine'": "option-choice-unknown",
        "--max_train_steps: '-1'": "option-out-of-range",
        "--save_model_as: 'ckp'": "option-choice-unknown",
        "no.safetensors": "path-missing",
        "--dim_from_weights": "dim-from-weights-without-file",
        "--pretrained_model_name_or_path": "model-missing",
        "--train_data_dir": "data-missing",
        "--output_dir": "output-missing",
    }
    for part, code in wanted.items():
        assert [error.code for error in raised.value.errors if part in str(error)] == [code], part
    assert len(texts) == len(wanted)
    assert str(raised.value).startswith(f"{len(wanted)} problems, listed above; the first: {texts[0]}")


def test_one_fault_is_not_reported_twice(tmp_path):
    """A misspelt or mistyped option is not called missing, too."""
    argv = ["--pretrained_model_name_or_pathh", "a/b", "--train_data_dirr", str(tmp_path), "--output_dirr", "x"]
    with pytest.raises(SeveralErrors) as raised:
        load_config([*argv, "--resolution", "big"])
    assert len(raised.value.errors) == 4


def test_an_option_that_the_script_does_not_have(faults, codes_of, load, write):
    absent = {"clip_l": "it belongs to another script", "seed": "no dice", "method": "the name says it"}
    argv = ["--clip_l", "x", write("method = 'full'")]
    assert codes_of(argv, absent=absent) == ["option-of-another-script"] * 2
    first, second = faults(argv, absent=absent)
    assert first.startswith("--clip_l ")
    assert first.endswith("it belongs to another script")
    assert second.startswith("run.toml:1: method ")
    assert second.endswith("the name says it")
    config = load(write("clip_l = 'x'\nseed = 7"), absent=absent)  # one file for several scripts
    assert (config.model.clip_l, config.loop.seed) == (None, None)
    assert config.notes == ("run.toml: ignored, of other scripts: clip_l, seed",)


def test_what_includes_what(load):
    config = load("--cache_latents_to_disk --cache_text_encoder_outputs_to_disk")
    assert config.cache.cache_latents
    assert config.cache.cache_text_encoder_outputs
    assert config.source("cache_latents") == "--cache_latents_to_disk"


def test_sampling_periods_below_one_are_noted_and_ignored(load):
    config = load("--sample_every_n_steps 0 --sample_every_n_epochs -1")
    assert config.samples.sample_every_n_steps is config.samples.sample_every_n_epochs is None
    assert len(config.notes) == 2


def test_no_effect_is_a_note_or_with_strict_an_error(load, codes_of):
    (note,) = load(
        "--sdpa --ddp_gradient_as_bucket_view --ddp_static_graph --save_last_n_steps 5"
    ).notes  # one line, by reason
    assert note.startswith("no effect in this run:")
    assert all(
        words in note
        for words in ("--sdpa (", "--ddp_gradient_as_bucket_view, --ddp_static_graph (", "--save_last_n_steps (")
    )
    assert codes_of("--sdpa --strict") == ["option-without-effect"]
    assert codes_of("--save_last_n_steps 5 --strict") == ["keep-steps-unused"]
    assert not codes_of("--strict --seed 1 --seed 2")


SECRET = "canary-3f9a"


@pytest.mark.parametrize("name", [name for name, option in vocabulary().items() if option.secret])
def test_secrets_are_nowhere(load, faults, write, name):
    """On the command line, in the file, misspelt, of the wrong type or with too many words: the value is not shown."""
    for argv in ([f"--{name}", SECRET], [f"--{name}={SECRET}"], [write(f"{name} = '{SECRET}'")]):
        assert SECRET not in " ".join([*faults(argv), *load(argv).notes])
    for argv in (
        [f"--{name}", "x", SECRET],
        [f"--{name}x", SECRET],
        [f"--{name}", SECRET, SECRET],
        [write(f"{name}x = '{SECRET}'")],
        [write(f"{name} = {SECRET}")],
    ):
        found = faults(argv)
        assert found
        assert SECRET not in " ".join(found)
    for argv in ([f"--{name[:-2]}", SECRET], [write(f"{name} = ['{SECRET}', '{SECRET}']")], [write(f"{name} = 12345")]):
        found = [*faults(argv), *(load(argv).notes if not faults(argv) else ())]
        assert found
        assert not {SECRET, "12345"} & set(re.findall(r"[\w-]+", " ".join(found)))


def test_secrets_are_not_in_the_repr():
    config = Config.model_validate({"hub": {"huggingface_token": SECRET}, "log": {"wandb_api_key": SECRET}})
    assert SECRET not in repr(config) + str(config) + str(config.model_dump()) + config.model_dump_json()
    assert config.log.wandb_api_key is not None
    assert config.log.wandb_api_key.get_secret_value() == SECRET


def test_a_secret_on_the_command_line_is_warned_about(load, write):
    assert load([write(f"wandb_api_key = '{SECRET}'"), "--log_with", "wandb"]).notes == ()
    (note,) = load(f"--wandb_api_key {SECRET} --log_with wandb").notes
    assert "--wandb_api_key is on the command line" in note
    assert SECRET not in note


def test_paths(faults, load, tmp_path, monkeypatch):
    (tmp_path / "weights.safetensors").touch()
    wrong, right = tmp_path / "weight.safetensors", tmp_path / "weights.safetensors"
    assert faults(f"--network_weights {wrong}") == [
        f"--network_weights: {wrong} does not exist — did you mean {right}?",
    ]
    assert faults(f"--sample_prompts {tmp_path} --sample_at_first")[0].endswith("is a folder, not a file")
    assert load(f"--network_weights {tmp_path}").network.network_weights == tmp_path  # of PEFT or diffusers
    assert faults(f"--reg_data_dir {tmp_path / 'weights.safetensors'}")[0].endswith("is a file, not a folder")
    assert "the folder nowhere does not exist either" in faults("--sample_prompts nowhere/p.txt --sample_at_first")[0]
    assert load("--vae owner/name").model.vae == "owner/name"
    for missing in (
        "./owner/name",
        "name",
        "a/b/c",
        "owner/name.safetensors",
        "/owner/name",
        "C:\\x\\y",
        "owner/name/",
    ):
        assert "does not exist" in faults(["--vae", missing])[0]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("--network_weights ~/weights.safetensors").network.network_weights == tmp_path / "weights.safetensors"


def test_torch_is_not_imported():
    program = (
        "import sys; from sfumato.config import load_config; from sfumato.errors import UserError\n"
        "try: load_config(['--seed', 'x'])\n"
        "except UserError: pass\n"
        "sys.exit(str(sorted({'torch', 'diffusers', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)) or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True
    )
    assert (done.stderr.strip(), done.returncode) == ("", 1)


def test_a_config_pickles_and_compares(load):
    config = load("--network_args a=1 --seed 1")
    assert pickle.loads(pickle.dumps(config)) == config != load("--seed 1")


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_given(load, name):
    config = load([f"--output_name={name}"])
    assert (config.save.output_name, config.source("output_name")) == ("last", "default")
    assert any("--output_name is empty" in note for note in config.notes)


@pytest.mark.parametrize("option", ["seed=99999999999999999999999", "validation_seed=18446744073709551616"])
def test_a_seed_beyond_64_bits_is_refused(codes_of, option):
    assert codes_of(f"--{option}") == ["option-value-malformed"]


@pytest.mark.parametrize("path", ["../escaped", "/tmp/escaped", "a/b/escaped", "a/escaped/", " escaped", "escaped/"])
def test_of_a_name_that_is_a_path_the_last_part_counts(load, path):
    config = load([f"--output_name={path}"])
    assert config.save.output_name == "escaped"
    assert any("--output_name" in note for note in config.notes)


@pytest.mark.parametrize("name", ["..", "a/..", "x" * 300, "a\nb"])
def test_what_no_file_can_be_called_is_refused(codes_of, name):
    assert codes_of([f"--output_name={name}"]) == ["option-value-malformed"]


@pytest.mark.parametrize("name", ["network_dim", "max_train_steps", "train_batch_size", "max_timestep", "keep_tokens"])
@pytest.mark.parametrize("number", ["100000000000000000000", "9223372036854775808", "1e30"])
def test_a_number_beyond_64_bits_is_refused(codes_of, write, name, number):
    wrong = {"option-beyond-64-bits", "option-out-of-range", "option-type-wrong"}
    for option in (f"--{name}={number}", write(f"{name} = {number}"), write(f"{name} = '{number}'")):
        (code,) = codes_of(option)
        assert code in wrong
    assert codes_of(f"--network_dim={'9' * 5000}") == ["option-type-wrong"]


def test_of_an_argument_given_twice_the_last_counts(load, write, codes_of):
    twice = ["conv_dim=4", "conv_dim=8", "conv_alpha=1"]
    for argv in (["--network_args", *twice], [write(f"network_args = {twice}")]):
        config = load(argv)
        assert config.network.network_args == {"conv_dim": 8, "conv_alpha": 1}
        (note,) = config.notes
        assert "network_args conv_dim" in note
        assert codes_of([*argv, "--strict"]) == ["refused-by-strict"]
