"""Gemma 2 as a text encoder: configuration, key map, tokens and encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.data.prompt_weighting import Pieces, of_tokens, plain
from sfumato.families._gemma2_tokenizer import GemmaTokenizer
from sfumato.formats.keymap import KeyMap, Rule, identity

HEAD = 256  # channels of a head, in every published size of which images are made
LENGTH = 256  # tokens of a caption, unless told otherwise
TARGETS = (
    *(f"layers.{{n}}.self_attn.{x}_proj" for x in "qkvo"),
    *(f"layers.{{n}}.mlp.{name}_proj" for name in ("gate", "up", "down")),
)
BLOCKS = ("layers.{n}",)
SPIECE = "spiece_model"  # the tokenizer's own file, byte by byte, inside the weights' file
FILE_KEYS = KeyMap(  # with or without the level of the causal language model, whose last layer is the embedding again
    [Rule("model.{*}", ("{*}",)), Rule("{*}", ("{*}",))], drop=("lm_head.weight", SPIECE, "logit_scale")
)
WANTED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_activation", "max_position_embeddings", "rms_norm_eps"),
    *("rope_parameters", "attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)


def adapter_map() -> KeyMap:
    """Adapter files have the names of the bare model."""
    return identity()


def is_one(names: Mapping[str, Any] | Sequence[str]) -> bool:
    """Whether names of ours are Gemma 2's: no other model of the kind has norms on both sides of both its halves."""
    wanted = ("embed_tokens.weight", "layers.0.pre_feedforward_layernorm.weight", "layers.0.self_attn.q_proj.weight")
    return all(name in names for name in wanted) and "layers.0.self_attn.q_norm.weight" not in names


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
        "num_attention_heads": shapes[first + "self_attn.q_proj.weight"][0] // HEAD,
        "num_key_value_heads": shapes[first + "self_attn.k_proj.weight"][0] // HEAD,
        "head_dim": HEAD,
        "query_pre_attn_scalar": HEAD,
    }


def config_of_folder(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in WANTED if name in config}


def build(config: Mapping[str, Any]) -> nn.Module:
    """Attention is written out: torch's fast one cannot bound the scores as the model was trained with."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**{**config, "attn_implementation": "eager"}))


def token_ids(
    tokenizer: GemmaTokenizer, captions: Sequence[str], length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(B, L) ids and (B, L) bool mask of the tokens that are not padding; L is the longest caption's, at most length.

    Words see only what stands before them, so that padding behind them changes nothing.
    """
    ids = [torch.tensor(tokenizer.ids(caption, length)) for caption in captions]
    found = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad)
    real = torch.tensor([len(each) for each in ids])
    mask = torch.arange(found.shape[1])[None, :] < real[:, None]
    return found.to(device), mask.to(device)


def hidden_states(encoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, L) ids and bool mask -> (B, L, D): what goes into the last layer."""
    found = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return found.hidden_states[-2]


def token_weights(tokenizer: GemmaTokenizer, pieces: Pieces, length: int) -> Tensor:
    """(L,) weights of the tokens that `token_ids` gives; 1 for the begin token."""
    return torch.tensor([1.0, *of_tokens(pieces, tokenizer.ends(plain(pieces), length))])
