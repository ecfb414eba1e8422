"""Encoders without a file here, whose outputs a cache holds: which of those that the cache knows is meant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sfumato.config import Config
from sfumato.data.find.index import cache_folder
from sfumato.errors import UserError
from sfumato.formats.network_record import NetworkRecord, read_network_records


@dataclass(frozen=True, kw_only=True)
class CachedEncoders:
    """The records of a cache that may stand for a model's encoders of text and images."""

    records: Mapping[str, Sequence[NetworkRecord]] = field(default_factory=dict)  # by part
    chosen: Mapping[str, str] = field(default_factory=dict)  # part -> start of a fingerprint, of --cached_encoder
    name_precision: Callable[[str], str] = lambda _: (
        "float32"
    )  # how a part's weights would be kept, were they loaded here

    def find(self, part: str) -> NetworkRecord | None:
        """None where the cache knows no such encoder. UserError where the one that is meant is not clear."""
        known = self.records.get(part, ())
        start = self.chosen.get(part, "")
        named = [record for record in known if record.fingerprint.startswith(start)]
        if known and not named:
            raise UserError(
                f"--cached_encoder {part}={start}: the cache holds no outputs of it but of\n{_list_lines(known)}",
                code="cached-encoder-unknown",
                fix=f"--cached_encoder {part}={known[0].id}",
            )
        wanted = self.name_precision(part)
        fitting = [record for record in named if record.dtype == wanted]
        if named and not fitting:
            raise UserError(
                f"{part} has no file here and would compute in {wanted}; the cache holds outputs of\n"
                f"{_list_lines(named)}",
                code="cached-encoder-precision",
                fix="give the --mixed_precision and --..._base with which the cache was filled, or the encoder's file",
            )
        if len(fitting) > 1:
            raise UserError(
                f"{part} has no file here, and the cache holds outputs of {len(fitting)} such encoders:\n"
                f"{_list_lines(fitting)}",
                code="cached-encoder-ambiguous",
                fix=f"--cached_encoder {part}={fitting[0].id}, or another one of them",
            )
        return fitting[0] if fitting else None


NO_CACHED_ENCODERS = CachedEncoders()


def read_cached_encoders(
    config: Config, family: str, text_parts: Sequence[str], name_precision: Callable[[str], str]
) -> CachedEncoders:
    """The encoders of a family whose outputs this run takes from the cache on disk."""
    cache = config.cache
    usable = [*(text_parts if cache.cache_text_encoder_outputs_to_disk else ())]
    usable += ["vae"] if cache.cache_latents_to_disk else []
    records: dict[str, list[NetworkRecord]] = defaultdict(list)
    for record in read_network_records(cache_folder(config)) if usable else ():
        if record.family == family and record.part in usable:
            records[record.part].append(record)
    chosen = dict(choice.split("=") for choice in cache.cached_encoder)
    return CachedEncoders(records=records, chosen=chosen, name_precision=name_precision)


def _list_lines(records: Sequence[NetworkRecord]) -> str:
    return "\n".join(f"  {record}" for record in records)
