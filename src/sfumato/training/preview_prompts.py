"""Prompts beside the captions: of previews and concepts, remembered before their encoders are unloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from sfumato.config import Config
from sfumato.config.concepts import read_concepts
from sfumato.config.prompts import read_prompts
from sfumato.data.cache.entries import TensorCache
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenTextEncoders, encode_captions
from sfumato.plan import RunPlan
from sfumato.training.fingerprints import make_text_keys


class PromptToRemember(NamedTuple):
    """A prompt as it is encoded."""

    text: str
    negative: bool
    weighted: bool  # whether (words) and [words] have more and less weight


@dataclass(frozen=True, kw_only=True)
class PreviewPrompts:
    """Prompts whose features are remembered before their encoders are unloaded."""

    text: FrozenTextEncoders
    prompts: Sequence[PromptToRemember]


def remember_prompts(prompts: PreviewPrompts, part: str, cache: TensorCache) -> None:
    """Take the features of the prompts that the cache knows, and add those that it does not."""
    text = prompts.text
    keys = {
        kind: make_text_keys(text.model, part, cache.store, negative=kind[0], weighted=kind[1])
        for kind in {(prompt.negative, prompt.weighted) for prompt in prompts.prompts}
    }
    for caption, negative, weighted in prompts.prompts:
        key = keys[negative, weighted].make_key(caption)
        features = cache.get(key)
        if features is None and part in text.model.blueprint.cached_parts:
            continue  # no preview is made of it
        if features is None:
            text.model.parts[part].load()
            (features,) = encode_captions(text.model, part, [caption], weighted=weighted, negative=negative)
            if cache.store.writable:
                cache.put(key, features)
        text.remember(part, caption, features, weighted=weighted, negative=negative)
    cache.store.flush()


def read_preview_prompts(plan: RunPlan, model: Family) -> PreviewPrompts:
    """What previews and concepts will have encoded, with the features that are known so far: none."""
    return make_preview_prompts(plan.config, model, plan.method.rewrite_caption)


def make_preview_prompts(config: Config, model: Family, rewrite: Callable[[str], str] = str) -> PreviewPrompts:
    """The same for any run with this model. rewrite: the method's change of a prompt before encoding."""
    path = config.samples.sample_prompts
    prompts: list[PromptToRemember] = []
    for prompt in read_prompts(path) if path else ():
        for text, negative in prompt.texts:
            prompts.append(PromptToRemember(rewrite(text), negative, config.samples.prompt_weighting))
    concepts = read_concepts(config.leco.prompts_file) if config.leco.prompts_file else ()
    for text in dict.fromkeys(chain.from_iterable(concept.prompts for concept in concepts)):
        prompts.append(PromptToRemember(rewrite(text), False, config.captions.weighted_captions))
    text = FrozenTextEncoders(model, weighted=config.captions.weighted_captions)
    return PreviewPrompts(text=text, prompts=prompts)
