"""The cells of docs/adapters.md: for every kind of adapter and family the options of its test, or why there is none.

Where a kind has arguments, each family tests others of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FAMILIES = ("sd", "sdxl", "sd3", "flux", "flux_kontext", "chroma", "lumina")
VARIANTS = {("norm_difference", "sd3"): "3.5-medium"}  # SD3 itself has no norm layer with a weight
IN_ITS_PLACE = ("split_lora", "tucker_lora", "pissa", "dora", "trained_scalar")  # asked for by an argument of LoRA

FULL, ALONE = "lycoris.kohya algo=full", "norm_difference --network_train_unet_only"
BOFT, PISSA = "lycoris.kohya algo=boft --network_dim=64", "networks.lora pissa=True"
SLOW = ("pissa", "full_difference", "oft", "diag_oft", "boft", "oft_v2", "boft_v2")  # else a step goes too far
KINDS: Mapping[str, Mapping[str, str]] = {  # kind -> family, or "" for the others -> module, arguments, other options
    "lora": {
        "": "networks.lora",
        "sd": "networks.lora conv_dim=1 rank_dropout=0.1",
        "sdxl": "lycoris.kohya algo=locon conv_dim=1 preset=attn-mlp",
        "sd3": "networks.lora_sd3 emb_dims=[1,1,1,1,1,1]",
        "chroma": "networks.lora rank_stabilized=True --scale_weight_norms=1",
        "lumina": "networks.lora module_dropout=0.1",
    },
    "lora_fa": {
        "": "networks.lora_fa", "sd": "networks.lora_fa conv_dim=2", "flux": "networks.lora_fa rank_dropout=0.1",
    },
    "dylora": {
        "": "networks.dylora unit=2 --network_dim=4",
        "sdxl": "networks.dylora unit=2 conv_dim=4 --network_dim=4",
        "flux": "lycoris.kohya algo=dylora block_size=1",
    },
    "split_lora": {"": "networks.lora split_qkv=True", "flux": "networks.lora split_qkv=True rank_dropout=0.1"},
    "pissa": {"": PISSA, "sd": f"{PISSA} conv_dim=2"},
    "tucker_lora": {
        "sd": "networks.lora conv_dim=2 use_tucker=True rank_dropout=0.1 --network_train_unet_only",
        "sdxl": "lycoris.kohya algo=locon use_tucker=True conv_dim=2",
    },
    "norm_difference": {
        "": ALONE,
        "sd": "networks.lora train_norm=True rank_dropout=0.1 conv_dim=1",
        "sdxl": "lycoris.kohya algo=locon train_norm=True preset=attn-mlp",
        "flux": "networks.lora train_norm=True --scale_weight_norms=1",
        "chroma": "networks.lokr train_norm=True",
    },
    "dora": {
        "": "networks.lora dora_wd=True",
        "sd": "lycoris.kohya algo=locon dora_wd=True conv_dim=1",
        "sdxl": "lycoris.kohya algo=lokr dora_wd=True preset=attn-mlp",
        "sd3": "lycoris.kohya algo=lokr dora_wd=True factor=8",
        "flux": "networks.lora dora_wd=True wd_on_output=False --network_train_unet_only",
        "flux_kontext": "networks.lora dora_wd=True split_qkv=True --network_train_unet_only",
        "chroma": "lycoris.kohya algo=loha dora_wd=True",
    },
    "trained_scalar": {
        "": "lycoris.kohya algo=locon use_scalar=True",
        "sdxl": "lycoris.kohya algo=loha use_scalar=True",
        "flux": "networks.lokr use_scalar=True dora_wd=True",
    },
    "loha": {
        "": "networks.loha",
        "sd": "lycoris.kohya algo=loha conv_dim=2 use_tucker=True",
        "flux": "networks.loha rank_dropout=0.1",
        "chroma": "lycoris.kohya algo=loha preset=attn-only",
    },
    "lokr": {
        "": "networks.lokr",
        "sd": "networks.lokr conv_dim=1 use_tucker=True",
        "sdxl": "lycoris.kohya algo=lokr decompose_both=True factor=4",
        "sd3": "lycoris.kohya algo=lokr bypass_mode=True",
        "flux": "networks.lokr factor=4 rank_dropout=0.1",
        "chroma": "lycoris.kohya algo=lokr preset=attn-only",
        "lumina": "lycoris.kohya algo=lokr full_matrix=True",
    },
    "full_difference": {
        "": FULL, "sdxl": f"{FULL} preset=attn-only", "sd3": "full_difference", "flux": f"{FULL} preset=attn-mlp",
    },
    "ia3": {
        "": "lycoris.kohya algo=ia3", "sdxl": "lycoris.kohya algo=ia3 preset=ia3", "sd3": "ia3",
        "flux": "ia3 train_on_input=True", "lumina": "lycoris.kohya algo=ia3 train_on_input=True",
    },
    "glora": {
        "": "lycoris.kohya algo=glora", "sd3": "glora",
        "flux": "glora module_dropout=0.1",
    },
    "oft": {
        "": "oft", "sd": "networks.oft enable_all_linear=True enable_conv=True", "sdxl": "networks.oft",
        "sd3": "oft divided=True", "flux": "networks.oft_flux", "chroma": "networks.oft_flux",
    },
    "diag_oft": {
        "": "lycoris.kohya algo=diag-oft", "sd": "lycoris.kohya algo=diag-oft constraint=1e-2 rescaled=True",
        "sdxl": "lycoris.kohya algo=diag-oft preset=attn-mlp", "sd3": "diag_oft",
        "flux": "lycoris.kohya algo=diag-oft rank_dropout=0.1",
    },
    "boft": {"": BOFT},
    "oft_v2": {
        "": "networks.oft_v2", "sd": "networks.oft_v2 oft_block_size=4 enable_conv=True",
        "sdxl": "networks.oft_v2 block_share=True",
        "flux": "networks.oft_v2 coft=True coft_eps=0.1 --network_dropout=0.1",
    },
    "boft_v2": {
        "": "networks.boft", "sd": "networks.boft boft_block_size=4 enable_conv=True",
        "sdxl": "networks.boft module_dropout=0.1", "flux": "networks.boft boft_n_butterfly_factor=2",
    },
}  # fmt: skip
SOME_LAYERS = r"include_patterns=.*(middle_block|output_blocks\.0|layers\.0|norm).*"  # of SDXL, whose U-Net is as SD's
NONE_FUSED, NO_KERNELS = "no layer of these checkpoints is fused", "no convolution is adapted"
REFUSED: Mapping[str, Mapping[str, tuple[str, str, str]]] = {  # -> the options, why, the error's code or the note
    "split_lora": dict.fromkeys(
        ("sd", "sdxl"), ("networks.lora split_qkv=True", NONE_FUSED, "split-qkv-without-fused-layer")
    ),
    "tucker_lora": dict.fromkeys(
        ("sd3", "flux", "flux_kontext", "chroma", "lumina"),
        ("networks.lora use_tucker=True", NO_KERNELS, f"--network_args use_tucker: no effect, {NO_KERNELS}"),
    ),
}
# Kinds of which PEFT has layers, so that diffusers loads what `sfumato lora convert` makes of them.
IN_DIFFUSERS = ("lora", "lora_fa", "dylora", "split_lora", "pissa", "tucker_lora", "dora", "trained_scalar")


def list_cells() -> list[tuple[str, str]]:
    """Kind and family of every cell that holds."""
    return [(kind, family) for kind in KINDS for family in FAMILIES if family not in REFUSED.get(kind, {})]


def make_options(kind: str, family: str) -> dict[str, Any]:
    """The options of training."""
    text = KINDS[kind].get(family) or KINDS[kind][""]
    options = parse_options(f"{text} {SOME_LAYERS}" if family == "sdxl" and "preset=" not in text else text)
    return {"learning_rate": "1e-3" if kind in SLOW else "1e-2"} | options


def parse_options(text: str) -> dict[str, Any]:
    """A module's name, --options and --network_args as options of training."""
    module, *words = text.split()
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--"))
    options: dict[str, Any] = {name: value or True for name, value in flags.items()}
    return {
        "network_module": module, "network_args": [word for word in words if not word.startswith("--")], **options,
    }  # fmt: skip


def goes_to_diffusers(kind: str, family: str) -> bool:
    """Whether the cell's file is one that diffusers loads: none with another kind around or inside."""
    text = KINDS[kind].get(family) or KINDS[kind][""]
    others = ("algo=lok", "algo=loh", "networks.lok", "wd_on_output=False")
    return kind in IN_DIFFUSERS and not any(word in text for word in others)
