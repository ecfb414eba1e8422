"""CLIP's text encoder as OpenAI published it: configuration, key map, tokens and encoding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfumato.common.text import plural
from sfumato.config import ModelOptions
from sfumato.data.batch import Tensors
from sfumato.data.prompt_weighting import WeightedText, compute_token_weights, strip_weights
from sfumato.errors import UserError
from sfumato.families._file_kinds import CLIP_ENCODER, ShapeTable, require_kind
from sfumato.families._tokenizers import CLIP_LENGTH, check_vocabulary_size
from sfumato.families.blueprint import Blueprint
from sfumato.families.hub_models import find_tokenizer_path
from sfumato.families.part import Network, PartSpec
from sfumato.families.source import Source, select_fields
from sfumato.families.weights import Weights
from sfumato.formats.keymap import KeyMap, KeyRule

if TYPE_CHECKING:
    from transformers import CLIPTextConfig

TARGETS = (
    *(f"encoder.layers.{{n}}.self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    *(f"encoder.layers.{{n}}.mlp.{name}" for name in ("fc1", "fc2")),
)
BLOCKS = ("encoder.layers.{n}",)
TOKEN_TABLE = "embeddings.token_embedding"
CLIP_L_NAMES = ("text_encoder", "clip_l", "clip_l.transformer", "text_encoders.clip_l.transformer")  # of CLIP-L
UNUSED_KEYS = ("{*}position_ids", "position_ids")  # whatever their name and type: the positions are 0 to 76
IMAGE_ENCODER_KEYS = ("vision_model.{*}", "visual_projection{*}", "visual.{*}")  # in files of the whole of CLIP
CLIP_FILE_KEYS = KeyMap(  # with or without the `text_model.` level; a projection that other programs save is dropped
    [KeyRule("text_model.{*}", ("{*}",)), KeyRule("{*}", ("{*}",))],
    (*UNUSED_KEYS, "text_projection{*}", "logit_scale"),
    IMAGE_ENCODER_KEYS,
)
CLIP_FIELDS = (  # of a published config.json; the token ids there are often wrong
    *("vocab_size", "hidden_size", "projection_dim", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps"),
)
PENULTIMATE = 2  # the layer from the end that later models read, without the final norm
CHUNK_LENGTH = CLIP_LENGTH - 2  # tokens between begin and end token; longer captions are encoded in several chunks
KEEP_MEAN = "original"  # of --emb_normalize_mode


def key_map() -> KeyMap:
    """Removes the `text_model.` level of transformers 4, which checkpoints and adapter names keep."""
    return KeyMap([KeyRule("text_model.{*}", ("{*}",))], UNUSED_KEYS)


def spec(
    name: str,
    prefix: str,
    adapter_prefix: str,
    file_map: KeyMap | None = None,
    *,
    names: tuple[str, ...] = (),
    embedding_name: str = "",
) -> PartSpec:
    """prefix: of its keys in a checkpoint. file_map: the checkpoint's keys where they are not those of `key_map`.

    names: further prefixes in adapter files. embedding_name: in files of textual inversion; default: its name.
    """
    own = key_map()
    return PartSpec(
        name=name,
        key_map=file_map or own,
        key_prefix=prefix,
        adapter_map=own,
        adapter_prefix=adapter_prefix,
        adapter_names=names,
        targets=TARGETS,
        blocks=BLOCKS,
        token_table=TOKEN_TABLE,
        embedding_name=embedding_name or name,
    )


def config_from_shapes(shapes: Mapping[str, Sequence[int]], *, activation: str = "quick_gelu") -> dict[str, Any]:
    """CLIPTextConfig from our names and shapes; every published encoder has heads of 64 channels."""
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


def read_clip_config(source: Source, weights: Weights, *, activation: str = "quick_gelu") -> dict[str, Any]:
    """From the file or folder of an encoder, with or without the `text_model.` level. Raises UserError for others."""
    names = {name.removeprefix("text_model."): shape for name, shape in weights.read_shapes().items()}
    shapes = ShapeTable(source.path, names)
    require_kind(CLIP_ENCODER, shapes, weights.file.header.tensors, source.path)
    config = source.read_config(".") if source.is_folder else {}
    if config and "text_config" not in config:
        return select_fields(config, CLIP_FIELDS)
    whole = config.get("text_config") or {}  # of both encoders; it may only say what differs from the published model
    return config_from_shapes(shapes, activation=activation) | select_fields(whole, CLIP_FIELDS)


def read_clip(source: Source, folder: str, spec: PartSpec) -> Network:
    """The encoder in a checkpoint's file, its keys under the spec's prefix, or in a folder: a model's or its own."""
    if source.is_folder:
        folder = source.find_inner(folder)
        weights = Weights(file=source.open_weights(folder), key_map=CLIP_FILE_KEYS)
        config = select_fields(source.read_config(folder), CLIP_FIELDS)
    else:
        weights = Weights(file=source.file, key_map=CLIP_FILE_KEYS, prefix=spec.key_prefix)
        config = config_from_shapes(weights.read_shapes()) | source.read_config(folder)
    return Network(spec=spec, config=config, weights=weights)


