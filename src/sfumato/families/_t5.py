"""T5's text encoder: configuration, key map, tokens and encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.data.batch import Tensors
from sfumato.data.prompt_weighting import WeightedText, compute_token_weights, strip_weights
from sfumato.families._file_kinds import T5_ENCODER, require_kind
from sfumato.families._text_features import cut_to_mask, multiply_by_weights, to_device
from sfumato.families.part import Part, PartSpec
from sfumato.families.source import Source, select_fields
from sfumato.families.weights import Weights
from sfumato.formats.checkpoint import Checkpoint
from sfumato.formats.keymap import KeyMap, KeyRule

TARGETS = (
    *(f"encoder.block.{{n}}.layer.{{n}}.SelfAttention.{name}" for name in ("q", "k", "v", "o")),
    *(f"encoder.block.{{n}}.layer.{{n}}.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)
BLOCKS = ("encoder.block.{n}",)
_ADAPTER_NAMES = ("t5xxl", "t5xxl.transformer", "text_encoders.t5xxl.transformer")
T5_FIELDS = (  # of a published config.json
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets"),
    *("feed_forward_proj", "layer_norm_epsilon"),
)
TIED_WEIGHTS = {"encoder.embed_tokens.weight": "shared.weight"}


def key_map() -> KeyMap:
    """Files have the module's names; drops the tied embedding, the tokenizer and the decoder."""
    return KeyMap(
        [KeyRule("{*}", ("{*}",))],
        drop=("encoder.embed_tokens.weight", "spiece_model", "logit_scale"),
        beside=("decoder.{*}", "lm_head.weight"),
    )


_LLAMA_CPP_NAMES = {  # of the tensors in a block of a GGUF file -> in a block of ours
    "attn_norm": "0.layer_norm",
    "attn_q": "0.SelfAttention.q",
    "attn_k": "0.SelfAttention.k",
    "attn_v": "0.SelfAttention.v",
    "attn_o": "0.SelfAttention.o",
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "ffn_norm": "1.layer_norm",
    "ffn_gate": "1.DenseReluDense.wi_0",
    "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
}


def llama_cpp_key_map() -> KeyMap:
    """The names that llama.cpp's converter gives an encoder in a GGUF file."""
    in_blocks = [
        KeyRule(f"enc.blk.{{n}}.{theirs}.weight", (f"encoder.block.{{n}}.layer.{ours}.weight",))
        for theirs, ours in _LLAMA_CPP_NAMES.items()
    ]
    around = [
        KeyRule("token_embd.weight", ("shared.weight",)),
        KeyRule("enc.output_norm.weight", ("encoder.final_layer_norm.weight",)),
    ]
    return KeyMap([*in_blocks, *around], beside=("dec.{*}", "output.weight"))


def find_weights(file: Checkpoint, prefix: str) -> Weights:
    """The encoder in a file, by the names of either kind. prefix: of the usual ones."""
    is_llama_cpp = "enc.blk.0.attn_q.weight" in file.header.tensors
    own = llama_cpp_key_map() if is_llama_cpp else key_map()
    return Weights(file=file, key_map=own, prefix="" if is_llama_cpp else prefix, tied=TIED_WEIGHTS)


def spec(prefix: str, *, names: tuple[str, ...] = (), note: str = "") -> PartSpec:
    """prefix: of its keys in a checkpoint. names: further prefixes in adapter files, by its place among encoders.

    note: what other programs do with adapter files that have its layers.
    """
    own = key_map()
    return PartSpec(
        name="t5",
        key_map=own,
        key_prefix=prefix,
        adapter_map=own,
        adapter_prefix="lora_te3",
        adapter_names=(*names, *_ADAPTER_NAMES),
        targets=TARGETS,
        blocks=BLOCKS,
        token_table="encoder.embed_tokens",
        embedding_name="t5xxl",  # ComfyUI's name
        reader_notes={"{*}": note} if note else {},
        opt_in="train_t5xxl",
    )


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """T5Config of a v1.1 encoder (gated GELU); the number of heads is a side of the position table."""
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


def read_t5_config(source: Source, weights: Weights) -> dict[str, Any]:
    """From the file or folder of an encoder. Raises UserError for others."""
    shapes = weights.read_shapes()
    require_kind(T5_ENCODER, shapes, weights.file.header.tensors, source.path)
    return select_fields(source.read_config("."), T5_FIELDS) if source.is_folder else config_from_shapes(shapes)


def build(config: Mapping[str, Any]) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**config, dropout_rate=0.0, use_cache=False, is_encoder_decoder=False))


def encode_tokens(encoder: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) ids and bool mask -> (B, L, D); mask None: attention sees padding, as in training."""
    return encoder(input_ids=ids, attention_mask=mask).last_hidden_state


def encode_t5(encoder: Part, tokenizer: Any, captions: Sequence[str], length: int, *, masked: bool) -> list[Tensors]:
    """hidden (length, D) of each caption; masked: attention does not see padding, which is cut, and a mask is added."""
    ids, mask = tokenize(tokenizer, captions, length)
    on_device = to_device(encoder.device, ids, mask)
    hidden = encode_tokens(encoder.module, on_device[0], on_device[1] if masked else None)
    return cut_to_mask(hidden, mask) if masked else [{"hidden": row} for row in hidden]


def apply_prompt_weights(tokenizer: Any, features: Tensors, pieces: WeightedText) -> Tensors:
    """One caption's features multiplied by the weights of its tokens."""
    weights = make_t5_weights(tokenizer, pieces, len(features["hidden"]))
    return multiply_by_weights(features, weights)


def make_t5_weights(tokenizer: Any, pieces: WeightedText, length: int) -> Tensor:
    """(length,) weights of the tokens of `tokenize`; 1 for end and padding."""
    tokens = tokenizer(strip_weights(pieces), truncation=True, max_length=length, return_offsets_mapping=True)
    weights = compute_token_weights(pieces, [end for _, end in tokens.offset_mapping])
    return torch.tensor(weights + [1.0] * (length - len(weights)))


def tokenize(tokenizer: Any, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """(B, L) ids and (B, L) bool mask of the tokens that are not padding, on the CPU."""
    tokens = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask.bool()
