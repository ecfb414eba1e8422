"""Gemma 2 as a text encoder: configuration, key map, tokens and encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.data.batch import Tensors
from sfumato.data.prompt_weighting import WeightedText, compute_token_weights, strip_weights
from sfumato.families._file_kinds import GEMMA2_ENCODER, WIDTH_FAULT, check_network_size, option_context, require_kind
from sfumato.families._gemma2_tokenizer import GemmaTokenizer
from sfumato.families._text_features import cut_to_mask, multiply_by_weights, to_device
from sfumato.families.part import Network, Part, PartSpec
from sfumato.families.source import Source, select_fields
from sfumato.families.weights import Weights
from sfumato.formats.checkpoint import Checkpoint
from sfumato.formats.keymap import KeyMap, KeyRule, make_identity_map

_HEAD_CHANNELS = 256  # in every published size that an image model uses
GEMMA2_LENGTH = 256  # tokens of a caption by default
TARGETS = (
    *(f"layers.{{n}}.self_attn.{x}_proj" for x in "qkvo"),
    *(f"layers.{{n}}.mlp.{name}_proj" for name in ("gate", "up", "down")),
)
BLOCKS = ("layers.{n}",)
_ADAPTER_NAMES = (
    "lora_te1",
    "text_encoder",
    "gemma2_2b",
    "gemma2_2b.transformer",
    "text_encoders.gemma2_2b.transformer",
)
TOKENIZER_KEY = "spiece_model"  # in a file of weights: the bytes of the tokenizer's file
GEMMA2_FILE_KEYS = KeyMap(  # with or without the level of the causal language model, whose last layer is tied
    [KeyRule("model.{*}", ("{*}",)), KeyRule("{*}", ("{*}",))],
    drop=("lm_head.weight", TOKENIZER_KEY, "logit_scale"),
)
_LLAMA_CPP_NAMES = {  # of the tensors in a layer of a GGUF file -> in a layer of ours
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA2_FIELDS = (  # of a published config.json
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_activation", "max_position_embeddings", "rms_norm_eps"),
    *("rope_parameters", "attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)


def gemma2_llama_cpp_key_map() -> KeyMap:
    """The names that llama.cpp's converter gives Gemma 2 in a GGUF file."""
    in_layers = [
        KeyRule(f"blk.{{n}}.{theirs}.weight", (f"layers.{{n}}.{ours}.weight",))
        for theirs, ours in _LLAMA_CPP_NAMES.items()
    ]
    around = [
        KeyRule("token_embd.weight", ("embed_tokens.weight",)),
        KeyRule("output_norm.weight", ("norm.weight",)),
    ]
    return KeyMap([*in_layers, *around], drop=("output.weight",))


def find_gemma2_weights(file: Checkpoint, prefix: str) -> Weights:
    """The encoder in a file, by the names of any kind. prefix: of the usual ones."""
    if "blk.0.attn_q.weight" in file.header.tensors:
        return Weights(file=file, key_map=gemma2_llama_cpp_key_map())
    return Weights(file=file, key_map=GEMMA2_FILE_KEYS, prefix=prefix)


def is_gemma2(names: Mapping[str, Any] | Sequence[str]) -> bool:
    """Whether names of ours are Gemma 2's; no similar model has norms before and after both attention and MLP."""
    wanted = ("embed_tokens.weight", "layers.0.pre_feedforward_layernorm.weight", "layers.0.self_attn.q_proj.weight")
    return all(name in names for name in wanted) and "layers.0.self_attn.q_norm.weight" not in names


def spec(prefix: str) -> PartSpec:
    """prefix: of its keys in a checkpoint."""
    return PartSpec(
        name="gemma2",
        key_map=GEMMA2_FILE_KEYS,
        key_prefix=prefix,
        adapter_map=make_identity_map(),
        adapter_prefix="lora_te",
        adapter_names=_ADAPTER_NAMES,
        targets=TARGETS,
        blocks=BLOCKS,
        token_table="embed_tokens",
        embedding_name="gemma2_2b",  # ComfyUI's name
        frozen_by_cache=True,
    )


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Gemma2Config from our names and shapes."""
    vocabulary, width = shapes["embed_tokens.weight"]
    layers = {key.split(".")[1] for key in shapes if key.startswith("layers.")}
    first = "layers.0."
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[first + "mlp.up_proj.weight"][0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": shapes[first + "self_attn.q_proj.weight"][0] // _HEAD_CHANNELS,
        "num_key_value_heads": shapes[first + "self_attn.k_proj.weight"][0] // _HEAD_CHANNELS,
        "head_dim": _HEAD_CHANNELS,
        "query_pre_attn_scalar": _HEAD_CHANNELS,
    }


def read_gemma2(source: Source, prefix: str, *, width: int) -> Network:
    """From a file or folder of the encoder, or a file with the whole model. prefix: of its keys there.

    width: that the model expects. Raises UserError for other networks and sizes.
    """
    with option_context("gemma2"):
        weights = find_gemma2_weights(source.open_lone(), source.find_prefix(prefix))
        shapes = weights.read_shapes()
        names = shapes if is_gemma2(shapes) else {}
        require_kind(GEMMA2_ENCODER, names, weights.file.header.tensors, source.path)
        if source.is_folder and (source.path / "config.json").is_file():
            config = select_fields(source.read_config("."), GEMMA2_FIELDS)
        else:
            config = config_from_shapes(shapes)
    check_network_size("gemma2", source.path, WIDTH_FAULT, config["hidden_size"], width)
    return Network(spec=spec(prefix), config=config, weights=weights, option="gemma2")


def build(config: Mapping[str, Any]) -> nn.Module:
    """With eager attention: torch's fused one has no soft cap of the scores, which the model was trained with."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**{**config, "attn_implementation": "eager"}))


def tokenize(tokenizer: GemmaTokenizer, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """(B, L) ids and (B, L) bool mask of the tokens that are not padding, on the CPU.

    L: of the longest caption, at most `length`. Attention is causal, so padding after the text changes nothing.
    """
    rows = [torch.tensor(tokenizer.encode(caption, length)) for caption in captions]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
    return ids, mask


def encode_tokens(encoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, L) ids and bool mask -> (B, L, D): the input of the last layer."""
    output = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return output.hidden_states[-2]


def encode_gemma2(encoder: Part, tokenizer: GemmaTokenizer, captions: Sequence[str], length: int) -> list[Tensors]:
    """hidden (L, D) and mask (L,) of each caption, without padding."""
    ids, mask = tokenize(tokenizer, captions, length)
    hidden = encode_tokens(encoder.module, *to_device(encoder.device, ids, mask))
    return cut_to_mask(hidden, mask)


def apply_prompt_weights(tokenizer: GemmaTokenizer, features: Tensors, pieces: WeightedText, length: int) -> Tensors:
    """One caption's features multiplied by the weights of its tokens."""
    return multiply_by_weights(features, make_gemma2_weights(tokenizer, pieces, length))


def make_gemma2_weights(tokenizer: GemmaTokenizer, pieces: WeightedText, length: int) -> Tensor:
    """(L,) weights of the tokens of `tokenize`; 1 for the begin token."""
    return torch.tensor([1.0, *compute_token_weights(pieces, tokenizer.find_ends(strip_weights(pieces), length))])
