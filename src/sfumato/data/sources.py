"""The pictures of one subset: files found, captions paired, sizes read; every fault is told, none is passed over."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

from sfumato.config.paths import neighbour
from sfumato.data.captions import of_file
from sfumato.data.folders import IMAGE_ENDINGS, Found, Listing, list_folder, read_captions, read_images
from sfumato.data.index import FolderIndex, KnownCaption, load_index, save_index
from sfumato.data.settings import Report, SubsetSettings
from sfumato.errors import UserError

OTHER_ENDINGS = (".txt", ".caption")  # looked for where the subset has no caption file with the configured ending
NAMED = 5  # how many files a message names


def pictures_of(subset: SubsetSettings, policy: Policy, report: Report) -> list[Picture]:
    """All pictures directly in the subset's folder, sorted by name, each with its caption.

    Faults go to the report's problems; what remains is returned, so that later stages can find theirs, too.
    """
    folder = os.path.abspath(subset.image_dir)  # noqa: PTH100 -- keeps symbolic links, unlike resolve
    try:
        listing = list_folder(folder)
    except OSError as error:
        report.problems.add(f"{subset.where}: {folder} cannot be read ({error.strerror})", fix=neighbour(Path(folder)))
        return []
    if not listing.images:
        fix = "images must lie directly in the folder"
        report.problems.add(f"{subset.where}: no images in {folder}; {what_is_there(listing)}", fix=fix)
        return []
    known = load_index(policy.cache_dir, folder)
    images = read_images(folder, listing.images, known.images)
    names = told_of_bad_images(listing, images, subset, policy, report)
    paired = caption_files(names, listing, subset, report)
    captions = read_captions(folder, sorted(set(paired.values())), known.captions)
    told_of_faults(list(captions.faults.values()), f"{subset.where}: caption files", report)
    if images.new or captions.new or len(images.by_name) != len(known.images):
        kept = {name: caption for name, caption in known.captions.items() if name in listing.others}
        index = FolderIndex(images.by_name, kept | captions.by_name)
        if not save_index(policy.cache_dir, folder, index):
            report.note(f"sizes and captions cannot be remembered: {policy.cache_dir} cannot be written")
    texts = captions_of(names, paired, captions, subset, policy, report)
    prefix = folder + os.sep
    return [Picture(prefix + name, *images.by_name[name], texts[name]) for name in names if name in texts]


def told_of_bad_images(
    listing: Listing, images: Found[tuple[int, int, int, int]], subset: SubsetSettings, policy: Policy, report: Report
) -> list[str]:
    """The names of the good images; the others are a problem each, or one note where they are to be left out."""
    if images.faults and policy.on_bad_image == "skip":
        some = "; ".join(error.what for error in list(images.faults.values())[:NAMED])
        report.note(f"{subset.where}: {len(images.faults)} bad images are left out: {some}")
    else:
        told_of_faults(list(images.faults.values()), f"{subset.where}: images", report)
    return [name for name in listing.images if name in images.by_name]


def told_of_faults(faults: Sequence[UserError], kind: str, report: Report) -> None:
    report.problems.found.extend(faults[:NAMED])
    if len(faults) > NAMED:
        report.problems.add(f"{kind}: {len(faults) - NAMED} more are bad like those named")


def caption_files(names: Sequence[str], listing: Listing, subset: SubsetSettings, report: Report) -> dict[str, str]:
    """Image -> caption file, where there is one; with another ending if none has the configured one."""
    found = with_ending(names, listing.others, subset.caption_extension)
    if found:
        return found
    others = [with_ending(names, listing.others, ending) for ending in OTHER_ENDINGS]
    best = max(others, key=len)
    if best:
        ending = OTHER_ENDINGS[others.index(best)]
        report.note(
            f"{subset.where}: no {subset.caption_extension} files; took the {len(set(best.values()))} {ending} files "
            f"as captions (--caption_extension {ending} says so)"
        )
    return best


def with_ending(names: Sequence[str], others: set[str], ending: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        stem = name[: name.rfind(".")]
        if stem + ending in others:
            found[name] = stem + ending
        elif stem.count("_") >= 4:  # name_cx_cy_w_h, as face detectors write
            whole = stem.rsplit("_", 4)[0] + ending
            if whole in others:
                found[name] = whole
    return found


def captions_of(
    names: Sequence[str],
    paired: dict[str, str],
    captions: Found[KnownCaption],
    subset: SubsetSettings,
    policy: Policy,
    report: Report,
) -> dict[str, str]:
    """Image -> caption; images to be left out are missing from the result."""
    several_lines = subset.rules.enable_wildcard
    texts: dict[str, str] = {}
    missing: list[str] = []
    for name in names:
        file = paired.get(name)
        known = captions.by_name.get(file) if file else None
        text = of_file(known[2], several_lines=several_lines) if known else ""
        if text:
            texts[name] = text
        elif file not in captions.faults:
            missing.append(name)
    if missing:
        texts |= without_caption(missing, paired, len(names), subset, policy, report)
    return texts


def without_caption(
    missing: Sequence[str], paired: dict[str, str], images: int, subset: SubsetSettings, policy: Policy, report: Report
) -> dict[str, str]:
    """What becomes of images without a caption: the class tokens, or what --on_missing_caption says."""
    some = ", ".join(missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
    empty = sum(name in paired for name in missing)
    what = f"{len(missing)} of {images} images have no caption ({subset.caption_extension} file beside them)"
    if empty:
        what += f", {empty} of them an empty file"
    if subset.class_tokens:
        report.note(f"{subset.where}: {what}; they take the class tokens {subset.class_tokens!r}")
        return dict.fromkeys(missing, subset.class_tokens)
    if policy.on_missing_caption == "error":
        fix = "write them, give class_tokens, or set --on_missing_caption empty (or skip)"
        report.problems.add(f"{subset.where}: {what}: {some}", fix=fix)
        return dict.fromkeys(missing, "")
    if policy.on_missing_caption == "empty":
        report.note(f"{subset.where}: {what}; they train with an empty caption: {some}")
        return dict.fromkeys(missing, "")
    report.note(f"{subset.where}: {what}; they are left out: {some}")
    return {}


def held_out(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of the training and of the validation images: the last round(count * share) of a shuffle are held out.

    The field's rule for which images are held out, without its overlap of one image in many cases.
    """
    places = list(range(count))
    Random(seed).shuffle(places)
    cut = count - round(count * share)
    return sorted(places[:cut]), places[cut:]


