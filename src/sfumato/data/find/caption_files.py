"""The captions of image files: which text file belongs to which image, and what becomes of images without any."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np

from sfumato.data.captions import of_file
from sfumato.data.find.folders import read_captions
from sfumato.data.find.image_table import Column, Texts
from sfumato.data.find.index import Index
from sfumato.data.find.policy import TOLD, Policy, some, told_of_memory
from sfumato.data.find.report import Report
from sfumato.data.find.settings import SubsetSettings
from sfumato.errors import UserError

OTHER_ENDINGS = (".txt", ".caption", ".json")  # looked for where the subset has no file with the configured ending


def captions_beside(
    names: Sequence[str], pairing: Pairing, folder: str, subset: SubsetSettings, policy: Policy, report: Report
) -> Wanted:
    """The captions of these images, from the files that were paired with them."""
    captions = read_captions(folder, pairing.files, Index(policy.cache_dir, ("captions", folder, pairing.ending)))
    told_of_memory(captions.saved, policy, report)
    if np.array_equal(pairing.of_image, np.arange(len(captions.texts))):
        contents = iter(captions.texts)  # faster than one by one
    else:
        contents = (captions.texts.row(file) if file >= 0 else "" for file in pairing.of_image.tolist())
    unread = np.flatnonzero(np.isin(pairing.of_image, list(captions.faults))).tolist()
    faults = {place: captions.faults[int(pairing.of_image[place])] for place in unread}
    texts = read_contents(contents, repeat(pairing.ending), lambda at: f"{folder}/{pairing.file(at)}", subset, faults)
    what = f"({subset.caption_extension} file beside them)"
    return with_captions(names, texts, faults, what, subset, policy, report, empty=pairing.has_file)


def paired(names: Sequence[str], others: Mapping[str, str], subset: SubsetSettings, report: Report) -> Pairing:
    """With the configured ending, or with another if no image has that one."""
    found = with_ending(names, others, subset.caption_extension)
    if found.files:
        return found
    rest = [with_ending(names, others, ending) for ending in OTHER_ENDINGS if ending != subset.caption_extension]
    best = max(rest, key=lambda pairing: len(pairing.files))
    if best.files:
        report.note(
            f"{subset.where}: no {subset.caption_extension} files; took the {best.count} {best.ending} files "
            f"as captions (--caption_extension {best.ending} says so)"
        )
    return best


def with_ending(names: Sequence[str], others: Mapping[str, str], ending: str) -> Pairing:
    files: list[str] = []
    of_image = np.full(len(names), -1)
    for place, name in enumerate(names):
        stem = name[: name.rfind(".")]
        file = others.get(stem + ending)
        if file is None and stem.count("_") >= 4:  # name_cx_cy_w_h, as face detectors write
            file = others.get(stem.rsplit("_", 4)[0] + ending)
        if file is not None:
            of_image[place] = len(files)
            files.append(file)
    return Pairing(ending=ending, files=files, of_image=of_image)


def read_contents(
    contents: Iterable[str],
    endings: Iterable[str],
    name_of: Callable[[int], str],
    subset: SubsetSettings,
    faults: dict[int, UserError],
) -> Iterator[str]:
    """The captions in caption files with these endings; what cannot be understood is added to the faults, by place."""
    several, separator = subset.rules.enable_wildcard, subset.rules.caption_separator
    for place, (content, ending) in enumerate(zip(contents, endings, strict=False)):
        if ending != ".json" or not content:
            yield of_file(content, several_lines=several)
            continue
        caption = ""
        try:
            caption = of_json(content, name_of(place), separator=separator, several_lines=several)
        except UserError as error:
            faults[place] = error
        yield caption


def of_json(text: str, path: str, *, separator: str, several_lines: bool) -> str:
    """The caption in a JSON file: a text, or an object with `caption`, `tags` or both; UserError for anything else."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}", fix="mend or remove it") from error
    if isinstance(content, str):
        return of_file(content, several_lines=several_lines)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no caption", fix='write {"caption": "..."}')
    return of_fields(content, path, separator=separator, several_lines=several_lines)


