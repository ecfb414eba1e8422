"""How faults in the data are handled and reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sfumato.common.text import list_some, plural
from sfumato.data.find.findings import Findings
from sfumato.data.find.folders import ImageHeaders
from sfumato.data.find.image_formats import MISSING_PLUGINS
from sfumato.data.find.image_table import IntColumn
from sfumato.data.find.index import Index
from sfumato.errors import UserError

MAX_FAULTS_IN_NOTE = 5
MAX_LISTED_FAULTS = 20  # of one kind in one subset, each an error of its own
INSPECT_HINT = "`sfumato dataset inspect` lists all of them"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What happens to faulty images and captions, and where the dataset index is stored."""

    on_missing_caption: Literal["error", "empty", "skip"]
    on_bad_image: Literal["error", "skip"]
    cache_dir: Path
    may_decode: bool = True  # whether any image may be decoded while the data is found
    decoding: bool = False  # whether all images are decoded completely to find bad ones, not only their headers
    remember: bool = True  # whether the dataset index is written; it is read in any case

    def index(self, *key: str) -> Index:
        """The index file of a table; for the key see there."""
        return Index(self.cache_dir, key, writable=self.remember)


def select_valid_images(images: ImageHeaders, where: str, policy: Policy, findings: Findings) -> IntColumn:
    """Rows of the valid images; reports the others."""
    bad = [(images.names.get_row(row), fault) for row, fault in images.faults.items()]
    report_bad_images(bad, where, policy, findings)
    report_unsaved_index(images.saved, policy, findings)
    return images.valid_rows


def report_unsaved_index(saved: bool, policy: Policy, findings: Findings) -> None:
    line = f"cannot write the dataset index to {policy.cache_dir}; it will be rebuilt at every start"
    if not saved and line not in findings.notes:
        findings.note(line)


def report_bad_images(bad: Sequence[tuple[str, UserError]], where: str, policy: Policy, findings: Findings) -> None:
    """One problem per image, up to a limit; one note where bad images are skipped.

    bad: (image name, what is wrong with it). where: the subset.
    """
    if not bad:
        return
    findings.skipped_names[where] |= {name for name, _ in bad}
    findings.bad_images[where] += [fault.what for _, fault in bad]
    faults = join_missing_plugins(bad, where)
    if policy.on_bad_image == "skip":
        first = "; ".join(
            str(fault) if fault.code in MISSING_PLUGINS else fault.what for fault in faults[:MAX_FAULTS_IN_NOTE]
        )
        more = f"; {len(faults) - MAX_FAULTS_IN_NOTE} more: {INSPECT_HINT}" if len(faults) > MAX_FAULTS_IN_NOTE else ""
        findings.note(f"{where}: {plural(len(bad), 'bad image is', 'bad images are')} skipped: {first}{more}")
        return
    findings.problems.found.extend(faults[:MAX_LISTED_FAULTS])
    if len(faults) > MAX_LISTED_FAULTS:
        findings.problems.add(
            f"{where}: {plural(len(faults) - MAX_LISTED_FAULTS, 'more bad image')}",
            code="more-bad-images",
            fix=INSPECT_HINT,
        )


def join_missing_plugins(bad: Sequence[tuple[str, UserError]], where: str) -> list[UserError]:
    """The faults, with one for all images that lack the same plugin."""
    joined: list[UserError] = []
    for code, missing in MISSING_PLUGINS.items():
        names = [name for name, fault in bad if fault.code == code]
        if names:
            plural = "image is" if len(names) == 1 else "images are"
            what = f"{where}: {len(names)} {plural} {missing.format_name}, which Pillow needs a plugin for"
            joined.append(UserError(f"{what}: {list_some(names)}", code=code, fix=missing.fix))
    return joined + [fault for _, fault in bad if fault.code not in MISSING_PLUGINS]
