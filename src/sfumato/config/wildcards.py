r"""Variants in prompts, with the syntax of sd-scripts' gen_img: {a|b} is one of both, chosen by the seed.

{2$$a|b|c} is two of them, {1-2$$a|b|c} one or two, {2$$ and $$a|b|c} joins them with another text than a comma.
{e$$a|b} stands for both, one prompt each, in all combinations with other such places. Braces nest; \{ is a brace.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations, product
from random import Random

from sfumato.errors import UserError

INNERMOST = re.compile(r"(?<!\\)\{([^{}]*)(?<!\\)\}")
COUNT = re.compile(r"(\d+)(?:-(\d+))?\$\$")
SEPARATOR = ", "
MAX_VARIANTS = 10_000  # prompts of one line


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is between braces."""

    choices: tuple[str, ...]
    least: int = 1  # number of choices that are taken
    most: int = 1
    separator: str = SEPARATOR
    every: bool = False  # all of them, in prompts of their own

    def draw(self, random: Random) -> str:
        """So many choices, in any order."""
        return self.separator.join(random.sample(self.choices, random.randint(self.least, self.most)))

    def list_all(self) -> list[str]:
        """Every combination, the smaller ones first, in the order of the choices."""
        counts = range(self.least, self.most + 1)
        return [self.separator.join(some) for some in chain(*(combinations(self.choices, n) for n in counts))]


def parse_variant(text: str, prompt: str) -> Variant:
    """What is between braces, in parts; UserError where more is wanted than there is."""
    every = text[:3].lower() == "e$$"
    rest = text[3:] if every else text
    count = COUNT.match(rest)
    least = most = 1
    if count:
        least, most = sorted((int(count[1]), int(count[2] or count[1])))
        rest = rest[count.end() :]
    separator, found, choices = rest.partition("$$")
    choices = tuple((choices if found else rest).split("|"))
    if least > len(choices):
        raise UserError(
            f"the prompt {prompt[:60]!r}: {{{text}}} takes {least} of {len(choices)}",
            code="prompt-variants-too-few",
            fix=f"write a number up to {len(choices)}",
        )
    return Variant(
        choices=choices, least=least, most=min(most, len(choices)), separator=separator if found else SEPARATOR,
        every=every,
    )  # fmt: skip


def has_variants(prompt: str) -> bool:
    return INNERMOST.search(prompt) is not None


def has_every(prompt: str) -> bool:
    """Whether the prompt stands for several whatever the seed."""
    return any(parse_variant(match[1], prompt).every for match in INNERMOST.finditer(prompt))


def expand_variants(prompt: str, seed: int) -> list[str]:
    """The prompts that one stands for with this seed; itself alone where it has no variants."""
    return list(draw_variants(prompt, Random(seed), seed))


def draw_variants(prompt: str, random: Random, seed: int) -> Iterator[str]:
    """As gen_img draws them: from the innermost braces outwards, each level anew, and within one from its end."""
    if not has_variants(prompt):
        yield prompt.replace("\\{", "{").replace("\\}", "}")
        return
    places = list(INNERMOST.finditer(prompt))
    parsed = [parse_variant(place[1], prompt) for place in places]
    every = [choice.list_all() for choice in parsed if choice.every]
    check_count(every, prompt)
    for chosen in product(*every):
        given, text = list(chosen), prompt
        for place, choice in zip(reversed(places), reversed(parsed), strict=True):
            text = text[: place.start()] + (given.pop() if choice.every else choice.draw(random)) + text[place.end() :]
        yield from draw_variants(text, Random(seed), seed)


def check_count(every: list[list[str]], prompt: str) -> None:
    count = 1
    for choices in every:
        count *= len(choices)
    if count > MAX_VARIANTS:
        raise UserError(
            f"the prompt {prompt[:60]!r} stands for {count} prompts, more than {MAX_VARIANTS}",
            code="prompt-variants-too-many",
            fix="remove e$$ from some of its braces, which takes one of them instead",
        )
