"""The vocabulary against the options of sd-scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfumato.common.names import OPTION_ALIASES
from sfumato.config.schema import THEMES, Config, vocabulary

GOLDENS = Path(__file__).parents[1] / "goldens"
KINDS = ("lllite", "control_net", "inversion", "full", "network")
LLLITE, CONTROL, INVERSION, FULL, NETWORK = (
    json.loads((GOLDENS / f"{kind}_script_options.json").read_text()) for kind in KINDS
)
THEIR_OPTIONS = (
    LLLITE | CONTROL | INVERSION | FULL | NETWORK
)  # where both have an option, they agree but for what stands below
OURS = {
    "skip_image_resolution", "train_inpainting", "checkpoint_every",
    "family", "method", "preset", "show_timesteps", "show_timesteps_resolution", "show_timesteps_offset",
    "tokenizer", "cache_dir", "on_missing_caption", "on_bad_image", "prompt_weighting",
    "strict",
    "lllite_version", "lllite_target_layers", "lllite_cond_dim", "lllite_cond_resblocks", "lllite_use_aspp",
    "lllite_cond_in_channels", "lllite_inpaint_masked_input", "lllite_multiplier",
    "lllite_cond_input", "debug", "emb_normalize_mode", "add_system_prompt_to_negative_prompt",
    "soft_min_snr_gamma", "p2_gamma", "p2_k", "max_bad_steps", "plan", "plot_timesteps", "profile", "report",
    "text_cache_variants", "cached_encoder", "save_best", "preserve_reg_images", "masked_prior_preservation_weight",
    "timestep_stratified", "extract_lora_at_end", "save_at_steps", "save_at_epochs",
    "ema_decay", "ema_sigma_rel", "ema_on_cpu", "evaluate_with_ema",
    "stochastic_rounding", "uncertainty_weighting", "uncertainty_lr",
    "compile", "compile_backend", "compile_mode", "compile_dynamic", "compile_fullgraph", "compile_cache_size_limit",
    "fp8_scaled", "int8_base", "nf4_base", "fp8_compute", "int8_compute", "rotate_inputs",
    "text_encoder_blocks_to_swap", "attention", "stream_blocks",
    "frozen_lora", "dry_run", "memory_check", "reference_data_dirs", "reference_dropout_rate",
    "embedding_lr",
    "fsdp", "fsdp_offload_params",
    "prompts_file", "max_denoising_steps", "leco_denoise_guidance_scale",  # of a later release of sd-scripts
}  # fmt: skip

# Where a default differs on purpose: None where the scripts disagree (each script sets its own) or the family knows
# better, a name that the scripts fill in later.
OTHER_DEFAULTS = {
    "output_name": "last", "text_encoder_lr": None, "save_model_as": None, "model_type": None, "guidance_scale": None,
}  # fmt: skip
BY_SCRIPT = {"t5xxl_max_token_length", "timestep_sampling", "model_prediction_type", "discrete_flow_shift"} | {
    "control_net_lr"
}
SEVERAL_HERE = {"token_string", "init_word", "num_vectors_per_token", "weights"}  # lists, where they take one value
MORE_CHOICES = {
    "resize_interpolation": {"box"}, "save_model_as": {"diffusers", "diffusers_safetensors"},
    "model_type": {"flux_kontext"},
}  # fmt: skip


def test_every_option_of_the_scripts_is_known():
    assert set(THEIR_OPTIONS) - set(OPTION_ALIASES) <= set(vocabulary())


def test_what_is_beyond_them_is_ours():
    assert set(vocabulary()) - set(THEIR_OPTIONS) == OURS


def test_old_spellings_are_aliases_of_options():
    assert set(OPTION_ALIASES) <= {
        *THEIR_OPTIONS,
        "lllite_cond_emb_dim",
        "lllite_mlp_dim",
        "lllite_dropout",
    }  # which are newer
    assert set(OPTION_ALIASES.values()) <= set(vocabulary())


@pytest.mark.parametrize("name", sorted(set(THEIR_OPTIONS) - set(OPTION_ALIASES)))
def test_default_choices_and_number_of_values(name):
    theirs, ours = THEIR_OPTIONS[name], vocabulary()[name]
    if name in BY_SCRIPT:
        assert ours.default is None
    elif name in OTHER_DEFAULTS:
        assert ours.default == OTHER_DEFAULTS[name]
    elif theirs["default"] is None:
        assert ours.default in (None, (), {})
    else:
        assert ours.default == ((theirs["default"],) if name in SEVERAL_HERE else theirs["default"])
        assert isinstance(ours.default, bool) == isinstance(theirs["default"], bool)
    assert {0: "flag", "*": "many", None: "many" if name in SEVERAL_HERE else "one"}[theirs["nargs"]] == ours.arity
    if ours.choices and name != "lr_scheduler":
        assert set(ours.choices) - MORE_CHOICES.get(name, set()) == choices(theirs["choices"])


def test_scripts_of_both_kinds_mean_the_same():
    differ = {n for n in FULL.keys() & NETWORK.keys() if not alike(FULL[n]["default"], NETWORK[n]["default"])}
    assert differ == {"save_model_as"}
    assert choices(FULL["save_model_as"]["choices"]) - {"ckpt", "safetensors"} == MORE_CHOICES["save_model_as"]


def alike(full, network) -> bool:
    fulls, networks = (
        set(given["by script"].values()) if isinstance(given, dict) else {given} for given in (full, network)
    )
    return fulls <= networks


def choices(given) -> set[str]:
    lists = given["by script"].values() if isinstance(given, dict) else [given]
    every: set[str] = set()
    for some in lists:
        every |= {str(choice) for choice in some if choice is not None}
    return every


def test_every_option_explains_itself():
    for option in vocabulary().values():
        assert 5 < len(option.help) < 120, option.name
        assert not option.help.endswith("."), option.name
        assert option.arity == "flag" or option.metavar, option.name


def test_every_default_is_a_value_that_its_type_accepts():
    for theme, options in THEMES.items():
        built = options()
        given = {name: getattr(built, name) for name in options.model_fields}
        assert options.model_validate(given) == built, theme


def test_the_themes_are_the_attributes():
    assert list(Config.model_fields) == [*THEMES, "sources", "notes"]
    config = Config()
    assert all(type(getattr(config, theme)) is options for theme, options in THEMES.items())


def test_a_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().loop.seed = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="frozen"):
        Config().notes = ()  # pyright: ignore[reportAttributeAccessIssue]
