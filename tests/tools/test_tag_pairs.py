"""Every two options of the tagger together: tags as a plain account of the rules has them, one rule after the other."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tools.test_tag_choice import CSV, MAPPING, MAPPING_NUMBERS, PROBABILITIES, choose

KINDS = {"9": "rating", "0": "general", "4": "character", "1": "other"}
OUTPUTS = [(row.split(",")[1], KINDS[row.split(",")[2]]) for row in CSV.split()[1:]]
MAPPED = [
    (MAPPING[str(i)]["tag"], MAPPING[str(i)]["category"].lower()) if str(i) in MAPPING else ("", "other")
    for i in range(len(MAPPING_NUMBERS))
]
SINGLE: list[dict[str, Any]] = [
    {"thresh": 0.45},
    {"general_threshold": 0.6},
    {"character_threshold": 0.7},
    {"remove_underscore": True},
    {"undesired_tags": "1girl,long_hair"},
    {"undesired_tags": "long hair, one piece"},
    {"tag_replacement": r"1girl,a\, b\;c;long hair,mane"},
    {"tag_replacement": "nami_(one_piece),robin_(one_piece);long_hair,1girl"},
    {"character_tag_expand": True},
    {"character_tags_first": True},
    {"always_first_tags": "red_eyes,1girl,absent"},
    {"always_first_tags": "a, long hair"},
    {"use_rating_tags": True},
    {"use_rating_tags_as_last_tag": True},
    {"use_quality_tags": True},
    {"use_quality_tags_as_last_tag": True},
    {"caption_separator": "; "},
    {"copyright_threshold": 0.7},
]


def rewrite(name: str, kind: str, given: dict[str, Any], *, mapped: bool) -> str:
    separator = given.get("caption_separator", ", ")
    pairs = re.split(r"(?<!\\);", given.get("tag_replacement", ""))
    replacements = dict(re.split(r"(?<!\\),", pair) for pair in pairs if pair)
    replacements = {old: new.replace("\\,", ",").replace("\\;", ";") for old, new in replacements.items()}

    def to_spaces(text: str) -> str:
        return text.replace("_", " ") if given.get("remove_underscore") and len(text) > 3 else text

    def in_two(text: str) -> str:
        last = text.rfind("(")
        expands = given.get("character_tag_expand") and kind == "character" and last > 0 and text.endswith(")")
        return f"{text[: last - 1]}{separator}{text[last + 1 : -1]}" if expands else text

    def replaced(text: str) -> str:
        return replacements.get(text, text)

    return in_two(replaced(to_spaces(name))) if mapped else replaced(to_spaces(in_two(name)))


def account(given: dict[str, Any], *, mapped: bool) -> str:
    """What the options say, in the order in which they are documented."""
    outputs, numbers = (MAPPED, MAPPING_NUMBERS) if mapped else (OUTPUTS, PROBABILITIES)
    separator = given.get("caption_separator", ", ")

    def listed(option: str) -> list[str]:
        return [tag.strip() for tag in given.get(option, "").split(separator.strip()) if tag.strip()]

    def threshold(kind: str) -> float:
        return given.get(f"{kind}_threshold", given.get("thresh", 0.35))

    named = [
        (rewrite(name, kind, given, mapped=mapped), kind, p) for (name, kind), p in zip(outputs, numbers, strict=True)
    ]
    unwanted = listed("undesired_tags")
    kept = [tag for tag in named if tag[1] not in ("rating", "quality", "other") and tag[2] >= threshold(tag[1])]
    kept = [tag for tag in kept if tag[0] not in unwanted]
    if mapped:
        kept.sort(key=lambda tag: -tag[2])
    characters = [tag[0] for tag in kept if tag[1] == "character"]
    others = [tag[0] for tag in kept if tag[1] != "character"]
    if given.get("character_tags_first"):
        tags = [*(characters if mapped else characters[::-1]), *others]
    else:
        tags = [tag[0] for tag in kept] if mapped else [*others, *characters]
    for kind in ("quality", "rating"):
        of_kind = [tag for tag in named if tag[1] == kind]
        if not of_kind:
            continue
        best = max(of_kind, key=lambda tag: tag[2])[0]
        first, last = given.get(f"use_{kind}_tags"), given.get(f"use_{kind}_tags_as_last_tag")
        if best in unwanted or not (first or last):
            continue
        at_end = bool(last) and (mapped or not first)
        tags = [*tags, best] if at_end else [best, *tags]
    for tag in listed("always_first_tags"):
        if tag in tags:
            tags.remove(tag)
            tags.insert(0, tag)
    return separator.join(tags)


@pytest.mark.parametrize("mapped", [False, True])
def test_every_two_options(tmp_path: Path, mapped: bool) -> None:
    pairs = [{**first, **second} for first, second in combinations(SINGLE, 2)]
    results = {}
    for given in (*SINGLE, *pairs):
        expected = account(given, mapped=mapped)
        assert choose(tmp_path, is_mapping=mapped, **given) == expected, given
        results[str(given)] = expected
    assert len(set(results.values())) > 50  # the options do something, together, too
