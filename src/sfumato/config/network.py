"""Options of what is trained: an adapter, or the full model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from sfumato.common.extensions import ADAPTERS_GROUP, is_extension
from sfumato.common.layer_kinds import DEFAULT_LAYERS, check_layer_kinds
from sfumato.common.names import LYCORIS_MODULES, NETWORK_MODULES
from sfumato.common.registry import did_you_mean
from sfumato.config.base import Options, option
from sfumato.config.frozen import FrozenAdapterList
from sfumato.config.values import Arguments, FilePath, FilePaths, Floats


def check_module(name: str) -> str:
    """One that is known or can be imported."""
    known = (*NETWORK_MODULES, *LYCORIS_MODULES)
    if name not in known and not is_extension(name, ADAPTERS_GROUP):
        raise ValueError(f"is not known; {did_you_mean(name, known)}")
    return name


class NetworkOptions(Options):
    """Adapter"""

    network_module: Annotated[str, AfterValidator(check_module)] | None = option(
        None, "kind of adapter, e.g. networks.lora, networks.lokr, lycoris.kohya, or a module of one's own"
    )
    network_dim: int | None = option(None, "rank (dimension), or a size in that kind's place; default: 4", ge=1)
    network_alpha: float = option(1.0, "the adapter is scaled by alpha / rank; 0 means alpha = rank", ge=0)
    network_args: Arguments = option({}, "additional arguments of the adapter, e.g. conv_dim=4 rank_dropout=0.1")
    network_weights: FilePath | None = option(None, "adapter file or folder to continue from", path="any")
    dim_from_weights: bool = option(False, "read ranks and alphas from --network_weights")
    network_train_unet_only: bool = option(False, "train only the denoiser")
    network_train_text_encoder_only: bool = option(False, "train only the text encoders")
    network_dropout: float | None = option(None, "dropout probability inside the adapter", ge=0, lt=1)
    scale_weight_norms: float | None = option(None, "maximum norm of a layer's weight change", gt=0)
    base_weights: FilePaths = option((), "adapter files or folders merged into the model before training", path="any")
    base_weights_multiplier: Floats = option((), "multipliers of --base_weights, in their order; 1 where missing")
    frozen_lora: FrozenAdapterList = option(
        (),
        "adapter file that takes part without being trained or saved, in training, previews or both; repeatable",
        path="any",
        repeatable=True,
    )


class LLLiteOptions(Options):
    """ControlNet-LLLite"""

    cond_emb_dim: int | None = option(None, "channels that LLLite reads of a control image; default: 32", ge=2)
    lllite_version: int | None = option(
        None, "structure: 1 is for UNets, 2 for every model; default: 1 for UNets, else 2", ge=1, le=2
    )
    lllite_target_layers: Annotated[str, AfterValidator(check_layer_kinds)] = option(
        DEFAULT_LAYERS,
        "layers that version 2 changes, e.g. self_attn_qkv, or a list such as self_attn_q_pre,mlp_fc1_pre",
    )
    lllite_cond_dim: int = option(64, "channels inside the network that reads the control image (version 2)", ge=2)
    lllite_cond_resblocks: int = option(1, "residual blocks of that network", ge=0)
    lllite_use_aspp: bool = option(False, "that network also sees at several distances, and the image's mean")
    lllite_cond_in_channels: int = option(
        3, "channels that it reads: 3 colors, or 4 with a mask of what is to be filled in (version 2)", ge=3, le=4
    )
    lllite_cond_input: Literal["pixel", "latent"] = option(
        "pixel", "what it reads of the control image: its pixels, or its latents (version 2.1)"
    )
    lllite_inpaint_masked_input: bool = option(
        False, "the control image is gray where the mask is, with --lllite_cond_in_channels 4"
    )
    lllite_multiplier: float = option(1.0, "strength of LLLite while it trains, and in previews", gt=0)


class LecoOptions(Options):
    """Concepts and sliders"""

    prompts_file: FilePath | None = option(
        None,
        "TOML, YAML or JSON file of the concepts to erase or enhance, or of sliders; for --method leco",
        path="file",
    )
    max_denoising_steps: int = option(
        40,
        "denoising steps from noise to an image; each sample is trained after a random number of them",
        ge=2,
        le=1000,
    )
    leco_denoise_guidance_scale: float = option(
        3.0, "classifier-free guidance of these steps, from the unconditional prompt to the target", ge=0
    )


class FullOptions(Options):
    """Full training"""

    train_text_encoder: bool = option(False, "train the text encoders, too")
    stop_text_encoder_training: int | None = option(
        None, "step after which the text encoders are frozen; -1 never trains them", ge=-1
    )
    train_t5xxl: bool = option(False, "train T5-XXL, too, with --train_text_encoder")
    use_t5xxl_cache_only: bool = option(
        False,
        "cache the outputs of T5-XXL alone",
        no_effect="--cache_text_encoder_outputs caches those of every encoder that does not train",
    )
    num_last_block_to_freeze: int | None = option(None, "number of the denoiser's last blocks that do not train", ge=1)
    no_token_padding: bool = option(False, "do not pad captions; refused, because images are generated with padding")

    @property
    def trains_text(self) -> bool:
        """Whether text encoders are trained, at least for the first steps."""
        stop = self.stop_text_encoder_training
        return self.train_text_encoder and (stop is None or stop > 0)