def of_fields(content: Mapping[str, Any], where: str, *, separator: str, several_lines: bool) -> str:
    """Caption, separator and tags; with several lines the tags follow each of them. UserError names a wrong type."""
    caption, tags = content.get("caption"), content.get("tags")
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        tags = f"{separator} ".join(str(tag) for tag in tags)
    for name, value in (("caption", caption), ("tags", tags)):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {name} is {json.dumps(value)[:40]}, not a text", fix="put it in quotes")
    caption, tags = str(caption or ""), str(tags or "")
    if not several_lines:
        return of_file(separator.join(part for part in (caption, tags) if part), several_lines=False)
    tags = separator.join(line.strip() for line in tags.splitlines() if line.strip())
    lines = of_file(caption, several_lines=True).split("\n") if caption.strip() else []
    return "\n".join(f"{line}{separator}{tags}" if tags else line for line in lines) if lines else tags


def with_captions(
    names: Sequence[str],
    texts: Iterator[str],
    faults: Mapping[int, UserError],
    what: str,
    subset: SubsetSettings,
    policy: Policy,
    report: Report,
    *,
    empty: Callable[[int], bool],
) -> Wanted:
    """Give images without a caption the class tokens, or do with them what --on_missing_caption says.

    faults: of captions that cannot be read, by place; may grow while the texts are taken. what: where a caption was
    looked for. empty: whether there was one, but nothing in it.
    """
    missing: list[int] = []
    spare = subset.class_tokens or ""

    def each() -> Iterator[str]:
        for place, text in enumerate(texts):
            if not text and place not in faults:
                missing.append(place)
            yield text or spare

    captions = Texts.of(each())
    told = list({id(fault): fault for fault in faults.values()}.values())
    report.problems.found.extend(told[:TOLD])
    if len(told) > TOLD:
        report.problems.add(f"{subset.where}: {len(told) - TOLD} more captions are wrong like those named")
    keep = np.arange(len(captions))
    if missing and told_of_missing([names[place] for place in missing], len(names), what, subset, policy, report,
                                   sum(empty(place) for place in missing)):  # fmt: skip
        keep = np.setdiff1d(keep, missing)
        report.left_out[subset.where] |= {names[place] for place in missing}
    return Wanted(captions=captions, keep=keep)


def told_of_missing(
    missing: Sequence[str], images: int, where: str, subset: SubsetSettings, policy: Policy, report: Report, empty: int
) -> bool:
    """Say what becomes of the images without a caption; whether they are left out."""
    what = f"{len(missing)} of {images} images have no caption {where}"
    if empty:
        what += f", {empty} of them an empty {'file' if subset.metadata_file is None else 'entry'}"
    if subset.class_tokens:
        report.note(f"{subset.where}: {what}; they take the class tokens {subset.class_tokens!r}")
    elif policy.on_missing_caption == "error":
        fix = "write them, give class_tokens, or set --on_missing_caption empty (or skip)"
        report.problems.add(f"{subset.where}: {what}: {some(missing)}", fix=fix)
    elif policy.on_missing_caption == "empty":
        report.note(f"{subset.where}: {what}; they train with an empty caption: {some(missing)}")
    else:
        report.note(f"{subset.where}: {what}; they are left out: {some(missing)}")
        return True
    return False


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Which caption file belongs to which image."""

    ending: str
    files: list[str]  # one that several images share appears as often
    of_image: Column  # place in `files`, -1 for none

    @property
    def count(self) -> int:
        return len(set(self.files))

    def has_file(self, place: int) -> bool:
        return bool(self.of_image[place] >= 0)

    def file(self, place: int) -> str:
        return self.files[self.of_image[place]]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A caption for every image, and the places of those that are not left out."""

    captions: Texts
    keep: Column
