"""What a configuration saved by the window of kohya_ss means: the options that the window starts sd-scripts with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARKS = frozenset(
    {"LoRA_type", "model_list", "max_resolution", "lr_warmup", "optimizer", "num_cpu_threads_per_process"}
)

NOT_PASSED = "not in effect with the other settings"
PROMPT_TEXTS = "prompts, where the name of their file is expected"

RENAMED = {  # key of the window -> option
    "flux1_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "flux1_cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs_to_disk",
    "flux1_clip_l": "clip_l",
    "flux1_t5xxl": "t5xxl",
    "flux_fused_backward_pass": "fused_backward_pass",
    "image_folder": "train_data_dir",
    "lora_network_weights": "network_weights",
    "max_resolution": "resolution",
    "optimizer": "optimizer_type",
    "sd3_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "sd3_cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs_to_disk",
    "sd3_clip_l": "clip_l",
    "sd3_clip_l_dropout_rate": "clip_l_dropout_rate",
    "sd3_disable_mmap_load_safetensors": "disable_mmap_load_safetensors",
    "sd3_enable_scaled_pos_embed": "enable_scaled_pos_embed",
    "sd3_fused_backward_pass": "fused_backward_pass",
    "sd3_t5_dropout_rate": "t5_dropout_rate",
    "sd3_t5xxl": "t5xxl",
    "sd3_text_encoder_batch_size": "text_encoder_batch_size",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "sdxl_no_half_vae": "no_half_vae",
}

CHECKBOXES = {  # box that names the model -> what it is called in other versions, and the keys that count with it
    "sdxl": ("sdxl_checkbox", ("sdxl_cache_text_encoder_outputs", "sdxl_no_half_vae")),
    "flux1_checkbox": (
        "",
        (
            "flux1_cache_text_encoder_outputs", "flux1_cache_text_encoder_outputs_to_disk", "flux1_clip_l",
            "flux1_t5xxl", "flux_fused_backward_pass", "ae", "apply_t5_attn_mask", "blocks_to_swap",
            "blockwise_fused_optimizers", "cpu_offload_checkpointing", "discrete_flow_shift", "double_blocks_to_swap",
            "guidance_scale", "mem_eff_save", "model_prediction_type", "single_blocks_to_swap", "split_mode",
            "t5xxl_max_token_length", "timestep_sampling",
        ),
    ),
    "sd3_checkbox": (
        "",
        (
            "sd3_cache_text_encoder_outputs", "sd3_cache_text_encoder_outputs_to_disk", "sd3_clip_l",
            "sd3_clip_l_dropout_rate", "sd3_disable_mmap_load_safetensors", "sd3_enable_scaled_pos_embed",
            "sd3_fused_backward_pass", "sd3_t5_dropout_rate", "sd3_t5xxl", "sd3_text_encoder_batch_size", "clip_g",
            "clip_g_dropout_rate", "logit_mean", "logit_std", "mode_scale", "pos_emb_random_crop_rate", "save_clip",
            "save_t5xxl", "t5xxl_device", "t5xxl_dtype", "weighting_scheme",
        ),
    ),
}  # fmt: skip
NOISE_TYPES = {  # what noise_offset_type shows -> the options that are not passed on
    "Original": ("multires_noise_iterations", "multires_noise_discount"),
    "Multires": ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale"),
}
ZERO_IS_NONE = ("seed", "max_timestep", "adaptive_noise_scale", "multires_noise_iterations")

CONVOLUTIONS = ("conv_dim", "conv_alpha")
BLOCK_ARGUMENTS = (
    "down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold", "block_dims", "block_alphas",
    "conv_block_dims", "conv_block_alphas", "rank_dropout", "module_dropout",
)  # fmt: skip
FLOW_RANKS = (
    "img_attn_dim", "img_mlp_dim", "img_mod_dim", "single_dim", "txt_attn_dim", "txt_mlp_dim", "txt_mod_dim",
    "single_mod_dim", "in_dims", "train_blocks", "train_double_block_indices", "train_single_block_indices",
    "split_qkv", "train_t5xxl",
)  # fmt: skip
NETWORKS = {  # LoRA_type -> network module, and the keys that become network_args where they say something
    "Standard": ("networks.lora", BLOCK_ARGUMENTS),
    "Kohya LoCon": ("networks.lora", (*CONVOLUTIONS, *BLOCK_ARGUMENTS)),
    "LoRA-FA": ("networks.lora_fa", BLOCK_ARGUMENTS),
    "Kohya DyLoRA": ("networks.dylora", (*CONVOLUTIONS, *BLOCK_ARGUMENTS, "unit")),
    "Flux1": ("networks.lora_flux", FLOW_RANKS),
    "Flux1 OFT": ("networks.oft_flux", ("enable_all_linear",)),
}
DROPOUTS = ("rank_dropout", "module_dropout", "rank_dropout_scale")
LYCORIS = {  # LoRA_type -> algo, and the keys that become network_args
    "LoCon": ("locon", (*CONVOLUTIONS, *DROPOUTS, "bypass_mode", "dora_wd", "use_tucker", "use_scalar", "train_norm")),
    "LoHa": ("loha", (*CONVOLUTIONS, *DROPOUTS, "bypass_mode", "dora_wd", "use_tucker", "use_scalar", "train_norm")),
    "LoKr": (
        "lokr",
        (
            *CONVOLUTIONS, *DROPOUTS, "bypass_mode", "dora_wd", "factor", "use_cp", "use_scalar", "decompose_both",
            "train_norm",
        ),
    ),
    "BOFT": ("boft", (*CONVOLUTIONS, *DROPOUTS, "use_tucker", "use_scalar", "constrain", "rescaled", "train_norm")),
    "Diag-OFT": (
        "diag-oft",
        (*CONVOLUTIONS, *DROPOUTS, "use_tucker", "use_scalar", "constrain", "rescaled", "train_norm"),
    ),
    "DyLoRA": ("dylora", (*CONVOLUTIONS, "use_tucker", "rank_dropout", "module_dropout", "train_norm")),
    "GLoRA": ("glora", (*CONVOLUTIONS, *DROPOUTS, "train_norm")),
    "iA3": ("ia3", (*CONVOLUTIONS, "train_on_input")),
    "Native Fine-Tuning": ("full", (*DROPOUTS, "use_tucker", "use_scalar", "train_norm")),
}  # fmt: skip


@dataclass(kw_only=True)
class SavedForm:
    """A saved configuration while it is read.

    rest: keys that are options by the same name, or nobody's. options: what follows from the others. origins: option
    -> the key that it follows from. unused: key without effect -> why. words: further words of the command line.
    """

    rest: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    words: str = ""

    def set(self, option: str, value: Any, key: str) -> None:
        """Set an option that a key means; the key itself is read then."""
        self.rest.pop(key, None)
        self.options[option], self.origins[option] = value, key

    def drop(self, *keys: str, why: str = NOT_PASSED) -> None:
        """Keys without effect; those that say nothing anyway need no line."""
        self.unused |= {key: why for key in keys if not is_blank(self.rest.pop(key, None))}


def is_saved_form(table: Mapping[str, Any]) -> bool:
    """Whether a table has the keys of the window: two of those that every one of its forms has."""
    return len(MARKS & table.keys()) >= 2


def read_saved_form(table: Mapping[str, Any]) -> SavedForm:
    """The options that the window would start sd-scripts with."""
    form = SavedForm(rest=dict(table))
    drop_other_models(form)
    for key, option in RENAMED.items():
        if not is_blank(form.rest.get(key)):
            form.set(option, form.rest[key], key)
        form.rest.pop(key, None)
    form.drop(*NOISE_TYPES.get(str(form.rest.get("noise_offset_type")), ()))
    for key in ZERO_IS_NONE:
        if is_blank(form.rest.get(key)):
            form.rest.pop(key, None)
    read_attention(form)
    read_network(form)
    read_length(form)
    read_metadata_file(form)
    read_sample_prompts(form)
    if form.rest.pop("use_wandb", None) is True:
        form.set("log_with", "wandb", "use_wandb")
    form.words = str(form.rest.pop("additional_parameters", "") or "").strip()
    form.rest = {key: value for key, value in form.rest.items() if value not in ("", None)}
    return form


def is_blank(value: Any) -> bool:
    """Whether the window treats a value as nothing."""
    return value in ("", "0", None, [], 0) and value is not True


def number(value: Any) -> float:
    """The number of a field; 0 for an empty one and for other texts."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def drop_other_models(form: SavedForm) -> None:
    """The window saves the fields of every model; those count whose box is checked."""
    for box, (other_name, keys) in CHECKBOXES.items():
        known = box in form.rest or other_name in form.rest
        if known and not (form.rest.get(box) or form.rest.get(other_name)):
            form.drop(*keys)


