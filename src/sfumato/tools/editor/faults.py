"""What may be wrong with a caption, by names that the page filters by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from sfumato.data.captions import CaptionRules
from sfumato.tools.caption_faults import find_contradictory_tags, normalize_tags
from sfumato.tools.editor.caption_files import CaptionContent
from sfumato.tools.editor.text_changes import drop_repeated, split_caption_tags

CAPTION_FAULTS: Mapping[str, str] = {  # name -> what the page says
    "missing": "no caption file",
    "empty": "empty caption",
    "unread": "unreadable caption",
    "long": "over the token limit",
    "duplicate": "same caption as another",
    "repeated": "repeated tag",
    "contradictory": "contradictory tags",
    "lines": "several lines",
    "untidy": "stray commas or spaces",
    "damaged": "unreadable image",
}


def find_caption_faults(content: CaptionContent, rules: CaptionRules) -> list[str]:
    """The faults of one caption alone."""
    separator = rules.tag_separator
    if content.problem:
        return ["unread"]
    if content.data is None:
        return ["missing"]
    lines = [line for line in content.text.split("\n") if line.strip()]
    if not lines:
        return ["empty"]
    faults: list[str] = []
    if len(lines) > 1 and not rules.enable_wildcard:
        faults.append("lines")
    tags = [split_caption_tags(line, separator) for line in lines]
    if any(len(drop_repeated(line_tags)) < len(line_tags) for line_tags in tags):
        faults.append("repeated")
    if any(any(find_contradictory_tags(normalize_tags(", ".join(line_tags)))) for line_tags in tags):
        faults.append("contradictory")
    if any(is_untidy(line, separator) for line in lines):
        faults.append("untidy")
    return faults


def is_untidy(line: str, separator: str) -> bool:
    parts = line.split(separator)
    return "  " in line.strip() or any(not part.strip() for part in parts) or any(part.endswith(" ") for part in parts)


def find_duplicates(contents: Sequence[CaptionContent]) -> set[int]:
    """The numbers of captions that another one equals, but for spaces and capital letters."""
    keys = [" ".join(content.text.casefold().split()) for content in contents]
    counts = Counter(keys)
    return {number for number, key in enumerate(keys) if key and counts[key] > 1}
