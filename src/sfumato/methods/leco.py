"""Concepts and sliders (LECO): an adapter of the denoiser that is trained from prompts alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sfumato.config import Config
from sfumato.config.concepts import read_concepts
from sfumato.methods.adapter import AdapterMethod
from sfumato.methods.base import METHODS

PREVIEWED = 16  # concepts in a file's metadata
PREVIEWED_KEYS = ("target", "positive", "unconditional", "neutral", "action", "multiplier", "weight")


@METHODS.register("leco")
class LecoMethod(AdapterMethod):
    """What it trains towards is in training/concept_loss.py; the adapter and its file are those of any other run."""

    def metadata(self) -> Mapping[str, Any]:
        path = self.config.leco.prompts_file
        assert path is not None, "the rules between options require it"
        concepts = read_concepts(path)
        shown = [{key: vars(concept)[key] for key in PREVIEWED_KEYS} for concept in concepts[:PREVIEWED]]
        return {
            **super().metadata(),
            "ss_leco_prompt_count": len(concepts),
            "ss_leco_prompts_file": path.name,
            "ss_leco_preview": json.dumps(shown, ensure_ascii=False),
        }


def cache_prompts(config: Config) -> Config:
    """The options of a run as this method has them: prompts are encoded once, and no image is.

    Networks whose outputs are cached are in no step.
    """
    return config.with_values(
        {"cache_text_encoder_outputs": True, "cache_latents": True, "network_train_unet_only": True}
    )