def read_attention(form: SavedForm) -> None:
    """xformers is a choice between "xformers", "sdpa" and "none"."""
    choice = form.rest.get("xformers")
    if isinstance(choice, str):
        form.rest.pop("xformers")
        if choice in ("xformers", "sdpa"):
            form.set(choice, True, "xformers")


def read_network(form: SavedForm) -> None:
    """LoRA_type stands for the network module and its arguments, and its learning rates for what trains."""
    kind = form.rest.get("LoRA_type")
    if not isinstance(kind, str):
        return
    plain = kind.removeprefix("LyCORIS/")
    if kind in NETWORKS:
        module, keys = NETWORKS[kind]
        arguments = [f"{key}={form.rest[key]}" for key in keys if says_something(form.rest.get(key))]
    elif plain in LYCORIS:
        module, (algo, keys) = "lycoris.kohya", LYCORIS[plain]
        arguments = [f"{key}={form.rest[key]}" for key in keys if key in form.rest]
        arguments += [f"preset={form.rest.get('LyCORIS_preset', 'full')}", f"algo={algo}"]
        arguments += [f"block_size={form.rest['unit']}"] if algo == "dylora" and "unit" in form.rest else []
        form.rest.pop("LyCORIS_preset", None)
    else:
        return
    form.set("network_module", module, "LoRA_type")
    for argument in arguments:
        form.rest.pop(argument.partition("=")[0], None)
    if arguments:
        form.set("network_args", arguments, "LoRA_type")
    read_learning_rates(form)


