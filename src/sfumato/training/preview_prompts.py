"""The prompts of previews, whose features are remembered before their encoders are unloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sfumato.config import Config
from sfumato.config.prompts import read_prompts
from sfumato.data.cache.entries import TensorCache
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenTextEncoders, encode_captions
from sfumato.plan import RunPlan
from sfumato.training.fingerprints import make_text_keys


@dataclass(frozen=True, kw_only=True)
class PreviewPrompts:
    """The prompts of previews, whose features are remembered before their encoders are unloaded."""

    text: FrozenTextEncoders
    captions: Sequence[tuple[str, bool]]  # each as it is encoded, and whether it is a negative prompt
    weighted: bool


def remember_prompts(prompts: PreviewPrompts, part: str, cache: TensorCache) -> None:
    """Take the features of the prompts that the cache knows, and add those that it does not."""
    text, weighted = prompts.text, prompts.weighted
    positive, negatives = (
        make_text_keys(text.model, part, cache.store, weighted=weighted, negative=negative)
        for negative in (False, True)
    )
    for caption, negative in prompts.captions:
        key = (negatives if negative else positive).make_key(caption)
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
    """What previews will have encoded, with the features that are known so far: none."""
    return make_preview_prompts(plan.config, model, plan.method.rewrite_caption)


def make_preview_prompts(config: Config, model: Family, rewrite: Callable[[str], str] = str) -> PreviewPrompts:
    """The same for any run with this model. rewrite: the method's change of a prompt before encoding."""
    path = config.samples.sample_prompts
    captions: list[tuple[str, bool]] = []
    for prompt in read_prompts(path) if path else ():
        captions += [(rewrite(text), negative) for text, negative in prompt.texts]
    text = FrozenTextEncoders(model, weighted=config.captions.weighted_captions)
    return PreviewPrompts(text=text, captions=captions, weighted=config.samples.prompt_weighting)
