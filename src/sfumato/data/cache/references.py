"""Who needs which cache entries: a small file for each dataset and encoder, written when its caches are filled.

Filling the same again, with pictures or captions changed since, replaces the file. Pruning keeps what any use needs
whose pictures' folders are still there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sfumato.common import files
from sfumato.errors import UserError

KEY = 20  # bytes
ENDING = ".use"


@dataclass(frozen=True, kw_only=True)
class Use:
    """One dataset's entries of one kind."""

    cache: Path  # the cache's folder
    kind: str  # "latents", "text of clip_l"
    places: tuple[str, ...]  # absolute paths of the pictures' folders or archives
    encoder: str  # its fingerprint
    sizes: tuple[str, ...] = ()  # the training sizes

    @property
    def path(self) -> Path:
        facts = json.dumps([self.kind, self.places, self.encoder, self.sizes])
        name = hashlib.blake2b(facts.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return self.cache / "uses" / f"{name}{ENDING}"


def remember(use: Use, keys: Sequence[bytes]) -> None:
    """Write down what the use needs now. UserError where the cache cannot be written."""
    head = {"kind": use.kind, "places": use.places, "encoder": use.encoder, "sizes": use.sizes, "keys": len(keys)}
    try:
        files.write_bytes(use.path, json.dumps(head).encode() + b"\n" + b"".join(keys))
    except OSError as error:
        fix = "free disk space, or give another --cache_dir"
        raise UserError(f"cannot write into the cache {use.cache} ({error.strerror})", fix=fix) from error


def known_uses(cache: Path) -> list[KnownUse]:
    """Every use that is remembered, the latest first; a file that is not whole is passed over."""
    found = []
    for path in (cache / "uses").glob(f"*{ENDING}"):
        try:
            data = path.read_bytes()
            line, _, rest = data.partition(b"\n")
            head = json.loads(line)
            if len(rest) == head["keys"] * KEY:
                use = Use(
                    cache=cache, kind=head["kind"], places=tuple(head["places"]), encoder=head["encoder"],
                    sizes=tuple(head["sizes"]),
                )  # fmt: skip
                keys = frozenset(rest[i : i + KEY] for i in range(0, len(rest), KEY))
                found.append(KnownUse(use, keys, path.stat().st_mtime, path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda each: -each.renewed)


def still_current(uses: Iterable[KnownUse], *, unused_days: float | None = None) -> list[KnownUse]:
    """The uses whose pictures' folders are all there, and that were renewed within `unused_days`."""
    oldest = time.time() - unused_days * 86400 if unused_days is not None else float("-inf")
    return [each for each in uses if each.renewed >= oldest and all(Path(place).exists() for place in each.use.places)]


class KnownUse(NamedTuple):
    """A use as it was found."""

    use: Use
    keys: frozenset[bytes]
    renewed: float  # Unix time of the last filling
    path: Path
