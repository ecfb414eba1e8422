"""Caption variants of the text cache: the empty caption, and up to K variants of each caption."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from random import Random

from sfumato.common.seeds import python_random
from sfumato.common.text import plural
from sfumato.data.captions import CaptionRules, drops_caption, process_caption
from sfumato.data.plans import DataPlan, SubsetPlan
from sfumato.errors import Problems

UNCACHEABLE_OPTIONS = (
    "token_warmup_step",
)  # it changes captions with the step, of which a cached variant is independent


def make_variant(text: str, rules: CaptionRules, number: int) -> str:
    """The variant of a caption with this number (from 0), without caption dropout.

    A function of the caption, its rules and the number alone: runs with other seeds use the same cache entries, and a
    larger K only adds to them.
    """
    without_dropout = replace(rules, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass") + b"\0%d" % number, digest_size=16).digest()
    rng = Random(int.from_bytes(digest, "little"))
    return process_caption(text, without_dropout, rng, epoch=1, step=0, max_train_steps=1)


def make_longest_variant(text: str, rules: CaptionRules) -> str:
    """The caption with all its tags, prefix and suffix."""
    unchanged_tags = {"shuffle_caption": False, "caption_tag_dropout_rate": 0.0, "token_warmup_step": 0}
    return make_variant(text, replace(rules, **unchanged_tags), 0)


def choose_variant(text: str, rules: CaptionRules, *, variants: int, seed: int, sample: int, epoch: int) -> str:
    """The caption of one sample. sample: its id, which is another in each epoch; epoch counts from 1."""
    if drops_caption(rules, python_random(seed, "caption", sample), epoch):
        return ""
    count = variants if rules.varying_options else 1
    return make_variant(text, rules, python_random(seed, "variant", sample).randrange(count))


def list_captions_to_cache(plan: DataPlan, *, variants: int = 1) -> list[str]:
    """Every caption that training with cached text can use, in order, without duplicates."""
    captions: dict[str, None] = {}
    for subset in list_used_subsets(plan):
        rules = subset.settings.rules
        if rules.has_dropout:
            captions[""] = None
        for item in subset.items:
            for number in range(variants if rules.varying_options else 1):
                captions[make_variant(item.image.caption, rules, number)] = None
    return list(captions)


def list_used_subsets(plan: DataPlan) -> list[SubsetPlan]:
    """The subsets with at least one sample, of training and validation, in order."""
    return list({id(subset): subset for _, subset, _ in plan.iterate_used()}.values())


def refuse_varying(plan: DataPlan, problems: Problems, *, variants: int = 1) -> None:
    """A problem for each option of a subset that makes more captions than the text cache keeps."""
    for subset in list_used_subsets(plan):
        for name in subset.settings.rules.varying_options:
            if name in UNCACHEABLE_OPTIONS:
                problems.add(
                    f"{subset.settings.where}: {name} changes captions with the step, but cached text is fixed",
                    code="step-dependent-captions-cached",
                    fix=f"remove {name}, or --cache_text_encoder_outputs",
                )
            elif variants == 1:
                problems.add(
                    f"{subset.settings.where}: {name} changes captions at every step, but cached text has one variant",
                    code="varying-captions-cached",
                    fix=f"--text_cache_variants K keeps K of each; or remove {name}, or --cache_text_encoder_outputs",
                )


def describe_variants(plan: DataPlan, *, variants: int) -> Iterator[str]:
    """A line for the report where captions are cached in several variants."""
    subsets = [subset for subset in list_used_subsets(plan) if subset.settings.rules.varying_options]
    if subsets and variants > 1:
        texts = variants * sum(len(subset.items) for subset in subsets)
        yield (
            f"text is cached in {plural(variants, 'variant')} of each caption, {texts} in total; each sample uses a "
            "random one"
        )