def what_is_there(listing: Listing) -> str:
    """For the message about a folder without images: what nearly matched."""
    below = [(name, len(images_in(Path(listing.folder, name)))) for name in listing.folders]
    deeper = [f"{count} in {name}" for name, count in below if count]
    if deeper:
        total = sum(count for _, count in below)
        return f"found {total} images one level down ({', '.join(deeper[:NAMED])})"
    endings = Counter(Path(name).suffix.lower() or "no ending" for name in listing.others)
    if endings:
        kinds = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(NAMED))
        return f"it holds {kinds}, and images end in {' '.join(IMAGE_ENDINGS)}"
    return "it is empty" if not listing.folders else f"it holds only folders without images: {listing.folders[:NAMED]}"


def images_in(folder: Path) -> list[str]:
    try:
        return list_folder(str(folder)).images
    except OSError:
        return []


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What to do about faults, and where sizes and captions are remembered."""

    on_missing_caption: Literal["error", "empty", "skip"]
    on_bad_image: Literal["error", "skip"]
    cache_dir: Path


class Picture(NamedTuple):
    """One image file and its caption; a tuple, since there may be millions."""

    path: str
    bytes: int
    mtime_ns: int
    width: int  # as shown, after turning by the EXIF orientation
    height: int
    caption: str
