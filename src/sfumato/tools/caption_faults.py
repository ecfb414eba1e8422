"""Captions and tags that repeat themselves or contradict each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

COUNTS = re.compile(r"(\d+)\+?(girl|boy|other)s?")
SEVERAL_TAG = re.compile(r"multiple (girl|boy|other)s")
OPPOSITES = (  # of which an image of one person has one at most
    ("long hair", "short hair"), ("open mouth", "closed mouth"), ("day", "night"), ("indoors", "outdoors"),
    ("open eyes", "closed eyes"), ("barefoot", "shoes"), ("simple background", "detailed background"),
)  # fmt: skip
COLOR_WORDS = (
    "aqua", "black", "blonde", "blue", "brown", "gray", "green", "grey", "orange", "pink", "purple", "red", "silver",
    "white", "yellow",
)  # fmt: skip
SAME_COLORS = {"grey": "gray", "yellow": "blonde", "silver": "gray"}
COLORED = re.compile(rf"\b({'|'.join(COLOR_WORDS)}) (hair|eyes)\b")
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
SEVERAL = re.compile(rf"\b({'|'.join(NUMBERS)}|\d+) (?:\w+ ){{0,2}}?(girl|boy|women|men|woman|man)s?\b")
PERSON = re.compile(r"\b(girl|boy|woman|man)\b")
SEX = {"girl": "girl", "woman": "girl", "women": "girl", "boy": "boy", "man": "boy", "men": "boy"}


def list_text_faults(caption: str | None, tags: str | None) -> Iterator[tuple[str, str]]:
    """(kind, what), of a caption in a sentence and of tags between commas; None for what an image does not have."""
    found = [] if tags is None else normalize_tags(tags)
    for tag, count in Counter(found).items():
        if count > 1:
            yield "repeated tags", f"{tag} ×{count}"
    if caption is not None and tags is not None and caption.strip() and normalize_tags(caption) == found:
        yield "caption repeats the tags", "both are the same text"
    yield from (("contradictory tags", text) for text in find_contradictory_tags(found))
    if caption is not None and found:
        yield from (("caption contradicts tags", text) for text in find_contradictions(caption, found))


def normalize_tags(text: str) -> list[str]:
    """In one spelling: small letters, spaces for underscores, no escapes."""
    tags = (tag.replace("\\", "").replace("_", " ").strip().lower() for tag in text.split(","))
    return [tag for tag in tags if tag]


def count_people(tags: Sequence[str]) -> dict[str, set[int]]:
    """girl, boy, other -> the numbers that tags say."""
    counts: dict[str, set[int]] = {}
    for tag in tags:
        if match := COUNTS.fullmatch(tag):
            counts.setdefault(match[2], set()).add(int(match[1]))
    return counts


def find_contradictory_tags(tags: Sequence[str]) -> Iterator[str]:
    counts, present = count_people(tags), set(tags)
    people = sum(max(numbers) for numbers in counts.values())
    multiple = {match[1] for tag in tags if (match := SEVERAL_TAG.fullmatch(tag))}
    for kind, numbers in counts.items():
        if len(numbers) > 1:
            yield " and ".join(f"{number}{kind}{'s' if number > 1 else ''}" for number in sorted(numbers))
        if kind in multiple and max(numbers) == 1:
            yield f"1{kind} and multiple {kind}s"
    if "solo" in present and (people > 1 or multiple):
        yield f"solo and {people if people > 1 else 'several'} people"
    if "no humans" in present and (people or multiple):
        yield "no humans and people"
    if people <= 1 and not multiple:
        for first, second in OPPOSITES:
            if {first, second} <= present:
                yield f"{first} and {second}"


def find_contradictions(caption: str, tags: Sequence[str]) -> Iterator[str]:
    """What a caption says and tags deny."""
    text, counts = " ".join(caption.lower().split()), count_people(tags)
    multiple = any(SEVERAL_TAG.fullmatch(tag) for tag in tags)
    for match in SEVERAL.finditer(text):
        number, kind = NUMBERS.get(match[1]) or int(match[1]), SEX[match[2]]
        if not multiple and counts.get(kind) and number > max(counts[kind]):
            yield f"“{match[0]}”, tagged {max(counts[kind])}{kind}{'s' if max(counts[kind]) > 1 else ''}"
    said = {SEX[match[1]] for match in PERSON.finditer(text)}
    if len(counts) == 1 and not multiple:
        (only,) = counts
        if said and only in ("girl", "boy") and only not in said:
            yield f"a {min(said)}, tagged {max(counts[only])}{only}"
    if "no humans" in tags and said:
        yield f"a {min(said)}, tagged no humans"
    if sum(max(numbers) for numbers in counts.values()) <= 1 and not multiple:
        yield from find_other_colors(text, tags)


def find_other_colors(caption: str, tags: Sequence[str]) -> Iterator[str]:
    """Hair and eyes that have one color in the caption and only others in the tags."""
    tagged: dict[str, set[str]] = {}
    for tag in tags:
        if match := COLORED.fullmatch(tag):
            tagged.setdefault(match[2], set()).add(SAME_COLORS.get(match[1], match[1]))
    for match in COLORED.finditer(caption):
        color, thing = SAME_COLORS.get(match[1], match[1]), match[2]
        if thing in tagged and color not in tagged[thing]:
            yield f"{match[0]}, tagged {min(tagged[thing])} {thing}"
