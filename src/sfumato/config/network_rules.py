"""Rules between the options of what is trained: an adapter or the full model."""

from __future__ import annotations

from sfumato.config.network import FullOptions, LLLiteOptions, NetworkOptions
from sfumato.config.option_rule import OptionRule
from sfumato.config.schema import Config

TEXT_ENCODER_LRS = ("learning_rate_te", "learning_rate_te1", "learning_rate_te2", "learning_rate_te3")
TEXT_ENCODER_OPTIONS = (*TEXT_ENCODER_LRS, "text_encoder_lr", "stop_text_encoder_training")
DIFFUSERS_FORMATS = ("diffusers", "diffusers_safetensors")


def is_full(config: Config) -> bool:
    return config.run.method == "full"


LLLITE_OPTIONS = ("network_dim", "network_dropout", "network_weights")  # beside its own
ADAPTER_OPTIONS = tuple(NetworkOptions.model_fields)
OTHER_ADAPTER_OPTIONS = tuple(name for name in ADAPTER_OPTIONS if name not in LLLITE_OPTIONS)


def lists_adapter_options(config: Config) -> bool:
    """Whether options of adapters are given in a run that trains none."""
    if config.run.method not in ("full", "control_net", "lllite"):
        return False
    return config.is_changed(*(OTHER_ADAPTER_OPTIONS if config.run.method == "lllite" else ADAPTER_OPTIONS))


def trains_control_net(config: Config) -> bool:
    return config.run.method == "control_net"


_CONFLICTS = (
    OptionRule(
        code="train-only-conflict",
        severity="conflict",
        options=("network_train_unet_only", "network_train_text_encoder_only"),
        is_broken=lambda c: c.network.network_train_unet_only and c.network.network_train_text_encoder_only,
        what="--network_train_unet_only and --network_train_text_encoder_only together train nothing",
        fix="give at most one of them",
    ),
    OptionRule(
        code="dim-from-weights-without-file",
        severity="conflict",
        options=("dim_from_weights", "network_weights"),
        is_broken=lambda c: c.network.dim_from_weights and c.network.network_weights is None,
        what="--dim_from_weights has no file to read ranks from",
        fix="give --network_weights",
    ),
    OptionRule(
        code="ggpo-with-fused-backward",
        severity="conflict",
        options=("network_args", "fused_backward_pass", "fused_optimizer_groups", "blockwise_fused_optimizers"),
        is_broken=lambda c: c.optim.fuses_backward and any(name.startswith("ggpo_") for name in c.network.network_args),
        what="--network_args ggpo_sigma and ggpo_beta measure gradients after a step, and the fused backward pass "
        "keeps none",
        fix="remove the fused option, or ggpo_sigma and ggpo_beta",
    ),
    OptionRule(
        code="lora-plus-with-single-lr",
        severity="conflict",
        options=("network_args", "optimizer_type", "optimizer_args", "use_8bit_adam", "use_lion_optimizer"),
        is_broken=lambda c: (
            any(name.startswith("loraplus_") for name in c.network.network_args)
            and (c.optim.estimates_lr or c.optim.relative_step)
        ),
        what="LoRA+ needs several learning rates, but D-Adaptation, Prodigy and AdaFactor's relative_step set a "
        "single one",
        fix="remove --network_args loraplus_..., or use another optimizer",
    ),
    OptionRule(
        code="base-weights-multiplier-count",
        severity="conflict",
        options=("base_weights", "base_weights_multiplier"),
        is_broken=lambda c: len(c.network.base_weights_multiplier) > len(c.network.base_weights),
        what="--base_weights_multiplier has more values than --base_weights has files",
        fix="give at most one value for each file; missing ones are 1",
    ),
    OptionRule(
        code="adapter-as-folder",
        severity="conflict",
        options=("save_model_as", "method"),
        is_broken=lambda c: not is_full(c) and not trains_control_net(c) and c.save.save_model_as in DIFFUSERS_FORMATS,
        what="--save_model_as diffusers saves a network as a folder, but none is trained",
        fix="give --save_model_as safetensors",
    ),
    OptionRule(
        code="extract-without-full-training",
        severity="conflict",
        options=("extract_lora_at_end", "method"),
        is_broken=lambda c: not is_full(c) and c.save.extract_lora_at_end is not None,
        what="--extract_lora_at_end makes a LoRA of a model that was trained whole, but none is",
        fix="remove it, or give --method full",
    ),
    OptionRule(
        code="adapter-options-in-full-training",
        severity="conflict",
        options=("method", *ADAPTER_OPTIONS),
        is_broken=lists_adapter_options,
        what="--network_... and the other adapter options cannot be combined with a --method that trains no adapter "
        "(LLLite has --network_dim, --network_dropout and --network_weights)",
        fix="remove them, or give --method adapter",
    ),
    OptionRule(
        code="text-encoder-lr-twice",
        severity="conflict",
        options=("text_encoder_lr", *TEXT_ENCODER_LRS),
        is_broken=lambda c: is_full(c) and c.is_changed("text_encoder_lr") and c.is_changed(*TEXT_ENCODER_LRS),
        what="--text_encoder_lr and --learning_rate_te... set the same learning rates",
        fix="give one of them",
    ),
    OptionRule(
        code="block-lr-with-unet-lr",
        severity="conflict",
        options=("block_lr", "unet_lr", "learning_rate"),
        is_broken=lambda c: (
            c.optim.block_lr is not None and (c.optim.unet_lr is not None or c.optim.learning_rate == 0)
        ),
        what="--block_lr sets the denoiser's learning rates, but --unet_lr or --learning_rate 0 sets another one",
        fix="give one of them",
    ),
    OptionRule(
        code="t5-without-text-encoders",
        severity="conflict",
        options=("train_t5xxl", "train_text_encoder"),
        is_broken=lambda c: is_full(c) and c.full.train_t5xxl and not c.full.train_text_encoder,
        what="--train_t5xxl trains T5-XXL beside the other text encoders, which do not train",
        fix="give --train_text_encoder, too",
    ),
    OptionRule(
        code="captions-without-padding",
        severity="conflict",
        options=("no_token_padding",),
        is_broken=lambda c: c.full.no_token_padding,
        what="--no_token_padding trains with unpadded captions, but every program that generates images, this one "
        "included, pads prompts to 77 tokens: the model would never see inputs like those it was trained on",
        fix="remove it",
    ),
)

