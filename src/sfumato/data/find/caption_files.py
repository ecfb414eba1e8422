"""The captions of image files: which text file belongs to which image, and what happens to images without one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np

from sfumato.common.json_toml import decode_json
from sfumato.common.text import has_lone_surrogate, list_some, plural
from sfumato.data.captions import check_caption_size, parse_caption_file
from sfumato.data.find.findings import Findings
from sfumato.data.find.folders import read_captions
from sfumato.data.find.image_table import IntColumn, TextColumn
from sfumato.data.find.policy import MAX_LISTED_FAULTS, Policy, report_unsaved_index
from sfumato.data.find.settings import SubsetSettings
from sfumato.errors import UserError

FALLBACK_EXTENSIONS = (".txt", ".caption", ".json")  # tried where no file has the configured extension


def load_caption_files(
    names: Sequence[str], pairing: Pairing, folder: str, subset: SubsetSettings, policy: Policy, findings: Findings
) -> CaptionTable:
    """The captions of these images, from the files that were paired with them."""
    captions = read_captions(folder, pairing.files, policy.index("captions", folder, pairing.extension))
    report_unsaved_index(captions.saved, policy, findings)
    if np.array_equal(pairing.file_index, np.arange(len(captions.texts))):
        contents = iter(captions.texts)  # faster than one by one
    else:
        contents = (captions.texts.get_row(file) if file >= 0 else "" for file in pairing.file_index.tolist())
    unread = np.flatnonzero(np.isin(pairing.file_index, list(captions.faults))).tolist()
    faults = {row: captions.faults[int(pairing.file_index[row])] for row in unread}

    def get_path(row: int) -> str:
        return f"{folder}/{pairing.get_file(row)}"

    shortened: list[int] = []
    texts = parse_captions(contents, repeat(pairing.extension), get_path, subset, faults, shortened)
    what = f"({subset.caption_extension} file beside them{pairing.hint})"
    table = fill_missing_captions(names, texts, faults, what, subset, policy, findings, empty=pairing.has_file)
    report_shortened([names[row] for row in shortened], len(names), subset, findings)
    return table


def pair_caption_files(
    names: Sequence[str], others: Mapping[str, str], subset: SubsetSettings, findings: Findings
) -> Pairing:
    """By the configured extension; where it is the default, by another one if no image has a file with that one."""
    configured = pair_by_extension(names, others, subset.caption_extension)
    if configured.files:
        return configured
    fallbacks = [extension for extension in FALLBACK_EXTENSIONS if extension != subset.caption_extension.lower()]
    pairings = [pair_by_extension(names, others, extension) for extension in fallbacks]
    best = max(pairings, key=lambda pairing: len(pairing.files))
    if subset.caption_extension_given:
        hint = f"; there are {best.count} {best.extension} files" if best.files else ""
        return replace(configured, hint=hint)
    if best.files:
        findings.note(
            f"{subset.where}: no {subset.caption_extension} files; took the {best.count} {best.extension} files "
            f"as captions (same as --caption_extension {best.extension})"
        )
    return best


def pair_by_extension(names: Sequence[str], others: Mapping[str, str], extension: str) -> Pairing:
    """Each image's file of its own name; where it has none, one whose name differs in capital letters only."""
    files: list[str] = []
    file_index = np.full(len(names), -1)
    without: list[int] = []
    for row, name in enumerate(names):
        stem = name[: name.rfind(".")]
        file = others.get(stem + extension)
        if file is None and stem.count("_") >= 4:  # name_cx_cy_w_h, as face detectors write
            file = others.get(stem.rsplit("_", 4)[0] + extension)
        if file is not None:
            file_index[row] = len(files)
            files.append(file)
        else:
            without.append(row)
    if without:
        pair_in_any_case(names, without, others, extension, files, file_index)
    return Pairing(extension=extension, files=files, file_index=file_index)