def find_tokenizer_folders(
    blueprint: Blueprint, model: ModelOptions, names: Mapping[str, str]
) -> dict[str, Path | None]:
    """For each encoder --tokenizer's value, else the folder of its name in the model or beside the checkpoint.

    Else the one that the cache keeps where it stands for the encoder. names: encoder -> folder. None: the vocabulary
    that ships with the program.
    """
    source = blueprint.source
    beside = source.path if source.is_folder else source.path.parent
    folders: dict[str, Path | None] = {}
    for part, name in names.items():
        is_there = (beside / name).is_dir()
        folders[part] = beside / name if is_there else blueprint.find_cached_tokenizer(part)
    return folders | {part: find_tokenizer_path(folder) for part, folder in zip(names, model.tokenizer, strict=False)}


def count_chunks(model: ModelOptions) -> int:
    """Chunks of 75 tokens in --max_token_length."""
    return (model.max_token_length or CHUNK_LENGTH) // CHUNK_LENGTH


def check_clip_skip(model: ModelOptions, config: Mapping[str, Any]) -> None:
    """Raise UserError where --clip_skip counts beyond the encoder's layers."""
    layers = config["num_hidden_layers"]
    if (model.clip_skip or 1) > layers:
        raise UserError(
            f"--clip_skip {model.clip_skip} is beyond the {plural(layers, 'layer')} of the text encoder",
            code="clip-skip-beyond-layers",
            fix=f"give 1 (the last layer) to {layers}; 2 is usual for models of anime images",
        )


def check_vocabulary(tokenizer: Any, config: Mapping[str, Any]) -> None:
    """Raise UserError where the tokenizer has not the size of the vocabulary in the encoder's configuration."""
    check_vocabulary_size(len(tokenizer), config["vocab_size"], owner="the checkpoint")


def make_config(config: Mapping[str, Any]) -> CLIPTextConfig:
    """With the token ids that the vocabulary's size implies."""
    from transformers import CLIPTextConfig

    last = config["vocab_size"] - 1  # the true end token; published configurations often say 2
    return CLIPTextConfig(**{**config, "bos_token_id": last - 1, "eos_token_id": last})


