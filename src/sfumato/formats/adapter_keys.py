"""Keys of adapter files in the spelling of every known program: the name of the layer, and which tensor of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

ALPHA, SCALAR = "alpha", "scalar"
COMMON_SPELLINGS = {ALPHA: ALPHA, SCALAR: SCALAR}  # of every kind; scalar is multiplied into the change
LONGEST_END = 3  # words of a tensor's name, with dots between them
FOREIGN_KINDS = {  # kinds without a class here -> the names of their tensors; the first that matches
    "OFT of PEFT before 0.16": r"oft_(r|diag)(\..+)?",
    "(IA)3 of PEFT": r"ia3_l(\..+)?",
    "GLoRA with other matrices": r"(bm1|bm2)\.weight",
    "AdaLoRA": r"lora_[ABE]|ranknum",
    "VeRA": r"vera_lambda_\w+(\..+)?",
    "LoRA of an embedding": r"lora_embedding_[AB](\..+)?",
    "LoRA with biases": r"lora_(A|B|up|down)(\.default)?\.bias|lora\.(up|down)\.bias",
    "file of whole weights": r"set_weight",
    "ControlNet-LLLite": r"lllite_\w+",
}
WRAPPERS = (  # what training programs put around the layers' own names -> what replaces it
    (re.compile(r"(^|\.)(base_model\.model|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)"), r"\1"),
    (re.compile(r"^\.+"), ""),
    (re.compile(r"\.{2,}"), "."),
    (re.compile(r"\.self_attn\.to_([qkv])_lora$"), r".self_attn.\1_proj"),
    (re.compile(r"\.self_attn\.to_out_lora$"), ".self_attn.out_proj"),
    (re.compile(r"\.(?:processor\.)?to_out_lora$"), ".to_out.0"),
    (re.compile(r"\.processor\.(\w+)_lora$"), r".\1"),
    (re.compile(r"\.(to_[qkv])_lora$"), r".\1"),
)
WRITERS = (  # what keys look like -> who writes such
    (r"lllite_", "ControlNet-LLLite"),
    (r"lora_transformer_|lora_prior_|bundle_emb\.", "OneTrainer"),
    (r"lycoris_", "LyCORIS' wrapper, e.g. SimpleTuner"),
    (r"base_model\.model\.", "PEFT"),
    (r"diffusion_model\..*\.lora_", "ComfyUI, AI-toolkit or diffusion-pipe"),
    (r"(unet|transformer|text_encoder\w*)\..*\.lora", "diffusers, AI-toolkit or SimpleTuner"),
    (r"(unet\.)?\w+\..*processor\.", "an early version of diffusers"),
    (r"lora_(unet|te\d?)_", "the kohya format"),
)
CONTROL_PREFIX = "lllite_"  # of every key in files of ControlNet-LLLite, whose tensors end as those of adapters
CONTENTS = (  # what keys look like in files that are no adapter -> what these are
    (CONTROL_PREFIX, "a ControlNet-LLLite, which --control_net_lllite_models takes"),
    (r"emb_params|clip_[lg]|string_to_param|t5emb|<.+>", "a textual inversion"),
    (r"control_model\.|controlnet_|input_hint_block", "a ControlNet"),
    (r"model\.diffusion_model\.|diffusion_model\.|double_blocks\.|joint_blocks\.", "a checkpoint"),
    (r"(down|up|mid)_blocks?\.|transformer_blocks\.", "a denoiser's weights in diffusers' layout"),
    (r"text_model\.|encoder\.", "a text encoder or an autoencoder"),
)


def parse_adapter_key(key: str, spellings: Mapping[str, str]) -> tuple[str, str] | None:
    """The layer's name without what programs wrap it in, and the tensor's name here; None for any other key.

    spellings: end of a key -> the tensor's name here, of all kinds that are known. Tensors of foreign ones keep theirs.
    """
    pieces = key.split(".")
    for count in range(min(LONGEST_END, len(pieces) - 1), 0, -1):
        end = ".".join(pieces[-count:])
        if end in spellings or find_foreign_kind(end):
            return unwrap_layer(".".join(pieces[:-count])), spellings.get(end, end)
    return None


@lru_cache(maxsize=4096)
def find_foreign_kind(tensor: str) -> str:
    """The kind without a class here that has a tensor of this name; empty for any other name."""
    return next((name for name, pattern in FOREIGN_KINDS.items() if re.fullmatch(pattern, tensor)), "")


def unwrap_layer(name: str) -> str:
    for pattern, instead in WRAPPERS:
        name = pattern.sub(instead, name)
    return name


def guess_writer(keys: Iterable[str]) -> str:
    """Who writes such keys; empty where that is not known."""
    return _find_row(WRITERS, keys)


def guess_contents(keys: Iterable[str]) -> str:
    """What a file without an adapter is; empty where that is not known."""
    return _find_row(CONTENTS, keys)


def _find_row(rows: Sequence[tuple[str, str]], keys: Iterable[str]) -> str:
    """The first row whose pattern a key starts with."""
    keys = list(keys)
    return next((text for pattern, text in rows if any(re.match(pattern, key) for key in keys)), "")
