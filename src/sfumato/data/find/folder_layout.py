"""The subsets that --train_data_dir and --reg_data_dir make: their folders named N_text, or all images in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.common.text import list_some, plural
from sfumato.config import Config
from sfumato.data.find.findings import Findings
from sfumato.data.find.folders import Listing, describe_listing, list_folder, list_recursively
from sfumato.errors import UserError

FOLDER_NAME = re.compile(r"(\d+)(?:_(.*))?")


def list_folder_subsets(config: Config, findings: Findings) -> Iterator[FolderSubset]:
    for root, is_reg in ((config.dataset.train_data_dir, False), (config.dataset.reg_data_dir, True)):
        if root is None:
            continue
        option = "--reg_data_dir" if is_reg else "--train_data_dir"
        with findings.problems.catch():
            subsets = find_folder_subsets(root, option, is_reg, findings)
            if config.is_changed("dataset_repeats") and all(subset.num_repeats is not None for subset in subsets):
                findings.report_no_effect("--dataset_repeats has no effect: the folder names give the repeats")
            yield from subsets


def find_folder_subsets(root: Path, option: str, is_reg: bool, findings: Findings) -> list[FolderSubset]:
    """The folders named N_text; else those at any depth; else the folder itself, with all images below it.

    UserError where there are no images, or images beside the folders N_text.
    """
    listing = read_listing(root, option)
    numbered = [Path(root, name) for name in listing.folders if FOLDER_NAME.fullmatch(name)]
    if numbered and listing.images:
        raise UserError(
            f"{option}: {root} has {plural(len(listing.images), 'image')} ({list_some(listing.images, 3)}) beside the "
            "folder "
            f"{numbered[0].name}",
            code="images-beside-numbered-folders",
            fix="move them into a folder named N_text, where N is the number of repeats",
        )
    if listing.images:
        findings.note(f"{option}: {root} itself holds the images, not folders named N_text; it is used as one subset")
        return [parse_folder_name(root, is_reg, is_root=True)]
    if not numbered:
        numbered = sorted(find_numbered_folders(root))
        if not numbered:
            return [make_root_subset(root, option, is_reg, listing, findings)]
        names = [str(folder.relative_to(root)) for folder in numbered]
        findings.note(
            f"{option}: no folder directly in {root} is named N_text; using those further below: {list_some(names)}"
        )
    report_skipped_folders(root, numbered, option, findings)
    subsets = [parse_folder_name(folder, is_reg) for folder in numbered]
    for subset in subsets:
        if subset.num_repeats == 0:
            findings.note(f"{option}: {subset.image_dir.name} is skipped: 0 repeats")
    return [subset for subset in subsets if subset.num_repeats != 0]


def find_numbered_folders(root: Path) -> Iterator[Path]:
    """Folders named N_text at any depth, but none inside another."""
    queue, seen = [root], set[Path]()
    while queue:
        folder = queue.pop()
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        for name in list_subfolders(folder):
            if FOLDER_NAME.fullmatch(name):
                yield folder / name
            else:
                queue.append(folder / name)


def list_subfolders(folder: Path) -> list[str]:
    try:
        return list_folder(str(folder)).folders
    except OSError:
        return []


def make_root_subset(root: Path, option: str, is_reg: bool, listing: Listing, findings: Findings) -> FolderSubset:
    """The folder itself, for the images in its subfolders; UserError where there are none."""
    below = list_recursively(str(root))
    if not below.images:
        raise UserError(
            f"{option}: no images in {root}; {describe_listing(below if below.others else listing)}",
            code="data-folder-without-images",
            fix="it must hold folders named N_text with the images in them, e.g. 10_cat",
        )
    folders = sorted({name.partition("/")[0] for name in below.images})
    findings.note(
        f"{option}: no folder in {root} is named N_text, so the images in {list_some(folders)} are used as one subset; "
        f"a name like 10_{folders[0]} would repeat them 10 times per epoch"
    )
    return parse_folder_name(root, is_reg, is_root=True)


def report_skipped_folders(root: Path, used: Sequence[Path], option: str, findings: Findings) -> None:
    """Report the images that are in none of the used folders."""
    prefixes = tuple(f"{folder.relative_to(root).as_posix()}/" for folder in used)
    counts: dict[str, int] = {}
    for folder in list_subfolders(root):
        if f"{folder}/" in prefixes:
            continue
        for name in list_all_images(str(root / folder)):
            if not f"{folder}/{name}".startswith(prefixes):
                counts[folder] = counts.get(folder, 0) + 1
    if counts:
        skipped = list_some([f"{name} ({plural(count, 'image')})" for name, count in counts.items()])
        findings.note(f"{option}: skipped {skipped}: the name does not begin with a number of repeats")


def list_all_images(folder: str) -> list[str]:
    """The images in the folder and in its subfolders."""
    try:
        return list_folder(folder).images + list_recursively(folder).images
    except OSError:
        return []


def read_listing(folder: Path, option: str) -> Listing:
    try:
        return list_folder(str(folder))
    except OSError as error:
        raise UserError(
            f"{option}: {folder} cannot be read ({error.strerror})",
            code="data-folder-unreadable",
            fix=f"check {option}",
        ) from error


def parse_folder_name(folder: Path, is_reg: bool, *, is_root: bool = False) -> FolderSubset:
    """Repeats and class tokens from a name N_text. is_root: the folder of the option itself, which may lack them."""
    match = FOLDER_NAME.fullmatch(folder.resolve().name if is_root else folder.name)
    repeats, text = (int(match[1]), match[2]) if match else (None, None)
    return FolderSubset(image_dir=folder, num_repeats=repeats, class_tokens=text or None, is_reg=is_reg)


@dataclass(frozen=True, kw_only=True)
class FolderSubset:
    """What the name of a folder N_text gives."""

    image_dir: Path
    num_repeats: int | None
    class_tokens: str | None
    is_reg: bool