def build(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextModel

    return CLIPTextModel(make_config(config))


def encode_states(tower: Any, ids: Tensor, *, layer: int) -> tuple[Tensor, Tensor]:
    """(B, 77) ids -> (B, 77, D) twice: the output of the `layer`-th block from the end, and of the last with its norm.

    tower: a CLIPTextModel.
    """
    output = tower(input_ids=ids, output_hidden_states=True)
    return output.hidden_states[-layer], output.last_hidden_state


def encode_tokens(encoder: Any, ids: Tensor, *, layer: int) -> Tensor:
    """(B, 77) ids -> (B, 77, D): the output of the `layer`-th block from the end, then the final norm."""
    if layer == 1:
        return encoder(input_ids=ids).last_hidden_state
    return encoder.final_layer_norm(encode_states(encoder, ids, layer=layer)[0])


def list_unread_layers(config: Mapping[str, Any], layer: int) -> list[str]:
    """Patterns on the layers above the `layer`-th block from the end."""
    count = config["num_hidden_layers"]
    return [f"encoder.layers.{i}.{{*}}" for i in range(count - layer + 1, count)]


def encode_pooled(encoder: Any, ids: Tensor, end: int) -> Tensor:
    """(B, 77) ids -> (B, D): the final state of the first end token."""
    return take_at_end(encode_tokens(encoder, ids, layer=1), ids, end)


def take_at_end(last: Tensor, ids: Tensor, end: int) -> Tensor:
    """(B, 77, D) -> (B, D) at the first token with the id `end`, which need not be the highest id."""
    positions = (ids == end).int().argmax(dim=1)
    return last[torch.arange(len(last), device=last.device), positions]


def tokenize(tokenizer: Any, captions: Sequence[str], device: torch.device, *, chunks: int = 1) -> Tensor:
    """(B * chunks, 77) ids, the chunks of a caption one after the other, cut and padded."""
    length = CHUNK_LENGTH * chunks
    tokens = tokenizer(list(captions), add_special_tokens=False, truncation=True, max_length=length)
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows: list[list[int]] = []
    for ids in tokens.input_ids:
        rows += iterate_chunks(ids, chunks, begin, end, pad)
    return torch.tensor(rows).to(device, non_blocking=True)


def make_clip_weights(tokenizer: Any, pieces: WeightedText, *, chunks: int) -> Tensor:
    """(75 * chunks + 2,) weights at the positions of `join_chunks`; 1 for begin, end and padding."""
    tokens = tokenizer(
        strip_weights(pieces),
        add_special_tokens=False,
        truncation=True,
        max_length=CHUNK_LENGTH * chunks,
        return_offsets_mapping=True,
    )
    weights = compute_token_weights(pieces, [end for _, end in tokens.offset_mapping])
    return torch.tensor([1.0, *weights, *[1.0] * (CHUNK_LENGTH * chunks - len(weights)), 1.0])


def apply_prompt_weights(
    tokenizer: Any, features: Tensors, pieces: WeightedText, *, chunks: int = 1, mode: str = KEEP_MEAN
) -> Tensors:
    """One caption's features with its tokens scaled by their weights. mode: of --emb_normalize_mode."""
    hidden = features["hidden"]
    weights = make_clip_weights(tokenizer, pieces, chunks=chunks)[: len(hidden)]
    return {**features, "hidden": scale_tokens(hidden, weights, mode)}


def scale_tokens(hidden: Tensor, weights: Tensor, mode: str = KEEP_MEAN) -> Tensor:
    """(L, D) scaled by (L,) weights: around its mean, alone ("none"), or with its mean absolute value kept ("abs").

    Instead of the first sd-scripts multiplies and then rescales everything to the old mean, which is nearly the same
    where the mean is far from zero and unstable where it is near.
    """
    if mode != KEEP_MEAN:
        scaled = hidden * weights.to(hidden)[:, None]
        return scaled if mode == "none" else scaled * (hidden.abs().mean() / scaled.abs().mean())
    return hidden + (weights.to(hidden) - 1)[:, None] * (hidden - hidden.mean())  # where the weight is 1: unchanged


def iterate_chunks(ids: Sequence[int], chunks: int, begin: int, end: int, pad: int) -> Iterator[list[int]]:
    """Each chunk of 75 as a text of its own: begin, tokens, end, padding; chunks beyond the caption are empty texts."""
    for start in range(0, CHUNK_LENGTH * chunks, CHUNK_LENGTH):
        part = ids[start : start + CHUNK_LENGTH]
        yield [begin, *part, end, *[pad] * (CHUNK_LENGTH - len(part))]


def join_chunks(hidden: Tensor, chunks: int) -> Tensor:
    """(B * chunks, 77, D) -> (B, 75 * chunks + 2, D): the first begin, the text positions, the last position."""
    if chunks == 1:
        return hidden
    rows = hidden.unflatten(0, (-1, chunks))
    return torch.cat([rows[:, 0, :1], rows[:, :, 1:-1].flatten(1, 2), rows[:, -1, -1:]], dim=1)


def fingerprint_clip(tokenizer: Any, *, layer: int, chunks: int, mode: str = KEEP_MEAN) -> str:
    """What features depend on besides the weights: tokenizer, layer, length, how weighted words are scaled."""
    words = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    scaling = "" if mode == KEEP_MEAN else f", weights {mode}"
    length = f"{CHUNK_LENGTH * chunks} tokens"
    return f"tokenizer {words}, padding {tokenizer.pad_token_id}, layer {layer}, {length}{scaling}"
