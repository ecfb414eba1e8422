"""What happens to a caption at each step: a pure function of the text, the rules and a generator of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

# Doubled braces stand for themselves; these characters of Unicode's private use area hold their place meanwhile.
OPEN, CLOSE = "\ue000", "\ue001"
CHOICE = re.compile(r"{([^}]+)}")


def process(text: str, rules: CaptionRules, rng: Random, *, epoch: int, step: int, max_train_steps: int) -> str:
    """The caption that is encoded for one sample at one step.

    epoch counts from 1, step from 0 (optimizer steps already done). Order: prefix and suffix, dropout of the whole
    caption, wildcards, fixed and flexible tags (warm-up, shuffle, tag dropout), secondary separator.
    """
    if rules.caption_prefix:
        text = f"{rules.caption_prefix} {text}"
    if rules.caption_suffix:
        text = f"{text} {rules.caption_suffix}"
    if dropped(rules, rng, epoch):
        return ""
    text = wildcard(text, rng) if rules.enable_wildcard else text.split("\n")[0]
    if rules.changes_tags or separated(text, rules):
        text = change_tags(text, rules, rng, step=step, max_train_steps=max_train_steps)
    if rules.secondary_separator:
        text = text.replace(rules.secondary_separator, rules.caption_separator)
    return text


def dropped(rules: CaptionRules, rng: Random, epoch: int) -> bool:
    """Whether the whole caption is left out; draws only where a rate is set."""
    by_chance = rules.caption_dropout_rate > 0 and rng.random() < rules.caption_dropout_rate
    every = rules.caption_dropout_every_n_epochs
    return by_chance or (every > 0 and epoch % every == 0)


def wildcard(text: str, rng: Random) -> str:
    """One line of several, then one alternative for each {a|b|c}; {{ and }} become single braces, nothing nests."""
    if "\n" in text:
        text = rng.choice(text.split("\n"))
    text = text.replace("{{", OPEN).replace("}}", CLOSE)
    text = CHOICE.sub(lambda found: rng.choice(found[1].split("|")), text)
    return text.replace(OPEN, "{").replace(CLOSE, "}")


def separated(text: str, rules: CaptionRules) -> bool:
    return bool(rules.keep_tokens_separator) and rules.keep_tokens_separator in text


def change_tags(text: str, rules: CaptionRules, rng: Random, *, step: int, max_train_steps: int) -> str:
    """Warm-up, shuffle and dropout of the flexible tags; the fixed ones stay where they are. Joined with ", "."""
    first, flexible, last = split_tags(text, rules)
    flexible = flexible[: tags_in_use(len(flexible), rules, step, max_train_steps)]
    if rules.shuffle_caption:
        rng.shuffle(flexible)
    if rules.caption_tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if rng.random() >= rules.caption_tag_dropout_rate]
    return ", ".join([*first, *flexible, *last])


def split_tags(text: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    """Fixed tags at the start, flexible tags, fixed tags at the end.

    keep_tokens_separator marks the ends of the first two and makes keep_tokens void; empty tags vanish then. Separators
    after the second one separate tags like any other.
    """
    comma = rules.caption_separator
    if separated(text, rules):
        first, flexible, *last = text.split(rules.keep_tokens_separator, 2)
        last = "".join(last).replace(rules.keep_tokens_separator, comma)
        parts = [[tag.strip() for tag in part.split(comma) if tag.strip()] for part in (first, flexible, last)]
        return parts[0], parts[1], parts[2]
    tags = [tag.strip() for tag in text.strip().split(comma)]
    return tags[: rules.keep_tokens], tags[rules.keep_tokens :], []


def tags_in_use(tags: int, rules: CaptionRules, step: int, max_train_steps: int) -> int:
    """How many of the leading flexible tags the warm-up admits: token_warmup_min at step 0, then more, at last all."""
    until = rules.token_warmup_step
    if until < 1:
        until = math.floor(until * max_train_steps)
    if step >= until:
        return tags
    return math.floor(step * ((tags - rules.token_warmup_min) / until)) + rules.token_warmup_min


def replace_words(text: str, replacements: Mapping[str, str | Sequence[str]], rng: Random) -> str:
    """A trained word's vectors in place of the word, in order; the word "" replaces the whole caption by a template.

    A caption that was left out stays empty: call this only for captions that were not dropped.
    """
    for word, replacement in replacements.items():
        if word == "":
            text = replacement if isinstance(replacement, str) else rng.choice(replacement)
        else:
            assert isinstance(replacement, str), "only the whole caption can be replaced by one of several templates"
            text = text.replace(word, replacement)
    return text


def of_file(text: str, *, several_lines: bool) -> str:
    """The caption in a caption file: its first line, or with wildcards all its lines that are not blank."""
    if "\n" not in text and "\r" not in text:
        return text.strip()
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return "\n".join(line for line in lines if line) if several_lines else lines[0]


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """The caption options of one subset; names and defaults are the options' own."""

    caption_separator: str = ","
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    token_warmup_min: int = 1
    token_warmup_step: float = 0
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0

    @property
    def changes_tags(self) -> bool:
        return self.shuffle_caption or self.token_warmup_step > 0 or self.caption_tag_dropout_rate > 0

    @property
    def varying(self) -> tuple[str, ...]:
        """The options in force that make an unbounded number of captions of one; they exclude caching its features."""
        rules = ("shuffle_caption", "token_warmup_step", "caption_tag_dropout_rate", "enable_wildcard")
        return tuple(name for name in rules if vars(self)[name])

    @property
    def drops(self) -> bool:
        return self.caption_dropout_rate > 0 or self.caption_dropout_every_n_epochs > 0
