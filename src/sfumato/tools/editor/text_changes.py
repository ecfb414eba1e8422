"""What the editor can do to many captions at once, as data that a page sends; each is a function of one text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

ShortText = Annotated[str, Field(max_length=10_000)]
Tag = Annotated[str, Field(min_length=1, max_length=1_000, pattern=r"\S")]


class _Change(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReplaceText(_Change):
    """Every occurrence of a text, as written: no wildcards."""

    action: Literal["replace"]
    find: Annotated[str, Field(min_length=1, max_length=10_000)]
    replacement: ShortText = ""
    match_case: bool = False
    whole_words: bool = False

    def apply(self, text: str, separator: str) -> str:
        pattern = re.escape(self.find)
        if self.whole_words:
            pattern = rf"(?<!\w){pattern}(?!\w)"
        return re.sub(pattern, lambda _: self.replacement, text, flags=0 if self.match_case else re.IGNORECASE)

    def make_label(self) -> str:
        return f"replace “{self.find}” by “{self.replacement}”" if self.replacement else f"remove “{self.find}”"


class AddTag(_Change):
    """At the end where it is not there yet, or at the start, to where it moves if it is there."""

    action: Literal["add"]
    tag: Tag
    at_start: bool = False

    def apply(self, text: str, separator: str) -> str:
        new = drop_repeated(split_caption_tags(self.tag, separator))
        folded = {tag.casefold() for tag in new}
        lines: list[str] = []
        for line in text.split("\n"):
            tags = split_caption_tags(line, separator)
            others = [tag for tag in tags if tag.casefold() not in folded]
            missing = [tag for tag in new if tag.casefold() not in {each.casefold() for each in tags}]
            if text.strip() and not tags:
                pass  # a blank line between others stays one
            elif self.at_start:
                line = line if tags[: len(new)] == new else join_caption_tags([*new, *others], separator)
            elif missing:
                line = join_caption_tags([*tags, *missing], separator)
            lines.append(line)
        return "\n".join(lines)

    def make_label(self) -> str:
        return f"add {self.tag.strip()}{' at the start' if self.at_start else ''}"


class RemoveTag(_Change):
    action: Literal["remove"]
    tag: Tag

    def apply(self, text: str, separator: str) -> str:
        for tag in split_caption_tags(self.tag, separator):
            text = replace_tag(text, separator, tag, [])
        return text

    def make_label(self) -> str:
        return f"remove {self.tag.strip()}"


class RenameTag(_Change):
    """A whole tag; where the new one is there already, once."""

    action: Literal["rename"]
    tag: Tag
    name: Tag

    def apply(self, text: str, separator: str) -> str:
        return replace_tag(text, separator, self.tag, split_caption_tags(self.name, separator))

    def make_label(self) -> str:
        return f"rename {self.tag.strip()} to {self.name.strip()}"


class TidyTags(_Change):
    """No empty or repeated tags, one space after each separator, no blank lines."""

    action: Literal["tidy"]

    def apply(self, text: str, separator: str) -> str:
        lines = [" ".join(line.split()) for line in text.split("\n") if line.strip()]
        return "\n".join(
            join_caption_tags(drop_repeated(split_caption_tags(line, separator)), separator) for line in lines
        )

    def make_label(self) -> str:
        return "tidy"


TextChange = Annotated[ReplaceText | AddTag | RemoveTag | RenameTag | TidyTags, Field(discriminator="action")]


def split_caption_tags(line: str, separator: str) -> list[str]:
    return [tag.strip() for tag in line.split(separator) if tag.strip()]


def join_caption_tags(tags: Sequence[str], separator: str) -> str:
    return (separator if separator[-1:].isspace() else f"{separator} ").join(tags)


def drop_repeated(tags: Sequence[str]) -> list[str]:
    """The first of each, whatever its capital letters."""
    kept: dict[str, str] = {}
    for tag in tags:
        kept.setdefault(tag.casefold(), tag)
    return list(kept.values())


def replace_tag(text: str, separator: str, old: str, new: Sequence[str]) -> str:
    """Other tags in the place of one; lines without it stay as they are."""
    lines: list[str] = []
    for line in text.split("\n"):
        tags = split_caption_tags(line, separator)
        folded = [tag.casefold() for tag in tags]
        if old.strip().casefold() in folded:
            place = folded.index(old.strip().casefold())
            others = [tag for tag in tags if tag.casefold() != old.strip().casefold()]
            fresh = [tag for tag in new if tag.casefold() not in {each.casefold() for each in others}]
            line = join_caption_tags([*others[:place], *fresh, *others[place:]], separator)
        lines.append(line)
    return "\n".join(lines)
