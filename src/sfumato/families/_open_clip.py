"""OpenCLIP's text encoders (ViT-H, ViT-bigG): key map between their names and transformers', pooled vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sfumato.families import _clip
from sfumato.families.part import Network, PartSpec
from sfumato.families.source import Source, select_fields
from sfumato.families.weights import Weights
from sfumato.formats.keymap import KeyMap, KeyRule, make_identity_map

CLIP_G_NAMES = ("text_encoder_2", "clip_g", "clip_g.transformer", "text_encoders.clip_g.transformer")  # of ViT-bigG
TEXT_LEVEL = "text_model."  # only in transformers' class with a projection
TARGETS = tuple(TEXT_LEVEL + target for target in _clip.TARGETS)
BLOCKS = tuple(TEXT_LEVEL + block for block in _clip.BLOCKS)
_UNUSED_KEYS = ("logit_scale", "attn_mask", *_clip.UNUSED_KEYS)
PROJECTED_FILE_KEYS = KeyMap(  # of a folder, or of an encoder's own file
    [KeyRule("{*}", ("{*}",))], (*_clip.UNUSED_KEYS, "logit_scale"), _clip.IMAGE_ENCODER_KEYS
)


def key_map(*, projected: bool, unused: int | None = None) -> KeyMap:
    """OpenCLIP's names <-> CLIPTextModelWithProjection's, or without its projection CLIPTextModel's.

    unused: index of a last layer in the file that the model does not use.
    """
    level = TEXT_LEVEL if projected else ""
    theirs, ours = "transformer.resblocks.{n}.", level + "encoder.layers.{n}."
    qkv = [f"{ours}self_attn.{name}_proj." for name in "qkv"]
    rules = [
        KeyRule("token_embedding", (level + "embeddings.token_embedding",)),
        KeyRule("positional_embedding", (level + "embeddings.position_embedding.weight",)),
        KeyRule("ln_final", (level + "final_layer_norm",)),
        KeyRule(theirs + "ln_1", (ours + "layer_norm1",)),
        KeyRule(theirs + "ln_2", (ours + "layer_norm2",)),
        KeyRule(theirs + "attn.in_proj_weight", tuple(name + "weight" for name in qkv)),
        KeyRule(theirs + "attn.in_proj_bias", tuple(name + "bias" for name in qkv)),
        KeyRule(theirs + "attn.out_proj", (ours + "self_attn.out_proj",)),
        KeyRule(theirs + "mlp.c_fc", (ours + "mlp.fc1",)),
        KeyRule(theirs + "mlp.c_proj", (ours + "mlp.fc2",)),
    ]
    if projected:
        rules.append(KeyRule("text_projection", ("text_projection.weight",), "transpose"))
    drop = _UNUSED_KEYS if projected else (*_UNUSED_KEYS, "text_projection")
    drop = drop if unused is None else (*drop, f"transformer.resblocks.{unused}.{{*}}")
    return KeyMap(rules, drop, _clip.IMAGE_ENCODER_KEYS)


def projected_spec(
    name: str, prefix: str, adapter_prefix: str, file_map: KeyMap, *, names: tuple[str, ...] = CLIP_G_NAMES
) -> PartSpec:
    """Of a CLIPTextModelWithProjection. prefix: of its keys in a checkpoint. file_map: the checkpoint's keys.

    names: further prefixes in adapter files.
    """
    return PartSpec(
        name=name,
        key_map=file_map,
        key_prefix=prefix,
        adapter_map=make_identity_map(),
        adapter_prefix=adapter_prefix,
        adapter_names=names,
        targets=TARGETS,
        blocks=BLOCKS,
        token_table=TEXT_LEVEL + _clip.TOKEN_TABLE,
        embedding_name=name,
    )


def count_layers(keys: Sequence[str], prefix: str) -> int:
    """Layers of the encoder whose keys start with `prefix`."""
    start = prefix + "transformer.resblocks."
    return len({key[len(start) :].split(".")[0] for key in keys if key.startswith(start)})


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """CLIPTextConfig from our names and shapes, with or without the projection."""
    names = {name.removeprefix(TEXT_LEVEL): shape for name, shape in shapes.items()}
    config = _clip.config_from_shapes(names, activation="gelu")
    if "text_projection.weight" in shapes:
        config["projection_dim"] = shapes["text_projection.weight"][0]
    return config


def read_open_clip(source: Source, folder: str, spec: PartSpec) -> Network:
    """The encoder in a checkpoint's file, under the spec's keys. folder: its name in diffusers' layout."""
    weights = Weights(file=source.file, key_map=spec.key_map, prefix=spec.key_prefix)
    config = config_from_shapes(weights.read_shapes()) | source.read_config(folder)
    return Network(spec=spec, config=config, weights=weights)


def read_projected(source: Source, folder: str, spec: PartSpec) -> Network:
    """The same of a CLIPTextModelWithProjection, in a file or in a folder: a model's or its own."""
    if not source.is_folder:
        return read_open_clip(source, folder, spec)
    folder = source.find_inner(folder)
    weights = Weights(file=source.open_weights(folder), key_map=PROJECTED_FILE_KEYS)
    return Network(spec=spec, config=select_fields(source.read_config(folder), _clip.CLIP_FIELDS), weights=weights)


def build_projected(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(_clip.make_config(config))


def encode_hidden_and_pooled(encoder: Any, ids: Tensor, end: int, *, layer: int) -> tuple[Tensor, Tensor]:
    """(B, 77) ids -> output of the `layer`-th block from the end (B, 77, D), and projected vector (B, P)."""
    hidden, last = _clip.encode_states(encoder.text_model, ids, layer=layer)
    return hidden, encoder.text_projection(_clip.take_at_end(last, ids, end))
