"""Names of sd-scripts and of front ends, and what they mean here: pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LycorisPreset:
    """Which layers get adapters."""

    has_convolutions: bool = True
    has_text_encoders: bool = True
    layers: str = ""  # expression that is searched in the layers' paths; empty for those that sd-scripts adapts
    more_layers: str = ""  # expression that fits all of a layer's name in adapter files, with dots
    has_transformers: bool = True  # False: of a denoiser only the layers that conv_dim adds
    has_pointwise: bool = False  # whether those of them with a kernel of 1 are adapted without the others
    arguments: tuple[tuple[str, str, Any], ...] = ()  # layers as above, an argument of the kind, its value for them


DEFAULT_KIND, DEFAULT_NETWORK_MODULE = "lora", "networks.lora"
DEFAULT_RANK = 4  # of --network_dim


def find_default_rank(module: str | None) -> int:
    """Of --network_dim, for this --network_module."""
    return MODULE_RANKS.get(module or DEFAULT_NETWORK_MODULE, DEFAULT_RANK)


NETWORK_MODULES = {  # --network_module -> our adapter
    "networks.lora": "lora",
    "networks.lora_flux": "lora",
    "networks.lora_sd3": "lora",
    "networks.lora_lumina": "lora",
    "networks.lora_hunyuan_image": "lora",
    "networks.lora_anima": "lora",
    "networks.lora_fa": "lora_fa",
    "networks.dylora": "dylora",
    "networks.lokr": "lokr",
    "networks.loha": "loha",
    "networks.oft": "oft",
    "networks.oft_flux": "oft",
    "networks.oft_v2": "oft_v2",
    "networks.boft": "boft_v2",
    "lora": "lora",
    "lora_fa": "lora_fa",
    "dylora": "dylora",
    "lokr": "lokr",
    "loha": "loha",
    "full_difference": "full_difference",
    "norm_difference": "norm_difference",
    "ia3": "ia3",
    "glora": "glora",
    "oft": "oft",
    "diag_oft": "diag_oft",
    "boft": "boft",
    "oft_v2": "oft_v2",
    "boft_v2": "boft_v2",
}

LYCORIS_MODULES = ("lycoris.kohya", "lycoris.locon", "locon.locon_kohya")  # whose `algo` is the adapter
LYCORIS_ALGOS = {
    "lora": "lora",
    "locon": "lora",
    "lokr": "lokr",
    "loha": "loha",
    "full": "full_difference",
    "ia3": "ia3",
    "glora": "glora",
    "diag-oft": "diag_oft",
    "boft": "boft",
    "dylora": "dylora",
}  # -> our adapter
LYCORIS_DEFAULTS: dict[str, dict[str, Any]] = {"dylora": {"unit": 4}}  # where the argument is not given
_ATTENTION = r"(^|\.)(attn\d?|self_attn|SelfAttention)\."
LYCORIS_PRESETS = {
    "full": LycorisPreset(more_layers=r"conv_in|conv_out|time_embedding\.linear_[12]"),
    "attn-mlp": LycorisPreset(has_convolutions=False),
    "attn-only": LycorisPreset(has_convolutions=False, layers=_ATTENTION),
    "unet-only": LycorisPreset(has_text_encoders=False, more_layers=r"conv_in|conv_out|time_embedding\.linear_[12]"),
    "unet-transformer-only": LycorisPreset(has_convolutions=False, has_text_encoders=False),
    "full-lin": LycorisPreset(has_convolutions=False, has_pointwise=True, more_layers=r"time_embedding\.linear_[12]"),
    "unet-convblock-only": LycorisPreset(
        has_text_encoders=False, has_transformers=False, more_layers=r"conv_in|conv_out"
    ),
    "ia3": LycorisPreset(
        has_convolutions=False,
        layers=r"(^|\.)(to_[kv]|[kv]_proj|ff\.net\.2|mlp\.fc2)$",
        arguments=((r"(^|\.)(ff\.net\.2|mlp\.fc2)$", "train_on_input", True),),
    ),
}
_FEED_FORWARD = r"(^|\.)(ff|ff_context|feed_forward|mlp)\."
LYCORIS_CLASSES = {  # names of classes in a preset's file -> whole blocks, or an expression for some of their layers
    **dict.fromkeys(("Transformer2DModel", "DoubleStreamBlock", "SingleStreamBlock", "SingleDiTBlock"), "transformers"),
    **dict.fromkeys(("JointTransformerBlock", "FinalLayer"), "transformers"),
    **dict.fromkeys(("ResnetBlock2D", "Downsample2D", "Upsample2D"), "convolutions"),
    **dict.fromkeys(("CrossAttention", "SelfAttention", "Attention"), _ATTENTION),
    **dict.fromkeys(("CLIPAttention", "CLIPSdpaAttention", "Gemma2Attention", "Gemma2SdpaAttention"), _ATTENTION),
    **dict.fromkeys(("Gemma2FlashAttention2", "T5Attention", "T5LayerSelfAttention"), _ATTENTION),
    **dict.fromkeys(("FeedForward", "MLP", "CLIPMLP", "Gemma2MLP"), _FEED_FORWARD),
    **dict.fromkeys(("T5DenseGatedActDense", "T5LayerFF"), r"(^|\.)DenseReluDense\."),
}
REFUSED_LYCORIS_ALGOS = {  # -> why
    "tlora": "its files lack the singular vectors that its change is a difference to, and do not say which they were",
}

_OFT_LAYERS = LycorisPreset(has_convolutions=False, has_text_encoders=False, layers=_ATTENTION)
MODULE_PRESETS = {  # --network_module -> the layers that it adapts, where these are not those of LoRA
    "networks.oft": _OFT_LAYERS,
    "networks.oft_flux": _OFT_LAYERS,
}
MODULE_ARGUMENTS: dict[str, dict[str, Any]] = {"networks.oft_flux": {"divided": True}}  # which the name itself says
MODULE_RANKS = {"networks.oft_v2": 32, "oft_v2": 32}  # of --network_dim, where it is another one

OPTION_ALIASES = {  # old spelling -> option
    "caption_extention": "caption_extension",
    "skip_latents_validity_check": "skip_cache_check",
    "torch_compile": "compile",
    "dynamo_backend": "compile_backend",
    "lllite_cond_emb_dim": "cond_emb_dim",
    "lllite_mlp_dim": "network_dim",
    "lllite_dropout": "network_dropout",
}

SCRIPT_ALIASES = {  # name in use elsewhere -> script
    "gen_img_diffusers": "gen_img",
    "train_controlnet": "train_control_net",
    "sdxl_train_controlnet": "sdxl_train_control_net",
    "networks/merge_flux_lora": "networks/flux_merge_lora",
    "finetune/tag_image_by_wd14_tagger": "finetune/tag_images_by_wd14_tagger",
    "tag_images_by_wd14_tagger": "finetune/tag_images_by_wd14_tagger",
    "tag_image_by_wd14_tagger": "finetune/tag_images_by_wd14_tagger",
}

PLANNED_SCRIPTS = (  # known, not available yet
    "anima_minimal_inference",
    "anima_train",
    "anima_train_network",
    "hunyuan_image_minimal_inference",
    "hunyuan_image_train_network",
    "networks/convert_anima_lora_to_comfy",
    "networks/convert_hunyuan_image_lora_to_comfy",
)

RETIRED_SCRIPTS = {  # out of use: what to use instead, once it is there
    "train_textual_inversion_XTI": "train_textual_inversion",
    "hypernetwork_nai": "train_network",
    "networks/hypernetwork_nai": "train_network",
    "lora_diffusers": "gen_img",
    "networks/lora_diffusers": "gen_img",
    "merge_lora_old": "networks/merge_lora",
    "networks/merge_lora_old": "networks/merge_lora",
    "sdxl_train_control_net_lllite_old": "sdxl_train_control_net_lllite",
}
