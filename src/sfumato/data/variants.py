"""Captions of which a cache of text keeps several: the empty one, and up to K realised variants of each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from random import Random

from sfumato.common.seeds import python_random
from sfumato.data.captions import CaptionRules, dropped, process
from sfumato.data.plans import DataPlan, Item, SubsetPlan
from sfumato.errors import Problems

NEVER = ("token_warmup_step",)  # it changes captions with the step, which a kept variant knows nothing of


def variant(text: str, rules: CaptionRules, number: int) -> str:
    """The caption's realised variant of that number (from 0), never left out.

    A function of the caption, its rules and the number alone: other runs and other seeds find the same ones cached, and
    a larger K only adds to them.
    """
    never = replace(rules, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass") + b"\0%d" % number, digest_size=16).digest()
    return process(text, never, Random(int.from_bytes(digest, "little")), epoch=1, step=0, max_train_steps=1)


def longest_form(item: Item, subset: SubsetPlan) -> str:
    """The caption with all its tags, prefix and suffix."""
    never = {"shuffle_caption": False, "caption_tag_dropout_rate": 0.0, "token_warmup_step": 0}
    return variant(item.picture.caption, replace(subset.settings.rules, **never), 0)


def chosen(text: str, rules: CaptionRules, *, variants: int, seed: int, sample: int, epoch: int) -> str:
    """What one sample is trained with; `sample` is its id, which holds the epoch, too. epoch counts from 1."""
    if dropped(rules, python_random(seed, "caption", sample), epoch):
        return ""
    count = variants if rules.varying else 1
    return variant(text, rules, python_random(seed, "variant", sample).randrange(count))


def captions_to_cache(plan: DataPlan, *, variants: int = 1) -> list[str]:
    """Every caption that training can ask for where text is cached, in order, once each."""
    found: dict[str, None] = {}
    for subset in {id(subset): subset for _, subset, _ in plan.used()}.values():
        rules = subset.settings.rules
        if rules.drops:
            found[""] = None
        for item in subset.items:
            for number in range(variants if rules.varying else 1):
                found[variant(item.picture.caption, rules, number)] = None
    return list(found)


def refuse_varying(plan: DataPlan, problems: Problems, *, variants: int = 1) -> None:
    """Options that make ever new captions are a fault beside a cache of text, each named with its subset."""
    for subset in {id(subset): subset for _, subset, _ in plan.used()}.values():
        for name in subset.settings.rules.varying:
            if name in NEVER:
                problems.add(
                    f"{subset.settings.where}: {name} changes captions with the step, which cached text cannot follow",
                    fix=f"leave out {name} or the cache",
                )
            elif variants == 1:
                problems.add(
                    f"{subset.settings.where}: {name} makes ever new captions, but a cache of text keeps one of each",
                    fix=f"give --text_cache_variants K to keep K of each, or leave out {name} or the cache",
                )


def told(plan: DataPlan, *, variants: int) -> Iterator[str]:
    """What the report says of the captions that are kept."""
    subsets = {id(subset): subset for _, subset, _ in plan.used() if subset.settings.rules.varying}.values()
    if subsets and variants > 1:
        texts = variants * sum(len(subset.items) for subset in subsets)
        yield f"text is cached in {variants} variants of each caption, {texts} in all; each sample draws one of its own"
