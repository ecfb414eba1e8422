"""The subsets that --train_data_dir and --reg_data_dir make: their folders named N_text, or all images in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sfumato.config import Config
from sfumato.data.find.folders import Listing, list_below, list_folder, what_is_there
from sfumato.data.find.report import Report
from sfumato.errors import UserError

FOLDER_NAME = re.compile(r"(\d+)(?:_(.*))?")


def folder_subsets(config: Config, report: Report) -> Iterator[FolderSubset]:
    """Faults go to the report's problems."""
    for root, is_reg in ((config.dataset.train_data_dir, False), (config.dataset.reg_data_dir, True)):
        if root is None:
            continue
        option = "--reg_data_dir" if is_reg else "--train_data_dir"
        with report.problems.catch():
            found = subsets_of(root, option, is_reg, report)
            if config.changed("dataset_repeats") and all(folder.num_repeats is not None for folder in found):
                report.no_effect("--dataset_repeats has no effect: the folders' names say how often to repeat")
            yield from found


def subsets_of(root: Path, option: str, is_reg: bool, report: Report) -> list[FolderSubset]:
    """The folders named N_text; else those further below; else the folder itself, with all images below it.

    UserError, which says what was found instead, where there are no images, or images beside the folders N_text.
    """
    listing = listed(root, option)
    named = [Path(root, name) for name in listing.folders if FOLDER_NAME.fullmatch(name)]
    if named and listing.images:
        some = ", ".join(listing.images[:3])
        raise UserError(
            f"{option}: {root} has {len(listing.images)} pictures ({some}) beside the folder {named[0].name}",
            fix="move them into a folder named N_text, where N is how often to repeat them",
        )
    if not named and listing.images:
        report.note(f"{option}: the pictures lie in {root} itself, not in folders named N_text; it is taken as one")
        return [of_name(root, is_reg, itself=True)]
    further = [] if named else sorted(numbered_below(root))
    if further:
        some = ", ".join(str(folder.relative_to(root)) for folder in further[:5])
        report.note(f"{option}: no folder directly in {root} is named N_text; took those further below: {some}")
    elif not named:
        return [all_below(root, option, is_reg, listing, report)]
    tell_left_out(root, named or further, option, report)
    subsets = [of_name(folder, is_reg) for folder in named or further]
    for subset in subsets:
        if subset.num_repeats == 0:
            report.note(f"{option}: {subset.image_dir.name} has 0 repeats and is left out")
    return [subset for subset in subsets if subset.num_repeats != 0]


def numbered_below(root: Path) -> Iterator[Path]:
    """Folders named N_text at any depth, but none inside another."""
    waiting, seen = [root], set[Path]()
    while waiting:
        folder = waiting.pop()
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        for name in folders_in(folder):
            if FOLDER_NAME.fullmatch(name):
                yield folder / name
            else:
                waiting.append(folder / name)


def folders_in(folder: Path) -> list[str]:
    try:
        return list_folder(str(folder)).folders
    except OSError:
        return []


def all_below(root: Path, option: str, is_reg: bool, listing: Listing, report: Report) -> FolderSubset:
    """The folder itself, for the images in the folders below it; UserError where there are none."""
    below = list_below(str(root))
    if not below.images:
        what = what_is_there(below if below.others else listing)
        fix = "it must hold folders named N_text with the pictures in them, as 10_cat"
        raise UserError(f"{option}: no pictures in {root}; {what}", fix=fix)
    folders = sorted({name.partition("/")[0] for name in below.images})
    report.note(
        f"{option}: no folder in {root} is named N_text, so the pictures in {', '.join(folders[:5])} are taken as one "
        f"set; a name as 10_{folders[0]} would repeat them 10 times an epoch"
    )
    return of_name(root, is_reg, itself=True)


def tell_left_out(root: Path, taken: list[Path], option: str, report: Report) -> None:
    """Say which images lie in none of the folders that are taken."""
    prefixes = tuple(f"{folder.relative_to(root).as_posix()}/" for folder in taken)
    counts: dict[str, int] = {}
    for folder in folders_in(root):
        if f"{folder}/" in prefixes:
            continue
        for name in all_images(str(root / folder)):
            if not f"{folder}/{name}".startswith(prefixes):
                counts[folder] = counts.get(folder, 0) + 1
    if counts:
        some = ", ".join(f"{name} ({count} images)" for name, count in list(counts.items())[:5])
        report.note(f"{option}: {some} left out: the name does not begin with a number of repeats")


def all_images(folder: str) -> list[str]:
    try:
        return list_folder(folder).images + list_below(folder).images
    except OSError:
        return []


def listed(folder: Path, option: str) -> Listing:
    try:
        return list_folder(str(folder))
    except OSError as error:
        raise UserError(f"{option}: {folder} cannot be read ({error.strerror})", fix=f"check {option}") from error


def of_name(folder: Path, is_reg: bool, *, itself: bool = False) -> FolderSubset:
    """What a folder's name says; `itself`: the folder that was given, of which the name may say nothing."""
    match = FOLDER_NAME.fullmatch(folder.resolve().name if itself else folder.name)
    repeats, text = (int(match[1]), match[2]) if match else (None, None)
    return FolderSubset(image_dir=folder, num_repeats=repeats, class_tokens=text or None, is_reg=is_reg)


@dataclass(frozen=True, kw_only=True)
class FolderSubset:
    """What a folder named N_text says."""

    image_dir: Path
    num_repeats: int | None
    class_tokens: str | None
    is_reg: bool