_UNUSED = (
    OptionRule(
        code="dim-from-weights-takes-precedence",
        severity="no effect",
        options=("dim_from_weights", "network_dim", "network_alpha"),
        is_broken=lambda c: c.network.dim_from_weights and c.is_changed("network_dim", "network_alpha"),
        what="--network_dim and --network_alpha",
        reason="--dim_from_weights takes precedence",
        fix="remove them",
    ),
    OptionRule(
        code="text-encoder-lr-unused",
        severity="no effect",
        options=("text_encoder_lr", "network_train_unet_only"),
        is_broken=lambda c: c.network.network_train_unet_only and c.is_changed("text_encoder_lr"),
        what="--text_encoder_lr",
        reason="--network_train_unet_only does not train the text encoders",
        fix="remove it",
    ),
    OptionRule(
        code="unet-lr-unused",
        severity="no effect",
        options=("unet_lr", "network_train_text_encoder_only"),
        is_broken=lambda c: c.network.network_train_text_encoder_only and c.is_changed("unet_lr"),
        what="--unet_lr",
        reason="--network_train_text_encoder_only does not train the denoiser",
        fix="remove it",
    ),
    OptionRule(
        code="full-options-in-adapter-training",
        severity="no effect",
        options=("method", *FullOptions.model_fields, *TEXT_ENCODER_LRS, "block_lr"),
        is_broken=lambda c: not is_full(c) and c.is_changed(*FullOptions.model_fields, *TEXT_ENCODER_LRS, "block_lr"),
        what="--train_text_encoder, --stop_text_encoder_training, --learning_rate_te... and --block_lr",
        reason="the model itself is not trained",
        fix="remove them; other methods have --unet_lr, --text_encoder_lr and --control_net_lr",
    ),
    OptionRule(
        code="text-encoder-not-trained",
        severity="no effect",
        options=("train_text_encoder", *TEXT_ENCODER_OPTIONS),
        is_broken=lambda c: is_full(c) and not c.full.train_text_encoder and c.is_changed(*TEXT_ENCODER_OPTIONS),
        what="--learning_rate_te..., --text_encoder_lr and --stop_text_encoder_training",
        reason="no text encoder is trained",
        fix="give --train_text_encoder",
    ),
    OptionRule(
        code="text-encoder-stopped-at-start",
        severity="no effect",
        options=("train_text_encoder", "stop_text_encoder_training"),
        is_broken=lambda c: (
            is_full(c)
            and c.full.train_text_encoder
            and not c.full.trains_text
            and (c.source("train_text_encoder") != "launcher" or c.is_changed("text_encoder_lr", *TEXT_ENCODER_LRS))
        ),
        what="the options that train text encoders",
        reason="--stop_text_encoder_training stops them before the first step",
        fix="remove one of them",
    ),
)