def says_something(value: Any) -> bool:
    return not is_blank(value) and value not in ("all", False)


def read_learning_rates(form: SavedForm) -> None:
    """A learning rate of 0 of one part freezes it; of both parts, learning_rate is that of all."""
    text, unet = form.rest.get("text_encoder_lr"), number(form.rest.get("unet_lr"))
    second = number(form.rest.get("t5xxl_lr"))
    has_text = bool(second or (any(map(number, text)) if isinstance(text, list) else number(text)))
    for key, value in (("text_encoder_lr", has_text), ("unet_lr", unet)):
        if not value:
            form.rest.pop(key, None)
    if second and not isinstance(text, list):
        form.set("text_encoder_lr", [number(text), second], "t5xxl_lr")
        form.rest.pop("text_encoder_lr", None)
    if has_text or unet:
        form.drop("learning_rate")
    if unet and not has_text:
        form.set("network_train_unet_only", True, "text_encoder_lr")
    if has_text and not unet:
        form.set("network_train_text_encoder_only", True, "unet_lr")


def read_length(form: SavedForm) -> None:
    """epoch counts where neither steps nor epochs are given; warmup and stop are percentages of all steps."""
    rest, epochs = form.rest, number(form.rest.get("epoch"))
    steps = number(rest.get("max_train_steps"))
    if epochs and not steps and is_blank(rest.get("max_train_epochs")) and is_blank(rest.get("dataset_config")):
        form.set("max_train_epochs", int(epochs), "epoch")
        rest.pop("max_train_epochs", None)
    if epochs and rest.get("lr_scheduler_num_cycles") == "":
        form.set("lr_scheduler_num_cycles", int(epochs), "lr_scheduler_num_cycles")
    warmup = number(rest.pop("lr_warmup", None))
    if warmup and is_blank(rest.get("lr_warmup_steps")):
        form.set("lr_warmup_steps", f"{warmup:g}%", "lr_warmup")
        rest.pop("lr_warmup_steps", None)
    share = number(rest.get("stop_text_encoder_training"))
    if "LoRA_type" in form.origins.values():
        form.drop("stop_text_encoder_training")
    elif share > 0 and steps:
        stop = math.ceil(steps / 100 * share)
        form.set("stop_text_encoder_training", stop, "stop_text_encoder_training")


def read_metadata_file(form: SavedForm) -> None:
    """The window writes the metadata of full training into a folder of its own, before or after latents are cached."""
    rest = form.rest
    if "train_dir" not in rest:
        return
    cached = rest.get("use_latent_files") != "No"
    name = rest.get("latent_metadata_filename" if cached else "caption_metadata_filename")
    folder = rest["train_dir"]
    if not is_blank(name) and not is_blank(folder):
        form.set("in_json", f"{folder}/{name}", "train_dir")


def read_sample_prompts(form: SavedForm) -> None:
    """The field holds the prompts themselves; the window writes their file when it starts."""
    prompts = form.rest.get("sample_prompts")
    if isinstance(prompts, str) and not is_blank(prompts) and (len(prompts) > 255 or not Path(prompts).is_file()):
        form.drop("sample_prompts", why=PROMPT_TEXTS)