def pair_in_any_case(
    names: Sequence[str],
    rows: Sequence[int],
    others: Mapping[str, str],
    extension: str,
    files: list[str],
    file_index: IntColumn,
) -> None:
    """X.TXT for X.PNG, which most systems take for one name with X.txt; adds to `files` and `file_index`.

    rows: of the images without a file. A file that is another image's own is not taken.
    """
    extension, paired = extension.lower(), set(files)
    free: dict[str, list[str]] = {}
    for file in others:
        lower = file.lower()
        if lower.endswith(extension) and file not in paired:
            free.setdefault(lower, []).append(file)
    if not free:
        return
    for row in rows:
        stem = names[row][: names[row].rfind(".")]
        found = free.get(stem.lower() + extension)
        if found is None and stem.count("_") >= 4:
            found = free.get(stem.rsplit("_", 4)[0].lower() + extension)
        if found is not None:
            file_index[row] = len(files)
            files.append(next((file for file in found if file.startswith(stem)), min(found)))


def parse_captions(
    contents: Iterable[str],
    extensions: Iterable[str],
    get_path: Callable[[int], str],
    subset: SubsetSettings,
    faults: dict[int, UserError],
    shortened: list[int],
) -> Iterator[str]:
    """The captions in the contents of caption files. extensions: of each file.

    Adds what is wrong with a file to `faults`, by row, and the rows whose first line alone is used to `shortened`.
    get_path: row -> the file, for messages.
    """
    several, separator = subset.rules.enable_wildcard, subset.rules.tag_separator
    for row, (content, extension) in enumerate(zip(contents, extensions, strict=False)):
        if extension != ".json" or not content:
            caption = parse_caption_file(content)
        else:
            caption = ""
            try:
                caption = parse_json_caption(content, get_path(row), separator=separator, several_lines=several)
            except UserError as error:
                faults[row] = error
        if not several and "\n" in caption:
            shortened.append(row)
            caption = caption[: caption.index("\n")]
        yield caption


def parse_json_caption(text: str, path: str, *, separator: str, several_lines: bool) -> str:
    """The caption in a JSON file: a string, or an object with `caption`, `tags` or both. UserError for others."""
    try:
        content = decode_json(text)
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON: {error}", code="caption-file-invalid-json", fix="fix or remove it"
        ) from error
    if isinstance(content, str):
        content = {"caption": content}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no caption", code="caption-file-no-caption", fix='write {"caption": "..."}')
    return join_caption_fields(content, path, separator=separator, several_lines=several_lines)


def join_caption_fields(content: Mapping[str, Any], where: str, *, separator: str, several_lines: bool) -> str:
    """Caption, separator and tags, in lines; several_lines: the tags follow each line. UserError for a wrong type."""
    caption, tags = content.get("caption"), content.get("tags")
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        tags = f"{separator} ".join(str(tag) for tag in tags)
    for name, value in (("caption", caption), ("tags", tags)):
        if value is not None and not isinstance(value, str):
            raise UserError(
                f"{where}: {name} is {json.dumps(value)[:40]}, not a string",
                code="caption-field-wrong-type",
                fix="put it in quotes",
            )
    caption, tags = str(caption or ""), str(tags or "")
    check_caption_size(len(caption) + len(tags), where)
    if has_lone_surrogate(caption + tags):
        raise UserError(
            f"{where}: the caption holds half of a letter, e.g. \\ud83d without what belongs to it",
            code="caption-half-letter",
            fix="write the caption again",
        )
    if not several_lines:
        return parse_caption_file(separator.join(part for part in (caption, tags) if part))
    tags = separator.join(line.strip() for line in tags.splitlines() if line.strip())
    lines = parse_caption_file(caption).split("\n") if caption.strip() else []
    if not lines:
        return tags
    return "\n".join(f"{line}{separator}{tags}" if tags else line for line in lines)


