"""Configurations in JSON: same keys, same rule; what the window of kohya_ss saves means what it starts."""

from __future__ import annotations

import json

import pytest

# The fields of a saved form, with the values that the window has of itself.
FORM = {
    "LoRA_type": "Standard", "LyCORIS_preset": "full", "adaptive_noise_scale": 0, "additional_parameters": "",
    "ae": "", "block_dims": "", "bucket_no_upscale": True, "cache_latents": True, "caption_extension": ".txt",
    "clip_skip": 1, "conv_alpha": 1, "conv_dim": 1, "dataset_config": "", "dynamo_backend": "no",
    "dynamo_mode": "default", "enable_bucket": True, "epoch": 3, "factor": -1, "flip_aug": False,
    "flux1_cache_text_encoder_outputs": True, "flux1_checkbox": False, "gpu_ids": "", "guidance_scale": 3.5,
    "keep_tokens": "0", "learning_rate": 0.0001, "lr_scheduler": "cosine", "lr_scheduler_args": "", "lr_warmup": 10,
    "max_data_loader_n_workers": "0", "max_resolution": "512,640", "max_token_length": "75", "max_train_epochs": "",
    "max_train_steps": "", "min_snr_gamma": 0, "model_list": "custom", "module_dropout": 0.1,
    "multires_noise_discount": 0.3, "multires_noise_iterations": 8, "network_alpha": 1, "network_dim": 8,
    "noise_offset": 0.05, "noise_offset_type": "Original", "num_cpu_threads_per_process": 2, "optimizer": "Lion",
    "optimizer_args": "weight_decay=0.1 betas=0.9,0.99", "rank_dropout": 0, "reg_data_dir": "", "sample_prompts": "",
    "sdxl": False, "sdxl_no_half_vae": True, "seed": 0, "stop_text_encoder_training": 0, "text_encoder_lr": 5e-05,
    "train_batch_size": 2, "train_on_input": True, "unet_lr": 0.0001, "unit": 1, "use_wandb": False, "vae": "",
    "vae_batch_size": 0, "xformers": "sdpa",
}  # fmt: skip


@pytest.fixture
def save(tmp_path):
    """Save a form with some other fields, None to remove one; gives the option that names the file."""

    def save(**more) -> str:
        fields = {key: value for key, value in (FORM | more).items() if value is not None}
        (tmp_path / "form.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
        return f"--config_file={tmp_path / 'form.json'}"

    return save


def test_a_file_of_options(load, tmp_path):
    (tmp_path / "run.json").write_text('{"seed": 3, "train": {"network_dim": "16", "vae": null}, "epoch": 2}')
    for name in ("run.json", "run"):  # the ending is found
        config = load(f"--config_file {tmp_path / name}")
        assert (config.loop.seed, config.network.network_dim, config.source("vae")) == (3, 16, "default")
        assert config.source("seed") == "run.json"
    (tmp_path / "run.toml").write_text("seed = 4")
    assert load(f"--config_file {tmp_path / 'run'}").loop.seed == 4


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ('{"seed": 1,\n "network_dmi": 8}', "config-key-misspelled", "run.json:2: network_dmi"),
        ('{"seed": 1,\n "seed": 2}', "config-key-given-twice", "run.json:2: seed"),
        ('{"a": {"network_dim": 1},\n "seed": "x"}', "option-type-wrong", "run.json:2: seed: 'x'"),
        ('{"seed": 1,}', "config-file-invalid-json", "remove the comma"),
        ("{'seed': 1}", "config-file-invalid-json", "double quotes"),
        ('{"cache_latents": True}', "config-file-invalid-json", "lower case"),
        ('{"vae": "C:\\models"}', "config-file-invalid-json", "backslash"),
        ("", "config-file-invalid-json", "line 1"),
        ('["seed"]', "config-file-no-object", "object"),
        ('{"a": ' * 100_000, "config-file-invalid-json", "nested"),
        ('{"learning_rate": NaN}', "option-type-wrong", "run.json:1: learning_rate"),
        ('{"a": {"b": {"seed": 1}}}', "config-section-nested", "run.json:1: b "),
    ],
)
def test_faults_name_file_line_and_fix(faults, codes_of, tmp_path, text, code, words):
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    assert codes_of(f"--config_file {tmp_path / 'run.json'}") == [code]
    assert words in faults(f"--config_file {tmp_path / 'run.json'}")[0]


def test_options_are_not_written_into_a_json_file(codes_of, tmp_path):
    from sfumato.config import load_config
    from sfumato.config.write import write_config
    from sfumato.errors import UserError

    config = load_config([f"--config_file={tmp_path / 'run.json'}", "--output_config"])
    with pytest.raises(UserError) as raised:
        write_config(config)
    assert raised.value.code == "config-written-as-toml"
    assert not list(tmp_path.glob("run*"))


