"""Images that are named one by one, in a metadata file or by a dataset class of the user."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.common.json_toml import decode_json, decode_json_value
from sfumato.common.text import list_some, plural
from sfumato.common.text_files import read_text_file
from sfumato.data.find.caption_files import fill_missing_captions, join_caption_fields, report_shortened
from sfumato.data.find.findings import Findings
from sfumato.data.find.folders import read_images
from sfumato.data.find.image_formats import UNREAD_EXTENSIONS, get_extension
from sfumato.data.find.image_notes import report_unread
from sfumato.data.find.image_table import ImageTable, TextColumn
from sfumato.data.find.named_files import locate_images
from sfumato.data.find.named_references import attach_named_references, list_reference_names
from sfumato.data.find.policy import Policy, select_valid_images
from sfumato.data.find.settings import SubsetSettings
from sfumato.errors import UserError

JSON_SPACE = re.compile(r"[ \t\n\r]*")
OBJECT_FIX = 'write {"image.png": {"caption": "..."}}'
SAMPLE_FIX = 'yield {"image": path, "caption": text}'


def load_metadata_images(
    file: Path, subset: SubsetSettings, policy: Policy, findings: Findings, *, beside: bool = False
) -> ImageTable:
    """The images that a metadata file names, with its captions: a JSON object by image, or JSON lines.

    beside: the images are in the file's folder, whatever folders it names.
    """
    images = NamedImages(str(file), subset)
    with findings.problems.catch():
        for where, key, fields in read_entries(file):
            images.add(where, re.split(r"[/\\]", key)[-1] if beside else key, fields)
        if not images.keys:
            raise UserError(f"{subset.where}: {file} names no images", code="metadata-without-images", fix=OBJECT_FIX)
    return load_named_images(images, policy, findings)


def read_entries(file: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(place for messages, image, its fields), one by one. UserError names the line of a fault."""
    try:
        text = read_text_file(file)
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror})",
            code="metadata-file-unreadable",
            fix="check metadata_file or --in_json",
        ) from error
    is_lines = file.suffix.lower() == ".jsonl"
    for where, key, fields in parse_json_lines(file, text) if is_lines else parse_json_object(file, text):
        if not isinstance(fields, dict):
            raise UserError(
                f"{where} is {json.dumps(fields)[:40]}, not an object",
                code="metadata-entry-not-object",
                fix='write {"caption": "..."}',
            )
        yield where, key, fields