def fill_missing_captions(
    names: Sequence[str],
    texts: Iterator[str],
    faults: Mapping[int, UserError],
    what: str,
    subset: SubsetSettings,
    policy: Policy,
    findings: Findings,
    *,
    empty: Callable[[int], bool],
) -> CaptionTable:
    """Give images without a caption the class tokens, or apply --on_missing_caption to them.

    faults: of captions that cannot be read, by row; may grow while `texts` is consumed. what: where captions were
    looked for. empty: row -> whether there is a caption file without text.
    """
    missing: list[int] = []
    fallback = subset.class_tokens or ""

    def fill_texts() -> Iterator[str]:
        for row, text in enumerate(texts):
            if not text and row not in faults:
                missing.append(row)
            yield text or fallback

    captions = TextColumn.encode(fill_texts())
    report_bad_captions(faults, subset, findings)
    rows = np.arange(len(captions))
    if missing:
        missing_names = [names[row] for row in missing]
        empty_count = sum(empty(row) for row in missing)
        if report_missing_captions(missing_names, len(names), what, subset, policy, findings, empty_count):
            rows = np.setdiff1d(rows, missing)
            findings.skipped_names[subset.where] |= set(missing_names)
    return CaptionTable(captions=captions, kept_rows=rows)


def report_shortened(names: Sequence[str], images: int, subset: SubsetSettings, findings: Findings) -> None:
    """Report captions of several lines, of which the first is used. names: of their images."""
    if names:
        findings.note(
            f"{subset.where}: {len(names)} of {plural(images, 'caption has', 'captions have')} several lines, and "
            "only the first line of each is "
            f"used: {list_some(names)} (--enable_wildcard: one of the lines is chosen at random each time)"
        )


def report_bad_captions(faults: Mapping[int, UserError], subset: SubsetSettings, findings: Findings) -> None:
    """One problem per fault, up to a limit; a file that several images share is reported once."""
    distinct = list({id(fault): fault for fault in faults.values()}.values())
    findings.problems.found.extend(distinct[:MAX_LISTED_FAULTS])
    if len(distinct) > MAX_LISTED_FAULTS:
        findings.problems.add(
            f"{subset.where}: {plural(len(distinct) - MAX_LISTED_FAULTS, 'more caption is', 'more captions are')} "
            "wrong",
            code="more-bad-captions",
            fix="fix the ones listed first",
        )


def report_missing_captions(
    missing: Sequence[str],
    images: int,
    where: str,
    subset: SubsetSettings,
    policy: Policy,
    findings: Findings,
    empty: int,
) -> bool:
    """Report what happens to the images without a caption; returns whether they are skipped."""
    what = f"{len(missing)} of {plural(images, 'image has', 'images have')} no caption {where}"
    if empty:
        what += f", {empty} of them an empty {'file' if subset.metadata_file is None else 'entry'}"
    if subset.rules.templates:
        return False  # which need no captions
    if subset.class_tokens:
        findings.note(f"{subset.where}: {what}; they get the class tokens {subset.class_tokens!r}")
    elif policy.on_missing_caption == "error":
        findings.problems.add(
            f"{subset.where}: {what}: {list_some(missing)}",
            code="captions-missing",
            fix="write them, give class_tokens, or set --on_missing_caption empty (or skip)",
        )
    elif policy.on_missing_caption == "empty":
        findings.note(f"{subset.where}: {what}; they train with an empty caption: {list_some(missing)}")
    else:
        findings.note(f"{subset.where}: {what}; they are skipped: {list_some(missing)}")
        return True
    return False


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Which caption file belongs to which image."""

    extension: str
    files: list[str]  # a file that several images share appears once for each
    file_index: IntColumn  # for each image, -1 for none
    hint: str = ""  # for the message about images without a caption

    @property
    def count(self) -> int:
        """Distinct files."""
        return len(set(self.files))

    def has_file(self, row: int) -> bool:
        return bool(self.file_index[row] >= 0)

    def get_file(self, row: int) -> str:
        return self.files[self.file_index[row]]


@dataclass(frozen=True, kw_only=True)
class CaptionTable:
    """A caption for every image, and the rows of the images that are not skipped."""

    captions: TextColumn
    kept_rows: IntColumn
