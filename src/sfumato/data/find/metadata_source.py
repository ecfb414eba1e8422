"""Pictures that are named one by one: by a metadata file, or by a class of the user's own."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.data.find.caption_files import of_fields, with_captions
from sfumato.data.find.folders import list_below, list_folder, read_images
from sfumato.data.find.image_table import Pictures, Texts, path_of
from sfumato.data.find.index import Index
from sfumato.data.find.policy import Policy, some, usable
from sfumato.data.find.report import Report
from sfumato.data.find.settings import SubsetSettings
from sfumato.errors import UserError

SPACE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()


def of_metadata(
    file: Path, subset: SubsetSettings, policy: Policy, report: Report, *, beside: bool = False
) -> Pictures:
    """The images that a metadata file names, with its captions: a JSON object by image, or JSON lines.

    beside: the images lie beside the file, whatever folders it names.
    """
    named = Named(str(file), subset)
    with report.problems.catch():
        for where, key, fields in entries_of(file):
            named.add(where, re.split(r"[/\\]", key)[-1] if beside else key, fields)
        if not named.keys:
            raise UserError(f"{subset.where}: {file} names no images", fix='write {"image.png": {"caption": "..."}}')
    return of_names(named, policy, report)


def entries_of(file: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(where, image, its fields), one after the other; UserError names the line of a fault."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})", fix="check metadata_file or --in_json") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}, is not UTF-8", fix="save it as UTF-8") from error
    lines = file.suffix.lower() == ".jsonl"
    for where, key, fields in entries_of_lines(file, text) if lines else entries_of_object(file, text):
        if not isinstance(fields, dict):
            raise UserError(f"{where} is {json.dumps(fields)[:40]}, not an object", fix='write {"caption": "..."}')
        yield where, key, fields


def entries_of_lines(file: Path, text: str) -> Iterator[tuple[str, str, Any]]:
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}, is not valid JSON: {error}", fix="write one object a line") from error
        key = fields.get("image_path") if isinstance(fields, dict) else None
        if not isinstance(key, str):
            raise UserError(f"{where}, has no image_path", fix='write {"image_path": "...", "caption": "..."}')
        yield where, key, fields


def lines_of(text: str) -> Iterator[str]:
    """One at a time: all lines at once, or an io.StringIO, take several times the memory of the text."""
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end + 1


def entries_of_object(file: Path, text: str) -> Iterator[tuple[str, str, Any]]:
    """The members of one large object, one at a time, so that only one is in memory."""

    def skip(place: int) -> int:
        return SPACE.match(text, place).end()  # pyright: ignore[reportOptionalMemberAccess]

    def wrong(place: int, what: str) -> UserError:
        line = text.count("\n", 0, place) + 1
        return UserError(f"{file}, line {line}, is not valid JSON: {what}", fix="mend the line named")

    place = skip(0)
    if text[place : place + 1] != "{":
        raise UserError(f"{file} does not hold a JSON object", fix='write {"image.png": {"caption": "..."}}')
    place = skip(place + 1)
    while text[place : place + 1] != "}":
        try:
            key, after = DECODER.raw_decode(text, place)
            colon = skip(after)
            if not isinstance(key, str) or text[colon : colon + 1] != ":":
                raise wrong(colon, "a name in quotes and a colon are expected")
            fields, after = DECODER.raw_decode(text, skip(colon + 1))
        except json.JSONDecodeError as error:
            raise wrong(error.pos, error.msg) from error
        yield f"{file}: {key}", key, fields
        place = skip(after)
        if text[place : place + 1] == ",":
            place = skip(place + 1)
        elif text[place : place + 1] != "}":
            raise wrong(place, "a comma or the closing brace is expected")


def of_plugin(subset: SubsetSettings, policy: Policy, report: Report) -> Pictures:
    """The images that an instance of --dataset_class yields, as {"image": path, "caption": text}."""
    assert subset.dataset_class
    named = Named(subset.dataset_class, subset)
    fix = 'yield {"image": path, "caption": text}'
    with report.problems.catch():
        for number, sample in enumerate(instance_of(subset.dataset_class, subset.plugin_facts)):
            where = f"{subset.dataset_class}, sample {number}"
            known = isinstance(sample, Mapping) and set(sample) <= {"image", "caption", "tags"}
            if not known or not isinstance(sample.get("image"), str | Path):
                raise UserError(f"{where} is {sample!r:.60}", fix=fix)
            named.add(where, os.path.abspath(sample["image"]), sample)  # noqa: PTH100
        if not named.keys:
            raise UserError(f"{subset.dataset_class} yields no images", fix=fix)
    return of_names(named, policy, report)


def instance_of(name: str, facts: Mapping[str, Any]) -> Any:
    """An instance of the class package.module.Class, made with those of the facts that it asks for by name."""
    module, _, kind = name.rpartition(".")
    if os.getcwd() not in sys.path:  # noqa: PTH109
        sys.path.append(os.getcwd())  # noqa: PTH109 -- as for a script that is started here
    try:
        found = vars(import_module(module))[kind] if module else None
    except (ImportError, KeyError) as error:
        raise UserError(f"--dataset_class: {name} is not found ({error})", fix="give package.module.Class") from error
    if not inspect.isclass(found) or "__iter__" not in dir(found):
        fix = 'write a class whose __iter__ yields {"image": path, "caption": text}'
        raise UserError(f"--dataset_class: {name} is no class that yields samples", fix=fix)
    wanted = inspect.signature(found).parameters.values()
    unknown = [each.name for each in wanted if each.name not in facts and each.default is each.empty]
    if unknown:
        raise UserError(
            f"--dataset_class: {name} asks for {', '.join(unknown)}", fix=f"it is given {', '.join(facts)} by name"
        )
    return found(**{each.name: facts[each.name] for each in wanted if each.name in facts})


def of_names(named: Named, policy: Policy, report: Report) -> Pictures:
    """The pictures of these names, in their order."""
    subset, where = named.subset, named.where
    if named.again:
        what = f"{len(named.again)} images are named more than once and the first entry counts: {some(named.again)}"
        report.note(f"{where}: {what}")
    captions = Texts.of(named.captions)
    named.captions.clear()  # of a million, they and the set take 200 MB
    named.seen.clear()
    base, places = located(named.keys, subset.image_dir)
    lost = [key for key, place in zip(named.keys, places, strict=True) if place is None]
    if lost:
        what = f"{subset.where}: {len(lost)} of {len(places)} images that {where} names are not there: {some(lost)}"
        report.problems.add(what, fix="check image_dir" if subset.image_dir else "give image_dir")
    there = np.array([i for i, place in enumerate(places) if place is not None], np.int64)
    names = [place for place in places if place is not None]
    del places
    images = read_images(base, names, Index(policy.cache_dir, ("images", base, where)))
    good = usable(images, subset.where, policy, report)
    rows = there[good]
    if len(good) < len(names):
        names = [names[place] for place in good]
    faults = {place: named.faults[row] for place, row in enumerate(rows.tolist()) if row in named.faults}
    texts = (captions.row(row) for row in rows.tolist())
    wanted = with_captions(names, texts, faults, f"in {where}", subset, policy, report, empty=lambda place: False)
    return images.pictures(base, good).captioned(wanted.captions, wanted.keep)


def located(keys: Sequence[str], image_dir: Path | None) -> tuple[str, list[str | None]]:
    """The folder and each image's path below it, None where it is not there.

    A key is a path from the folder, with or without its ending, or one from the current folder, or a whole path. Where
    not all lie in the folder, paths are whole and the folder is "".
    """
    folder = os.path.abspath(image_dir) if image_dir else ""  # noqa: PTH100
    inside = Names(folder, below=True) if folder else None
    found = [inside.find(key) if inside else None for key in keys]
    if all(found):
        return folder, found
    listings: dict[str, Names] = {}

    def outside(path: str) -> str | None:
        parent, name = os.path.split(os.path.abspath(path))  # noqa: PTH100
        if parent not in listings:
            listings[parent] = Names(parent)
        found = listings[parent].find(name)
        return found and os.path.join(parent, found)  # noqa: PTH118

    whole = [
        path_of(folder, name) if name else outside(key) or outside(os.path.join(folder, key))  # noqa: PTH118
        for key, name in zip(keys, found, strict=True)
    ]
    within = folder + os.sep
    if folder and all(path is None or path.startswith(within) for path in whole):
        return folder, [path and path[len(within) :] for path in whole]
    return "", whole


class Names:
    """The images of a folder, found by name, and where there is none of that name, by the name without its ending."""

    def __init__(self, folder: str, *, below: bool = False) -> None:
        try:
            images = list_folder(folder).images + (list_below(folder).images if below else [])
        except OSError:
            images = []
        self.images = dict(zip(images, images, strict=True))

    @cached_property
    def by_stem(self) -> dict[str, str]:
        return {name[: name.rfind(".")]: name for name in reversed(self.images)}

    def find(self, key: str) -> str | None:
        return self.images.get(key) or self.images.get(key.replace("\\", "/")) or self.by_stem.get(key)


class Named:
    """Names and captions as they come in, one by one."""

    def __init__(self, where: str, subset: SubsetSettings) -> None:
        self.where = where
        self.subset = subset
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.seen: set[str] = set()
        self.again: list[str] = []
        self.faults: dict[int, UserError] = {}  # by place

    def add(self, where: str, key: str, fields: Mapping[str, Any]) -> None:
        if key in self.seen:
            self.again.append(key)
            return
        caption, rules = "", self.subset.rules
        try:
            caption = of_fields(fields, where, separator=rules.caption_separator, several_lines=rules.enable_wildcard)
        except UserError as error:
            self.faults[len(self.keys)] = error
        self.seen.add(key)
        self.keys.append(key)
        self.captions.append(caption)
