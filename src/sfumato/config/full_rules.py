"""Rules between the options of full training and others, as data."""

from __future__ import annotations

from sfumato.config.full import FullOptions
from sfumato.config.network import NetworkOptions
from sfumato.config.rule import Rule
from sfumato.config.schema import Config

OWN_RATES = ("learning_rate_te", "learning_rate_te1", "learning_rate_te2")
TEXT = (*OWN_RATES, "text_encoder_lr", "stop_text_encoder_training")
FOLDERS = ("diffusers", "diffusers_safetensors")


def full(config: Config) -> bool:
    return config.run.method == "full"


FULL_RULES = (
    Rule(
        name="adapter-options-full",
        kind="conflict",
        options=("method", *NetworkOptions.model_fields),
        broken=lambda c: full(c) and c.changed(*NetworkOptions.model_fields),
        what="--network_... and the other options of adapters do not go with --method full, which adds no adapter",
        fix="leave them out, or --method adapter",
    ),
    Rule(
        name="full-options-adapter",
        kind="no effect",
        options=("method", *FullOptions.model_fields, *OWN_RATES, "block_lr"),
        broken=lambda c: c.run.method == "adapter" and c.changed(*FullOptions.model_fields, *OWN_RATES, "block_lr"),
        what="--train_text_encoder, --stop_text_encoder_training, --learning_rate_te... and --block_lr have no effect: "
        "an adapter is trained",
        fix="leave them out; an adapter's rates are --unet_lr and --text_encoder_lr",
    ),
    Rule(
        name="text-rates-twice",
        kind="conflict",
        options=("text_encoder_lr", *OWN_RATES),
        broken=lambda c: full(c) and c.changed("text_encoder_lr") and c.changed(*OWN_RATES),
        what="--text_encoder_lr and --learning_rate_te... are two spellings of the same rates",
        fix="give one of them",
    ),
    Rule(
        name="text-still",
        kind="no effect",
        options=("train_text_encoder", *TEXT),
        broken=lambda c: full(c) and not c.full.train_text_encoder and c.changed(*TEXT),
        what="--learning_rate_te..., --text_encoder_lr and --stop_text_encoder_training have no effect: "
        "no text encoder trains",
        fix="give --train_text_encoder",
    ),
    Rule(
        name="text-never",
        kind="no effect",
        options=("train_text_encoder", "stop_text_encoder_training"),
        broken=lambda c: (
            full(c)
            and c.full.train_text_encoder
            and not c.full.trains_text
            and (c.source("train_text_encoder") != "launcher" or c.changed("text_encoder_lr", *OWN_RATES))
        ),
        what="--stop_text_encoder_training leaves no step to train text encoders in, so what is asked of them has no "
        "effect",
        fix="leave one of them out",
    ),
    Rule(
        name="block-rates-twice",
        kind="conflict",
        options=("block_lr", "unet_lr", "learning_rate"),
        broken=lambda c: c.optim.block_lr is not None and (c.optim.unet_lr is not None or c.optim.learning_rate == 0),
        what="--block_lr gives the denoiser's rates, and --unet_lr or --learning_rate 0 gives it another",
        fix="give one of them",
    ),
    Rule(
        name="no-padding",
        kind="conflict",
        options=("no_token_padding",),
        broken=lambda c: c.full.no_token_padding,
        what="--no_token_padding would train with text that has no padding, and every program that makes pictures, "
        "this one included, fills captions up to 77 tokens: the model would never again see what it has learned from",
        fix="leave it out",
    ),
    Rule(
        name="adapter-folder",
        kind="conflict",
        options=("save_model_as", "method"),
        broken=lambda c: not full(c) and c.save.save_model_as in FOLDERS,
        what="--save_model_as diffusers is a folder for a whole model, and an adapter is one file",
        fix="--save_model_as safetensors",
    ),
)
