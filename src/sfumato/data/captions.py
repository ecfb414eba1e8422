"""Caption processing at each step: a pure function of the text, the rules and the sample's own generator."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from random import Random

from sfumato.errors import UserError

# Placeholders for escaped braces, {{ and }}, from Unicode's private use area.
OPEN, CLOSE = "\ue000", "\ue001"
MAX_CAPTION_BYTES = 1 << 20  # a thousand times what any text encoder reads
WILDCARD = re.compile(r"{([^}]+)}")


def process_caption(text: str, rules: CaptionRules, rng: Random, *, epoch: int, step: int, max_train_steps: int) -> str:
    """The caption that is encoded for one sample at one step.

    epoch counts from 1, step from 0 (optimizer steps already done). Order: prefix and suffix, dropout of the whole
    caption, a template in its place, wildcards, fixed and flexible tags (warmup, shuffle, tag dropout), secondary
    separator.
    """
    if rules.caption_prefix:
        text = f"{rules.caption_prefix} {text}"
    if rules.caption_suffix:
        text = f"{text} {rules.caption_suffix}"
    if drops_caption(rules, rng, epoch):
        return ""
    if rules.templates:
        return rng.choice(rules.templates)
    text = expand_wildcards(text, rng) if rules.enable_wildcard else text.split("\n")[0]
    if rules.changes_tags or has_keep_tokens_separator(text, rules):
        text = change_tags(text, rules, rng, step=step, max_train_steps=max_train_steps)
    if rules.secondary_separator:
        text = text.replace(rules.secondary_separator, rules.caption_separator)
    return text


def drops_caption(rules: CaptionRules, rng: Random, epoch: int) -> bool:
    """Whether the whole caption is dropped; uses the generator only if caption_dropout_rate is set."""
    random_dropout = rules.caption_dropout_rate > 0 and rng.random() < rules.caption_dropout_rate
    interval = rules.caption_dropout_every_n_epochs
    return random_dropout or (interval > 0 and epoch % interval == 0)


def expand_wildcards(text: str, rng: Random) -> str:
    """Choose one line, then one alternative of each {a|b|c}; {{ and }} become single braces, no nesting."""
    if "\n" in text:
        text = rng.choice(text.split("\n"))
    text = text.replace("{{", OPEN).replace("}}", CLOSE)
    text = WILDCARD.sub(lambda match: rng.choice(match[1].split("|")), text)
    return text.replace(OPEN, "{").replace(CLOSE, "}")


def has_keep_tokens_separator(text: str, rules: CaptionRules) -> bool:
    return bool(rules.keep_tokens_separator) and rules.keep_tokens_separator in text


def change_tags(text: str, rules: CaptionRules, rng: Random, *, step: int, max_train_steps: int) -> str:
    """Warmup, shuffle and dropout of the flexible tags; the fixed ones keep their places.

    Joined with the separator and a space.
    """
    first, flexible, last = split_tags(text, rules)
    flexible = flexible[: count_tags_in_use(len(flexible), rules, step, max_train_steps)]
    if rules.shuffle_caption:
        rng.shuffle(flexible)
    if rules.caption_tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if rng.random() >= rules.caption_tag_dropout_rate]
    separator = rules.tag_separator
    return (separator if separator[-1:].isspace() else f"{separator} ").join([*first, *flexible, *last])


def split_tags(text: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    """Fixed tags at the start, flexible tags, fixed tags at the end.

    keep_tokens_separator ends the first two groups and takes precedence over keep_tokens; empty tags are removed then.
    From its third occurrence on it separates tags like caption_separator.
    """
    comma = rules.tag_separator
    if has_keep_tokens_separator(text, rules):
        first, flexible, *rest = text.split(rules.keep_tokens_separator, 2)
        last = "".join(rest).replace(rules.keep_tokens_separator, comma)
        return split_nonempty(first, comma), split_nonempty(flexible, comma), split_nonempty(last, comma)
    tags = [tag.strip() for tag in text.strip().split(comma)]
    return tags[: rules.keep_tokens], tags[rules.keep_tokens :], []


def split_nonempty(text: str, separator: str) -> list[str]:
    """The stripped parts of a text that are not empty."""
    return [part.strip() for part in text.split(separator) if part.strip()]


def count_tags_in_use(tags: int, rules: CaptionRules, step: int, max_train_steps: int) -> int:
    """How many of the leading flexible tags the warmup uses: token_warmup_min at step 0, rising linearly to all."""
    until = rules.token_warmup_step
    if until < 1:
        until = math.floor(until * max_train_steps)
    if step >= until:
        return tags
    return math.floor(step * ((tags - rules.token_warmup_min) / until)) + rules.token_warmup_min


def check_caption_size(count: int, where: str) -> None:
    """UserError for a caption of more bytes than can be meant. where: its file, for messages."""
    if count > MAX_CAPTION_BYTES:
        raise UserError(
            f"{where} has {count:,} bytes, a caption at most {MAX_CAPTION_BYTES:,}; encoders read its beginning alone",
            code="caption-too-long",
            fix="shorten it, or check that it is a caption",
        )


def parse_caption_file(text: str) -> str:
    """The lines of a caption file that are not blank; with wildcards one of them is chosen, else the first is used."""
    text = text.strip()
    if "\n" not in text and "\r" not in text:
        return text
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return "\n".join(line for line in lines if line)


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """The caption options of one subset, with their names and defaults."""

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
    templates: tuple[str, ...] = ()  # captions, one of which takes the place of the image's own

    @property
    def tag_separator(self) -> str:
        """What stands between tags; commas where caption_separator is empty."""
        return self.caption_separator or ","

    @property
    def changes_tags(self) -> bool:
        return self.shuffle_caption or self.token_warmup_step > 0 or self.caption_tag_dropout_rate > 0

    @property
    def varying_options(self) -> tuple[str, ...]:
        """The options in use that make many captions of one, so that text features cannot simply be cached."""
        names = ("shuffle_caption", "token_warmup_step", "caption_tag_dropout_rate", "enable_wildcard", "templates")
        return tuple(name for name in names if vars(self)[name])

    @property
    def has_dropout(self) -> bool:
        return self.caption_dropout_rate > 0 or self.caption_dropout_every_n_epochs > 0