_CONTROL_NET = (
    OptionRule(
        code="control-net-options-unused",
        severity="no effect",
        options=("method", "control_net_lr", "controlnet_model_name_or_path"),
        is_broken=lambda c: (
            not trains_control_net(c) and c.is_changed("control_net_lr", "controlnet_model_name_or_path")
        ),
        what="--control_net_lr and --controlnet_model_name_or_path",
        reason="no ControlNet is trained",
        fix="give --method control_net, or remove them",
    ),
    OptionRule(
        code="lllite-options-unused",
        severity="no effect",
        options=("method", *LLLiteOptions.model_fields),
        is_broken=lambda c: c.run.method != "lllite" and c.is_changed(*LLLiteOptions.model_fields),
        what="--cond_emb_dim and the options of lllite_",
        reason="LLLite is not trained",
        fix="give --method lllite, or remove it",
    ),
    OptionRule(
        code="masked-input-in-latents",
        severity="conflict",
        options=("lllite_inpaint_masked_input", "lllite_cond_input"),
        is_broken=lambda c: (
            c.run.method == "lllite" and c.lllite.lllite_inpaint_masked_input and c.lllite.lllite_cond_input == "latent"
        ),
        what="--lllite_inpaint_masked_input with --lllite_cond_input latent: latents are made before there is a mask",
        fix="remove one of them",
    ),
    OptionRule(
        code="masked-input-without-mask",
        severity="no effect",
        options=("lllite_inpaint_masked_input", "lllite_cond_in_channels"),
        is_broken=lambda c: (
            c.run.method == "lllite" and c.lllite.lllite_inpaint_masked_input and c.lllite.lllite_cond_in_channels < 4
        ),
        what="--lllite_inpaint_masked_input",
        reason="LLLite reads no mask",
        fix="give --lllite_cond_in_channels 4, or remove it",
    ),
    OptionRule(
        code="learning-rate-before-control-net-lr",
        severity="no effect",
        options=("learning_rate", "control_net_lr"),
        is_broken=lambda c: (
            trains_control_net(c) and c.optim.control_net_lr is not None and c.is_changed("learning_rate")
        ),
        what="--learning_rate",
        reason="--control_net_lr takes precedence, for which this script has a default",
        fix="give --control_net_lr",
    ),
    OptionRule(
        code="other-lr-in-control-net-training",
        severity="no effect",
        options=("unet_lr", "text_encoder_lr"),
        is_broken=lambda c: c.run.takes_control and c.is_changed("unet_lr", "text_encoder_lr"),
        what="--unet_lr and --text_encoder_lr",
        reason="neither of them is trained",
        fix="give --learning_rate or --control_net_lr",
    ),
    OptionRule(
        code="masked-loss-of-control-images",
        severity="no effect",
        options=("masked_loss", "alpha_mask"),
        is_broken=lambda c: c.run.takes_control and c.images.masked_loss and not c.images.alpha_mask,
        what="--masked_loss",
        reason="conditioning_data_dir has control images, so masks are the images' alpha channels",
        fix="give --alpha_mask, or remove it",
    ),
)

NETWORK_RULES = _CONFLICTS + _UNUSED + _CONTROL_NET
