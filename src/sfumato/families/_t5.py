"""T5's encoder: configuration, key map and encoding, shared by the families that read text with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.data.prompt_weighting import Pieces, of_tokens, plain
from sfumato.families._file_kinds import T5, require
from sfumato.families.source import Source, Weights
from sfumato.formats.keymap import KeyMap, Rule

TARGETS = (
    *(f"encoder.block.{{n}}.layer.{{n}}.SelfAttention.{name}" for name in ("q", "k", "v", "o")),
    *(f"encoder.block.{{n}}.layer.{{n}}.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)
BLOCKS = ("encoder.block.{n}",)
TIED = {"encoder.embed_tokens.weight": "shared.weight"}


def key_map() -> KeyMap:
    """Files agree on the names; the tied embedding and a decoder, where one was saved along, are left out."""
    return KeyMap([Rule("{*}", ("{*}",))], drop=("encoder.embed_tokens.weight", "decoder.{*}", "lm_head.weight"))


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """T5Config of a v1.1 encoder (gated GELU); heads are read off the relative position table."""
    vocabulary, width = shapes["shared.weight"]
    layers = {key.split(".")[2] for key in shapes if key.startswith("encoder.block.")}
    first = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = shapes[first + "relative_attention_bias.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[first + "q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": len(layers),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def read_config(source: Source, weights: Weights) -> dict[str, Any]:
    """From the file or folder of an encoder; raises UserError where it is none."""
    shapes = weights.shapes()
    require(T5, shapes, weights.file.header.tensors, source.path)
    return config_of_folder(source.config(".")) if source.is_folder else config_from_shapes(shapes)


def config_of_folder(config: Mapping[str, Any]) -> dict[str, Any]:
    wanted = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets")
    wanted += ("feed_forward_proj", "layer_norm_epsilon")
    return {name: config[name] for name in wanted if name in config}


def build(config: Mapping[str, Any]) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**config, dropout_rate=0.0, use_cache=False, is_encoder_decoder=False))


def hidden_states(encoder: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) ids and bool mask -> (B, L, D); None: padding is attended to, as the models were trained with."""
    return encoder(input_ids=ids, attention_mask=mask).last_hidden_state


def token_weights(tokenizer: Any, pieces: Pieces, length: int) -> Tensor:
    """(length,) weights of the tokens, as `token_ids` places them; 1 for the end and for padding."""
    tokens = tokenizer(plain(pieces), truncation=True, max_length=length, return_offsets_mapping=True)
    weights = of_tokens(pieces, [end for _, end in tokens.offset_mapping])
    return torch.tensor(weights + [1.0] * (length - len(weights)))


def token_ids(tokenizer: Any, captions: Sequence[str], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, L) ids and (B, L) bool mask of the tokens that are not padding."""
    tokens = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return tokens.input_ids.to(device), tokens.attention_mask.bool().to(device)
