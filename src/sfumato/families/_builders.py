"""How a network is built from its published configuration, by the class that the configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from sfumato.families import (
    _chroma_keys,
    _clip,
    _flux_keys,
    _gemma2,
    _lumina_keys,
    _open_clip,
    _sd3_keys,
    _t5,
    _unet,
    _vae,
)
from sfumato.families.part import Builder
from sfumato.families.source import select_fields


@cache
def make_builders() -> Mapping[str, Builder]:
    """The class that a configuration names -> how it is built here."""

    def drop_names(build: Builder) -> Builder:
        return lambda config: build({name: value for name, value in config.items() if name != "_class_name"})

    return {
        "FluxTransformer2DModel": drop_names(_flux_keys.build),
        "ChromaTransformer2DModel": drop_names(_chroma_keys.build),
        "SD3Transformer2DModel": drop_names(_sd3_keys.build),
        "Lumina2Transformer2DModel": drop_names(_lumina_keys.build),
        "UNet2DConditionModel": drop_names(_unet.build),
        "AutoencoderKL": drop_names(_vae.build),
        "CLIPTextModel": lambda config: _clip.build(select_fields(config, _clip.CLIP_FIELDS)),
        "CLIPTextModelWithProjection": lambda config: _open_clip.build_projected(
            select_fields(config, _clip.CLIP_FIELDS)
        ),
        "T5EncoderModel": lambda config: _t5.build(select_fields(config, _t5.T5_FIELDS)),
        "Gemma2Model": lambda config: _gemma2.build(select_fields(config, _gemma2.GEMMA2_FIELDS)),
    }