def test_the_fields_of_a_saved_form(load, save):
    config = load(["--no_report", save()])
    values = {
        "resolution": (512, 512), "optimizer_type": "Lion", "network_module": "networks.lora", "network_dim": 8,
        "optimizer_args": {"weight_decay": 0.1, "betas": (0.9, 0.99)}, "network_args": {"module_dropout": 0.1},
        "text_encoder_lr": (5e-05,), "unet_lr": 1e-4, "max_train_epochs": 3, "lr_warmup_steps": 0.1,
        "noise_offset": 0.05, "multires_noise_iterations": None, "sdpa": True, "xformers": False, "seed": None,
        "no_half_vae": False, "guidance_scale": None, "cache_text_encoder_outputs": False, "min_snr_gamma": None,
        "max_data_loader_n_workers": 0, "keep_tokens": 0, "max_token_length": None, "train_batch_size": 2,
    }  # fmt: skip
    assert {name: config.value(name) for name in values} == values  # --resolution is on the command line, too
    assert config.sources["optimizer_type"] == "form.json"


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"text_encoder_lr": 0}, {"network_train_unet_only": True, "text_encoder_lr": None, "unet_lr": 1e-4}),
        ({"unet_lr": ""}, {"network_train_text_encoder_only": True, "unet_lr": None}),
        ({"text_encoder_lr": 0, "unet_lr": 0}, {"network_train_unet_only": False, "learning_rate": 1e-4}),
        ({"t5xxl_lr": 1e-5}, {"text_encoder_lr": (5e-05, 1e-5)}),
        ({"noise_offset_type": "Multires"}, {"noise_offset": None, "multires_noise_iterations": 8}),
        ({"noise_offset_type": None}, {"noise_offset": 0.05, "multires_noise_iterations": 8}),
        ({"max_train_steps": 100}, {"max_train_epochs": None, "max_train_steps": 100}),
        ({"max_train_epochs": 5}, {"max_train_epochs": 5}),
        ({"lr_warmup": 0}, {"lr_warmup_steps": 0}),
        ({"lr_warmup": 10, "lr_warmup_steps": 50}, {"lr_warmup_steps": 50}),
        ({"lr_warmup": "100"}, {"lr_warmup_steps": 1.0}),
        ({"xformers": "xformers"}, {"xformers": True, "sdpa": False}),
        ({"xformers": "none"}, {"xformers": False, "sdpa": False}),
        ({"xformers": True}, {"xformers": True}),
        ({"LoRA_type": "Kohya LoCon", "module_dropout": 0}, {"network_args": {"conv_dim": 1, "conv_alpha": 1}}),
        (
            {"LoRA_type": "Flux1", "flux1_checkbox": True, "train_blocks": "single"},
            {"network_module": "networks.lora_flux", "network_args": {"train_blocks": "single"}, "guidance_scale": 3.5},
        ),
        ({"sdxl": True}, {"no_half_vae": True}),
        ({"sdxl": None, "sdxl_checkbox": True}, {"no_half_vae": True}),
        ({"seed": "1234"}, {"seed": 1234}),
        ({"use_wandb": True}, {"log_with": "wandb"}),
        ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": ""}, {"lr_scheduler_num_cycles": 3}),
        ({"stop_text_encoder_training": 50, "max_train_steps": 30}, {"stop_text_encoder_training": None}),
        (
            {"LoRA_type": None, "stop_text_encoder_training": 50, "max_train_steps": 31},
            {"stop_text_encoder_training": 16, "network_module": None},
        ),
        ({"sample_prompts": "a cat --w 512"}, {"sample_prompts": None}),
    ],
)  # fmt: skip
def test_what_fields_mean_together(load, save, fields, values):
    config = load(save(**fields))
    assert {name: config.value(name) for name in values} == values


def test_fields_without_effect_are_named(load, save):
    note = load(save(sample_prompts="a cat", text_encoder_lr=0)).notes[0]
    assert note.startswith("form.json:")
    for words in (
        "multires_noise_iterations",
        "sample_prompts",
        "text_encoder_lr is network_train_unet_only",
        "conv_dim",
    ):
        assert words in note


def test_words_for_the_command_line_are_refused(codes_of, faults, save):
    option = save(additional_parameters="--min_snr_gamma 5")
    assert codes_of(option) == ["config-key-with-words"]
    assert "form.json:5: additional_parameters" in faults(option)[0]


def test_every_kind_of_network_has_a_module(load, codes_of, save):
    kinds = {"LyCORIS/BOFT": "boft", "LyCORIS/Diag-OFT": "diag-oft"}
    for kind, algo in kinds.items():
        assert load(save(LoRA_type=kind)).network.network_args["algo"] == algo
    assert load(save(LoRA_type="Kohya DyLoRA")).network.network_module == "networks.dylora"