def parse_json_lines(file: Path, text: str) -> Iterator[tuple[str, str, Any]]:
    for number, line in enumerate(iterate_lines(text), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            fields = decode_json(line)
        except ValueError as error:
            raise UserError(
                f"{where}, is not valid JSON: {error}",
                code="metadata-line-invalid-json",
                fix="write one object per line",
            ) from error
        key = fields.get("image_path") if isinstance(fields, dict) else None
        if not isinstance(key, str):
            raise UserError(
                f"{where}, has no image_path",
                code="metadata-line-without-image",
                fix='write {"image_path": "...", "caption": "..."}',
            )
        yield where, key, fields


def iterate_lines(text: str) -> Iterator[str]:
    """One line at a time: all at once, or an io.StringIO, take several times the memory of the text."""
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end + 1


def parse_json_object(file: Path, text: str) -> Iterator[tuple[str, str, Any]]:
    """The members of one large object, one at a time, so that only one is in memory."""

    def skip_space(position: int) -> int:
        return JSON_SPACE.match(text, position).end()  # pyright: ignore[reportOptionalMemberAccess]

    def make_error(position: int, what: str) -> UserError:
        line = text.count("\n", 0, position) + 1
        return UserError(
            f"{file}, line {line}, is not valid JSON: {what}", code="metadata-invalid-json", fix="fix that line"
        )

    position = skip_space(0)
    if text[position : position + 1] != "{":
        raise UserError(f"{file} does not hold a JSON object", code="metadata-not-an-object", fix=OBJECT_FIX)
    position = skip_space(position + 1)
    while text[position : position + 1] != "}":
        try:
            key, after = decode_json_value(text, position)
            colon = skip_space(after)
            if not isinstance(key, str) or text[colon : colon + 1] != ":":
                raise make_error(colon, "a name in quotes and a colon are expected")
            fields, after = decode_json_value(text, skip_space(colon + 1))
        except json.JSONDecodeError as error:
            raise make_error(error.pos, error.msg) from error
        yield f"{file}: {key}", key, fields
        position = skip_space(after)
        if text[position : position + 1] == ",":
            position = skip_space(position + 1)
        elif text[position : position + 1] != "}":
            raise make_error(position, "a comma or the closing brace is expected")


def load_plugin_images(subset: SubsetSettings, policy: Policy, findings: Findings) -> ImageTable:
    """The images that an instance of --dataset_class yields, as {"image": path, "caption": text}."""
    assert subset.dataset_class
    images = NamedImages(subset.dataset_class, subset)
    with findings.problems.catch():
        for number, sample in enumerate(create_instance(subset.dataset_class, subset.class_arguments)):
            where = f"{subset.dataset_class}, sample {number}"
            is_known = isinstance(sample, Mapping) and set(sample) <= {"image", "caption", "tags"}
            if not is_known or not isinstance(sample.get("image"), str | Path):
                raise UserError(f"{where} is {sample!r:.60}", code="dataset-class-bad-sample", fix=SAMPLE_FIX)
            images.add(where, os.path.abspath(sample["image"]), sample)  # noqa: PTH100
        if not images.keys:
            raise UserError(f"{subset.dataset_class} yields no images", code="dataset-class-no-images", fix=SAMPLE_FIX)
    return load_named_images(images, policy, findings)


def create_instance(name: str, arguments: Mapping[str, Any]) -> Any:
    """An instance of the class package.module.Class, made with those of the arguments that it takes by name."""
    module, _, class_name = name.rpartition(".")
    if os.getcwd() not in sys.path:  # noqa: PTH109
        sys.path.append(os.getcwd())  # noqa: PTH109 -- as for a script that is started here
    try:
        dataset_class = vars(import_module(module))[class_name] if module else None
    except (ImportError, KeyError) as error:
        raise UserError(
            f"--dataset_class: {name} cannot be imported ({error})",
            code="dataset-class-not-found",
            fix="give package.module.Class",
        ) from error
    if not inspect.isclass(dataset_class) or "__iter__" not in dir(dataset_class):
        raise UserError(
            f"--dataset_class: {name} is no class that yields samples",
            code="dataset-class-not-iterable",
            fix='write a class whose __iter__ yields {"image": path, "caption": text}',
        )
    parameters = inspect.signature(dataset_class).parameters.values()
    unknown: list[str] = []
    for parameter in parameters:
        if parameter.name not in arguments and parameter.default is parameter.empty:
            unknown.append(parameter.name)
    if unknown:
        raise UserError(
            f"--dataset_class: {name} requires {', '.join(unknown)}",
            code="dataset-class-unknown-argument",
            fix=f"it can take {', '.join(arguments)} by name",
        )
    names = [parameter.name for parameter in parameters if parameter.name in arguments]
    return dataset_class(**{key: arguments[key] for key in names})


def load_named_images(named: NamedImages, policy: Policy, findings: Findings) -> ImageTable:
    """The images with these names, in their order."""
    subset, where = named.subset, named.where
    if named.repeated:
        findings.note(
            f"{where}: {plural(len(named.repeated), 'image is', 'images are')} named more than once and the first "
            "entry counts: "
            f"{list_some(named.repeated)}"
        )
    captions = TextColumn.encode(named.captions)
    named.captions.clear()  # of a million, they and the set take 200 MB
    named.seen.clear()
    base, paths = locate_images(named.keys, subset.image_dir)
    missing = [key for key, path in zip(named.keys, paths, strict=True) if path is None]
    if missing:
        report_unread([key for key in missing if get_extension(key) in UNREAD_EXTENSIONS], where, findings)
        findings.problems.add(
            f"{subset.where}: {len(missing)} of {plural(len(paths), 'image')} that {where} names are missing: "
            f"{list_some(missing)}",
            code="metadata-images-missing",
            fix="check image_dir" if subset.image_dir else "give image_dir",
        )
    present = np.array([row for row, path in enumerate(paths) if path is not None], np.int64)
    names = [path for path in paths if path is not None]
    del paths
    images = read_images(base, names, policy.index("images", base, where))
    valid = select_valid_images(images, subset.where, policy, findings)
    rows = present[valid]
    if len(valid) < len(names):
        names = [names[row] for row in valid]
    faults = {index: named.faults[row] for index, row in enumerate(rows.tolist()) if row in named.faults}
    texts = (captions.get_row(row) for row in rows.tolist())
    table = fill_missing_captions(
        names, texts, faults, f"in {where}", subset, policy, findings, empty=lambda _index: False
    )
    report_shortened(named.shortened, len(named.keys), subset, findings)
    found = images.make_table(base, valid).with_captions(table.captions, table.kept_rows)
    references = [named.references[row] for row in rows[table.kept_rows].tolist()]
    return attach_named_references(found, references, subset, policy, findings)


class NamedImages:
    """Names and captions, collected one by one."""

    def __init__(self, where: str, subset: SubsetSettings) -> None:
        self.where = where
        self.subset = subset
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.references: list[tuple[str, ...]] = []
        self.seen: set[str] = set()
        self.repeated: list[str] = []
        self.shortened: list[str] = []  # those whose caption has several lines, of which the first is used
        self.faults: dict[int, UserError] = {}  # by index in `keys`

    def add(self, where: str, key: str, fields: Mapping[str, Any]) -> None:
        """where: for messages."""
        if key in self.seen:
            self.repeated.append(key)
            return
        caption, rules = "", self.subset.rules
        try:
            caption = join_caption_fields(
                fields, where, separator=rules.tag_separator, several_lines=rules.enable_wildcard
            )
        except UserError as error:
            self.faults[len(self.keys)] = error
        if not rules.enable_wildcard and "\n" in caption:
            self.shortened.append(key)
            caption = caption[: caption.index("\n")]
        self.seen.add(key)
        self.keys.append(key)
        self.captions.append(caption)
        self.references.append(list_reference_names(fields))
