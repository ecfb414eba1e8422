"""The images that the caption editor shows, each with the caption file that training would read, or would find new."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sfumato.config import Config
from sfumato.data.captions import CaptionRules
from sfumato.data.find.caption_files import pair_caption_files
from sfumato.data.find.findings import Findings
from sfumato.data.find.folder_layout import parse_folder_name
from sfumato.data.find.folders import Listing, list_folder, list_recursively, read_images
from sfumato.data.find.index import Index, cache_folder
from sfumato.data.find.settings import SubsetSettings, make_subset_settings, read_datasets
from sfumato.data.find.sources import find_images
from sfumato.data.find.tar_source import is_archive_path
from sfumato.errors import Problems, UserError


@dataclass(frozen=True, kw_only=True)
class EditedImage:
    """An image and its caption file, which need not exist."""

    path: Path
    name: str  # below the folder that is edited, with /
    caption: Path
    rules: CaptionRules
    width: int  # pixels, upright; 0 where the header is at fault
    height: int
    version: str  # changes with the file
    fault: str  # "" for an image that training would read


@dataclass(frozen=True, kw_only=True)
class EditedDataset:
    """Everything that one page shows."""

    title: str
    images: tuple[EditedImage, ...]
    notes: tuple[str, ...]


def find_edited_dataset(config: Config) -> EditedDataset:
    """The images of --dataset_config, else all in --train_data_dir and below it. UserError where there are none."""
    findings = Findings(problems=Problems(), strict=False, notes=[])
    images: dict[Path, EditedImage] = {}
    subsets = list(list_sources(config, findings))
    for subset, listing in subsets:
        prefix = f"{subset.source.name}/" if len(subsets) > 1 else ""
        for image in read_edited_images(subset, listing, prefix, config, findings):
            images.setdefault(image.path, image)
    findings.problems.raise_all()
    dataset = config.dataset.dataset_config or config.dataset.train_data_dir
    assert dataset is not None
    if not images:
        raise UserError(f"{dataset} has no images", code="editor-no-images", fix="give a folder of images")
    return EditedDataset(
        title=str(dataset),
        images=tuple(images.values()),
        notes=tuple(findings.notes),
    )


def list_sources(config: Config, findings: Findings) -> Iterator[tuple[SubsetSettings, Listing]]:
    """Each source's settings, and the files in it. Faults are added to the findings."""
    folder = config.dataset.train_data_dir
    if config.dataset.dataset_config is None and config.dataset.in_json is None and folder is not None:
        settings = make_subset_settings(str(folder), (), config, folder=parse_folder_name(folder, False, is_root=True))
        yield settings, list_everything(folder)
        return
    for _, _, subsets in read_datasets(config, findings):
        for subset in subsets:
            if subset.metadata_file or subset.dataset_class or is_archive_path(subset.source):
                findings.problems.add(
                    f"{subset.where}: only captions in files beside images are edited, not those of {subset.source}",
                    code="editor-captions-not-beside",
                    fix="give the folder of the images instead",
                )
            elif listing := find_images(os.path.abspath(subset.source), subset, findings):  # noqa: PTH100
                yield subset, listing


def list_everything(folder: Path) -> Listing:
    """All files in a folder and below it. UserError where it cannot be read."""
    path = os.path.abspath(folder)  # noqa: PTH100 -- keeps symbolic links, unlike resolve
    try:
        here, below = list_folder(path), list_recursively(path)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror})",
            code="editor-folder-unreadable",
            fix="give a folder of images",
        ) from error
    return Listing(
        folder=path,
        images=[*here.images, *below.images],
        others=here.others | below.others,
        folders=[],
        unread=[*here.unread, *below.unread],
    )


def read_edited_images(
    subset: SubsetSettings, listing: Listing, prefix: str, config: Config, findings: Findings
) -> Iterator[EditedImage]:
    """The images of one source. prefix: of their names on the page."""
    pairing = pair_caption_files(listing.images, listing.others, subset, findings)
    if pairing.extension.lower() == ".json":
        count = f"the {pairing.count} " if pairing.count else ""
        raise UserError(
            f"{subset.where}: {count}.json files are not edited, only captions that are plain texts",
            code="editor-json-captions",
            fix="--caption_extension .txt edits, or makes, files of that name",
        )
    index = Index(cache_folder(config), ("editor", listing.folder))
    headers = read_images(listing.folder, listing.images, index)
    columns = headers.columns
    for row, name in enumerate(listing.images):
        caption = pairing.get_file(row) if pairing.has_file(row) else name[: name.rfind(".")] + pairing.extension
        fault = headers.faults.get(row)
        yield EditedImage(
            path=Path(listing.folder, name),
            name=prefix + name,
            caption=Path(listing.folder, caption),
            rules=subset.rules,
            width=int(columns["widths"][row]),
            height=int(columns["heights"][row]),
            version=f"{columns['byte_counts'][row]:x}-{columns['mtimes'][row]:x}",
            fault="" if fault is None else fault.what.removeprefix(str(Path(listing.folder, name))).strip(),
        )
