"""Every rule between options: a command line that breaks it and one that does not."""

from __future__ import annotations

import pytest

from sfumato.config.rules import RULES
from sfumato.config.schema import vocabulary

# name -> options that break it, options that are nearly the same and do not
CASES = {
    "parts": ("--network_train_unet_only --network_train_text_encoder_only", "--network_train_unet_only"),
    "dim-from-weights": ("--dim_from_weights", "--dim_from_weights --network_weights FILE"),
    "cached-color": ("--color_aug --cache_latents", "--color_aug"),
    "cached-crop": ("--random_crop --cache_latents_to_disk", "--random_crop"),
    "two-optimizers": ("--use_8bit_adam --use_lion_optimizer", "--use_8bit_adam"),
    "optimizer-twice": ("--use_lion_optimizer --optimizer_type Lion", "--optimizer_type Lion"),
    "constant-warmup": ("--lr_warmup_steps 5", "--lr_warmup_steps 5 --lr_scheduler constant_with_warmup"),
    "log-folder": ("--log_with tensorboard", "--log_with tensorboard --logging_dir logs"),
    "bucket-range": ("--min_bucket_reso 2048", "--min_bucket_reso 1024"),
    "data-twice": ("--dataset_config FILE", "--no_strict"),
    "dim-twice": (
        "--dim_from_weights --network_weights FILE --network_dim 4",
        "--dim_from_weights --network_weights FILE",
    ),
    "text-rate": ("--network_train_unet_only --text_encoder_lr 1", "--text_encoder_lr 1"),
    "denoiser-rate": ("--network_train_text_encoder_only --unet_lr 1", "--unet_lr 1"),
    "buckets-off": ("--bucket_no_upscale", "--bucket_no_upscale --enable_bucket"),
    "keep-epochs": ("--save_last_n_epochs 2", "--save_last_n_epochs 2 --save_every_n_epochs 1"),
    "keep-steps": ("--save_last_n_steps 2 --save_every_n_epochs 1", "--save_last_n_steps 2 --save_every_n_steps 1"),
    "keep-states": ("--save_last_n_steps_state 2", "--save_last_n_steps_state 2 --save_state"),
    "start-twice": ("--initial_epoch 2 --initial_step 5", "--initial_step 5"),
    "skip-nothing": ("--skip_until_initial_step", "--skip_until_initial_step --initial_step 5"),
    "samples-without-prompts": ("--sample_at_first", "--sample_at_first --sample_prompts FILE"),
    "prompts-unused": ("--sample_prompts FILE", "--sample_prompts FILE --sample_every_n_steps 5"),
    "samples-twice": (
        "--sample_prompts FILE --sample_every_n_steps 5 --sample_every_n_epochs 1",
        "--sample_prompts FILE --sample_every_n_steps 5 --sample_every_n_epochs 0",
    ),
    "no-workers": (
        "--persistent_data_loader_workers --max_data_loader_n_workers 0",
        "--persistent_data_loader_workers --max_data_loader_n_workers 1",
    ),
}
# name -> which of the base options is left out, or what replaces them
REQUIRED = {
    "model": "--pretrained_model_name_or_path",
    "data": "--train_data_dir",
    "output": "--output_dir",
    "resolution": "--resolution",
}
PLANNED = ("--color_aug", "--random_crop")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file.txt"
    path.touch()
    return str(path)


def rule(name: str):
    return next(rule for rule in RULES if rule.name == name)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_told_when_broken_and_only_then(name, load, faults, file):
    broken, fine = (words.replace("FILE", file) for words in CASES[name])
    if rule(name).kind == "conflict":
        told = [text for text in faults(broken) if "not available yet" not in text]
        assert told == [f"{rule(name).what} — {rule(name).fix}"] or any(word in broken for word in PLANNED)
        assert not any(rule(name).what in text for text in faults(fine))
    else:
        assert load(broken).notes == (f"{rule(name).what} ({rule(name).fix})",)
        assert not any(rule(name).what in note for note in load(fine).notes)
        assert f"{rule(name).what} — {rule(name).fix}" in faults(f"{broken} --strict")


@pytest.mark.parametrize("name", ["cached-color", "cached-crop"])
def test_rules_of_options_to_come(name, load, faults, monkeypatch):
    monkeypatch.setattr("sfumato.config.base.Option.room", lambda option, value: "")
    broken, fine = CASES[name]
    assert faults(broken) == [f"{rule(name).what} — {rule(name).fix}"]
    assert not load(fine).notes


@pytest.mark.parametrize("name", REQUIRED)
def test_what_is_required(name, base, faults):
    base[:] = [word for word in base if not word.startswith(REQUIRED[name])]
    assert faults() == [f"{rule(name).what} — {rule(name).fix}"]


def test_every_rule_has_its_case_and_names_real_options():
    assert {rule.name for rule in RULES} == {*CASES, *REQUIRED}
    assert len({rule.name for rule in RULES}) == len(RULES)
    for each in RULES:
        assert set(each.options) <= set(vocabulary())


def test_epochs_go_before_steps_without_a_word(load):
    assert load("--max_train_epochs 3 --max_train_steps 10 --strict").notes == ()
