"""CLIP's text tower: configuration, key map and encoding, shared by the families that read text with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfumato.config import ModelOptions
from sfumato.data.prompt_weighting import Pieces, of_tokens, plain
from sfumato.errors import UserError
from sfumato.families._file_kinds import CLIP, Found, require
from sfumato.families.source import Source, Weights, find_path
from sfumato.formats.keymap import KeyMap, Rule

if TYPE_CHECKING:
    from transformers import CLIPTextConfig

TARGETS = (
    *(f"encoder.layers.{{n}}.self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    *(f"encoder.layers.{{n}}.mlp.{name}" for name in ("fc1", "fc2")),
)
BLOCKS = ("encoder.layers.{n}",)
DROP = ("{*}embeddings.position_ids",)
FILE_KEYS = KeyMap(  # with or without the `text_model.` level; projections that other programs save along are left out
    [Rule("text_model.{*}", ("{*}",)), Rule("{*}", ("{*}",))],
    (*DROP, "text_projection{*}", "logit_scale"),
)
LENGTH = 77  # positions, start and end token included
CHUNK = LENGTH - 2  # tokens of text among them; longer captions are read in several chunks


def key_map() -> KeyMap:
    """transformers 4's `text_model.` level, which checkpoints and adapter names keep and the module lost."""
    return KeyMap([Rule("text_model.{*}", ("{*}",))], DROP)


def config_from_shapes(shapes: Mapping[str, Sequence[int]], *, activation: str = "quick_gelu") -> dict[str, Any]:
    """CLIPTextConfig from our names and shapes; every published tower has heads of 64 channels."""
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    layers = {key.split(".")[2] for key in shapes if key.startswith("encoder.layers.")}
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": activation,
    }


def read_config(source: Source, weights: Weights, *, activation: str = "quick_gelu") -> dict[str, Any]:
    """From the file or folder of a lone tower, with or without the `text_model.` level; UserError where it is none."""
    shapes = weights.shapes()
    plain = Found(source.path, {name.removeprefix("text_model."): shape for name, shape in shapes.items()})
    require(CLIP, plain, weights.file.header.tensors, source.path)
    if source.is_folder:
        return config_of_folder(source.config("."))
    return config_from_shapes(plain, activation=activation)


def config_of_folder(config: Mapping[str, Any]) -> dict[str, Any]:
    """What CLIPTextConfig needs of a published config.json; the token ids there are often wrong and not used."""
    wanted = ("vocab_size", "hidden_size", "projection_dim", "intermediate_size", "num_hidden_layers")
    wanted += ("num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps")
    return {name: config[name] for name in wanted if name in config}


def tokenizer_folders(source: Source, model: ModelOptions, names: Sequence[str]) -> list[Path | None]:
    """For each encoder --tokenizer's value, else the folder of that name beside the checkpoint or inside the model.

    None stands for the vocabulary that ships with the program.
    """
    beside = source.path if source.is_folder else source.path.parent
    found = [beside / name if (beside / name).is_dir() else None for name in names]
    given = [find_path(folder) for folder in model.tokenizer[: len(names)]]
    return [*given, *found[len(given) :]]


def chunks_of(model: ModelOptions) -> int:
    """How many chunks of 75 tokens --max_token_length asks for."""
    return (model.max_token_length or CHUNK) // CHUNK


def check_vocabulary(tokenizer: Any, encoder: Any) -> None:
    """A tokenizer of another model would give ids beyond the embedding table, or the wrong words."""
    rows = encoder.get_input_embeddings().weight.shape[0]
    if len(tokenizer) != rows:
        raise UserError(
            f"the tokenizer knows {len(tokenizer)} tokens, the text encoder {rows}",
            fix="give the folder of the checkpoint's own tokenizer with --tokenizer",
        )


def text_config(config: Mapping[str, Any]) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    last = config["vocab_size"] - 1  # the true end token; published configurations often say 2
    return CLIPTextConfig(**{**config, "bos_token_id": last - 1, "eos_token_id": last})


