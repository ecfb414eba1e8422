"""What to do about faults in the data, and how they are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sfumato.data.find.folders import Images
from sfumato.data.find.image_table import Column
from sfumato.data.find.report import Report
from sfumato.errors import UserError

NAMED = 5  # how many files a message names
TOLD = 20  # how many faults of one kind in one subset are told one by one
ALL = "`sfumato dataset inspect` names them all"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What to do about faults, and where sizes and captions are remembered."""

    on_missing_caption: Literal["error", "empty", "skip"]
    on_bad_image: Literal["error", "skip"]
    cache_dir: Path
    decoding: bool = False  # whether bad images are looked for to their last byte, not only in their headers


def some(names: Sequence[str]) -> str:
    """The first few, for a message."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def usable(images: Images, where: str, policy: Policy, report: Report) -> Column:
    """Places of the good images; the others are a problem each, or one note where they are to be left out."""
    told_of_bad([(images.names.row(place), fault) for place, fault in images.faults.items()], where, policy, report)
    told_of_memory(images.saved, policy, report)
    return images.usable


def told_of_memory(saved: bool, policy: Policy, report: Report) -> None:
    line = f"sizes and captions cannot be remembered: {policy.cache_dir} cannot be written"
    if not saved and line not in report.notes:
        report.note(line)


def told_of_bad(bad: Sequence[tuple[str, UserError]], where: str, policy: Policy, report: Report) -> None:
    """A problem each, as far as they are few enough to read, or one note where they are left out.

    bad: the names of pictures, and what is wrong with each.
    """
    if not bad:
        return
    faults = [fault for _, fault in bad]
    report.left_out[where] |= {name for name, _ in bad}
    report.bad_images[where] += [error.what for error in faults]
    if policy.on_bad_image == "skip":
        first = "; ".join(error.what for error in faults[:NAMED])
        more = f"; {len(faults) - NAMED} more: {ALL}" if len(faults) > NAMED else ""
        report.note(f"{where}: {len(faults)} bad images are left out: {first}{more}")
        return
    report.problems.found.extend(faults[:TOLD])
    if len(faults) > TOLD:
        report.problems.add(f"{where}: images: {len(faults) - TOLD} more are bad like those named", fix=ALL)