def build(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextModel

    return CLIPTextModel(text_config(config))


def states(tower: Any, ids: Tensor, *, layer: int) -> tuple[Tensor, Tensor]:
    """(B, 77) ids -> (B, 77, D) twice: the `layer`-th block's output from the end, and the last one's after its norm.

    `tower` is a CLIPTextModel.
    """
    output = tower(input_ids=ids, output_hidden_states=True)
    return output.hidden_states[-layer], output.last_hidden_state


def hidden_states(encoder: Any, ids: Tensor, *, layer: int) -> Tensor:
    """(B, 77) ids -> (B, 77, D): the output of the `layer`-th block from the end, then the final norm."""
    if layer == 1:
        return encoder(input_ids=ids).last_hidden_state
    return encoder.final_layer_norm(states(encoder, ids, layer=layer)[0])


def pooled(encoder: Any, ids: Tensor, end: int) -> Tensor:
    """(B, 77) ids -> (B, D): the final state of the first end token."""
    return at_first_end(hidden_states(encoder, ids, layer=1), ids, end)


def at_first_end(last: Tensor, ids: Tensor, end: int) -> Tensor:
    """(B, 77, D) -> (B, D) at the first end token, found by its id and not as the highest one."""
    place = (ids == end).int().argmax(dim=1)
    return last[torch.arange(len(last), device=last.device), place]


def token_ids(tokenizer: Any, captions: Sequence[str], device: torch.device, *, chunks: int = 1) -> Tensor:
    """(B * chunks, 77) ids, the chunks of a caption one after the other, cut and padded as in training."""
    words = tokenizer(list(captions), add_special_tokens=False, truncation=True, max_length=CHUNK * chunks).input_ids
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = [row for ids in words for row in chunk_rows(ids, chunks, begin, end, pad)]
    return torch.tensor(rows, device=device)


def token_weights(tokenizer: Any, pieces: Pieces, *, chunks: int) -> Tensor:
    """(75 * chunks + 2,) weights at the positions of `join_chunks`; 1 where no word of the text stands."""
    tokens = tokenizer(
        plain(pieces), add_special_tokens=False, truncation=True, max_length=CHUNK * chunks, return_offsets_mapping=True
    )
    weights = of_tokens(pieces, [end for _, end in tokens.offset_mapping])
    return torch.tensor([1.0, *weights, *[1.0] * (CHUNK * chunks - len(weights)), 1.0])


def weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    """(L, D) scaled around its mean, by (L,) weights.

    The field multiplies and then brings the mean of the whole back by one factor, which is nearly the same as long as
    that mean is far from zero, and goes wrong where it is not.
    """
    return hidden + (weights.to(hidden) - 1)[:, None] * (hidden - hidden.mean())  # where the weight is 1: unchanged


def chunk_rows(ids: Sequence[int], chunks: int, begin: int, end: int, pad: int) -> Iterator[list[int]]:
    """Each chunk of 75 as a text of its own: begin, tokens, end, padding; what lies beyond the caption is empty."""
    for start in range(0, CHUNK * chunks, CHUNK):
        part = ids[start : start + CHUNK]
        yield [begin, *part, end, *[pad] * (CHUNK - len(part))]


def join_chunks(hidden: Tensor, chunks: int) -> Tensor:
    """(B * chunks, 77, D) -> (B, 75 * chunks + 2, D): the first begin, every chunk's inside, the last position."""
    if chunks == 1:
        return hidden
    rows = hidden.unflatten(0, (-1, chunks))
    return torch.cat([rows[:, 0, :1], rows[:, :, 1:-1].flatten(1, 2), rows[:, -1, -1:]], dim=1)


def fingerprint(tokenizer: Any, *, layer: int, chunks: int) -> str:
    """What features depend on besides the encoder's weights: the tokenizer, the layer, the length."""
    words = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    return f"tokenizer {words}, padding {tokenizer.pad_token_id}, layer {layer}, {CHUNK * chunks} tokens"
