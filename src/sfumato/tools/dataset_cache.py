"""`sfumato dataset cache`: fill the caches without training, and look after them."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sfumato.config import Config
from sfumato.config.schema import vocabulary
from sfumato.data.cache.entries import ContentHashes
from sfumato.data.cache.maintenance import KEPT, Amount, Record, needed, prune, refuse_in_use, survey, tally
from sfumato.data.cache.references import KnownUse, known_uses, still_current
from sfumato.data.cache.store import DiskStore
from sfumato.data.find.discover import find_data
from sfumato.data.find.image_table import Picture
from sfumato.data.images import content_hash
from sfumato.data.plans import DataPlan
from sfumato.errors import Problems, UserError
from sfumato.families import register_all
from sfumato.families.base import Blueprint, Builder, Family, Network, find_family
from sfumato.families.source import on_meta, open_source
from sfumato.plan import dataset_lines
from sfumato.track.console import set_up
from sfumato.track.jobs import Job
from sfumato.training.caching import Caches, cache_folder, fill
from sfumato.training.run import DTYPES
from sfumato.training.setup_run import open_processes

log = logging.getLogger(__name__)
THEMES = ("run", "model", "dataset", "buckets", "captions", "images", "cache", "loader", "log")  # what caching reads
OPTIONS = ("mixed_precision",)  # and of other themes


def fill_caches(config: Config, *, machine: tuple[int, int] = (0, 1)) -> Caches:
    """Make what is missing for the model and the datasets of the options, over all processes.

    machine: which of how many machines this is, counted from 0; each makes its part and waits for no other.
    """
    processes = open_processes(config.processes.ddp_timeout)
    assert processes.device is not None
    set_up(config.log, main_process=processes.is_main_process)
    problems = Problems()
    family, blueprint = None, None
    register_all()
    with problems.catch():
        source = open_source(config.model)
        family = find_family(config.run.family, source)
        blueprint = family.read(source, config.model, config.noise)
    step, number = family.bucket_step if family else 1, processes.num_processes
    data = find_data(config, bucket_step=step, processes=number, problems=problems)
    problems.raise_all()
    assert family is not None
    assert blueprint is not None
    notes = (f"note: {note}" for note in (*config.notes, *data.notes))
    for line in (*dataset_lines(config, data), *notes, *idle(config)):
        log.info("%s", line)
    text = family.text_parts if config.cache.cache_text_encoder_outputs else ()
    wanted = {*text, *(("vae",) if config.cache.cache_latents else ())}
    model = load(family, only(blueprint, wanted), config, processes.device)
    return fill(config, data, model, processes, machine=machine)


def load(family: type[Family], blueprint: Blueprint, config: Config, device: Any) -> Family:
    model = family.load(blueprint, config.model, dtype=DTYPES[config.memory.mixed_precision], device=device)
    model.freeze()
    return model


def only(blueprint: Blueprint, wanted: set[str]) -> Blueprint:
    """The blueprint of a model of which only some networks get their weights."""
    networks = {
        name: network
        if name in wanted or name == "vae"
        else Unfilled(spec=network.spec, config=network.config, weights=network.weights)
        for name, network in blueprint.networks.items()
    }
    return replace(blueprint, networks=networks)


class Unfilled(Network):
    """A network that is built without storage, since nothing will be asked of it."""

    def load(self, build: Builder, *, dtype: Any, device: Any) -> nn.Module:
        return on_meta(lambda: build(self.config))


def idle(config: Config) -> list[str]:
    """A line about options that only training reads: the same command line and file serve both."""
    known = vocabulary()
    names = [n for n in known if config.changed(n) and known[n].theme not in THEMES and n not in OPTIONS]
    given = [name for name in names if config.source(name) != "launcher"]
    return [f"note: no effect on caching: {', '.join(f'--{name}' for name in given)}"] if given else []


def show_stats(config: Config) -> None:
    """Counts and bytes of what lies in the cache folder, and who needs it."""
    store = opened(config)
    print(f"cache {store.folder}")
    for line in amounts(tally(survey(store, read=False))):
        print(f"  {line}")
    shards = [path.stat().st_size for path in store.shards.glob("*.shard")]
    others = [p.stat().st_size for p in store.folder.rglob("*") if p.is_file() and p.parent != store.shards]
    print(f"  {'files':<16}{len(shards):>9} shards {size(sum(shards)):>12}, the rest {size(sum(others))}")
    uses = known_uses(store.folder)
    current = still_current(uses)
    for known in uses:
        print(f"needed by {told(known)}" if known in current else f"was needed by {told(known)}, which is gone")
    store.close()


def verify(config: Config) -> None:
    """Read every record, and every picture of the datasets given; UserError where anything is wrong."""
    store = opened(config)
    found = tally(checked(store, config))
    for line in amounts(found):
        print(line)
    wrong = wrong_hashes(store, pictures(config))
    store.close()
    for picture in wrong.values():
        print(f"changed without a new time: {picture.path}")
    bad = sum(amount.records for kind, amount in found.items() if kind not in KEPT and kind != "repeated")
    if bad or wrong:
        what = " and ".join(
            [f"{bad} damaged entries"] * bool(bad)
            + [f"{len(wrong)} pictures that changed though size and time did not"] * bool(wrong)
        )
        raise UserError(f"the cache holds {what}", fix="the same command with --prune instead drops them")
    print("all whole")


def prune_cache(config: Config, *, yes: bool, unused_days: float | None, ask: Callable[[str], str] = input) -> None:
    """Say which entries no current dataset needs, then drop them if the user agrees."""
    store = opened(config)
    refuse_in_use(store)
    uses = known_uses(store.folder)
    current = still_current(uses, unused_days=unused_days)
    wrong = wrong_hashes(store, pictures(config))
    keys = needed(current) - wrong.keys()
    for known in uses:
        print(f"needed by {told(known)}" if known in current else f"no longer needed by {told(known)}")
    found = checked(store, config)
    dropped = [record for record in found if record.kind not in KEPT or record.key not in keys]
    if not dropped:
        print("nothing to drop")
    elif agreed(dropped, yes=yes, ask=ask):
        freed = prune(store, found, lambda record: record.key in keys)
        for known in uses:
            if known not in current:
                known.path.unlink(missing_ok=True)
        print(f"dropped; {size(freed)} are free")
    store.close()


def agreed(dropped: Sequence[Record], *, yes: bool, ask: Callable[[str], str]) -> bool:
    print("to be dropped:")
    for line in amounts(tally(dropped)):
        print(f"  {line}")
    if yes:
        return True
    if sys.stdin.isatty() and ask("drop them? [y/N] ").strip().lower() in ("y", "yes"):
        return True
    print("nothing was dropped; --yes drops without asking")
    return False


def checked(store: DiskStore, config: Config) -> list[Record]:
    """Every record, read and checked."""
    total = sum(path.stat().st_size for path in store.shards.glob("*.shard"))
    count = Count()
    with Job("reading the cache", "MB", plain=config.log.console_log_simple) as job:

        def progress(more: int) -> None:
            count.bytes += more
            job(count.bytes // 2**20, total // 2**20)

        return list(survey(store, read=True, progress=progress))


def pictures(config: Config) -> list[Picture]:
    """Those of the datasets given, if any."""
    if not config.changed("train_data_dir", "dataset_config", "in_json", "dataset_class"):
        return []
    problems = Problems()
    data: DataPlan = find_data(config, bucket_step=1, problems=problems)
    problems.raise_all()
    return [item.picture for _, _, item in data.used()]


def wrong_hashes(store: DiskStore, found: Sequence[Picture]) -> dict[bytes, Picture]:
    """The pictures whose content is not what is remembered of a file with their size and time, by entry."""
    hashes = ContentHashes(store)
    wrong = {}
    for picture in found:
        remembered = store.get(hashes.key(picture))
        if remembered is not None and remembered != content_hash(picture.read()):
            wrong[hashes.key(picture)] = picture
    return wrong


def opened(config: Config) -> DiskStore:
    """The cache folder; UserError where there is none, so that a wrong name does not look like an empty cache."""
    folder = cache_folder(config)
    if not (folder / "shards").is_dir():
        raise UserError(f"there is no cache in {folder}", fix="check --cache_dir")
    return DiskStore(folder)


def told(known: KnownUse) -> str:
    day = time.strftime("%Y-%m-%d", time.localtime(known.renewed))
    sizes = f" at {', '.join(known.use.sizes)}" if known.use.sizes else ""
    return f"{known.use.kind} of {', '.join(known.use.places)}{sizes}, filled {day}"


def amounts(found: dict[str, Amount]) -> list[str]:
    lines = [f"{kind:<16}{amount.records:>9} entries {size(amount.bytes):>11}" for kind, amount in found.items()]
    return lines or ["nothing"]


def size(count: float) -> str:
    """1.5 MB"""
    units = ("bytes", "kB", "MB", "GB", "TB")
    step = 0
    while count >= 1000 and step < len(units) - 1:
        count, step = count / 1000, step + 1
    return f"{count:.0f} {units[step]}" if step == 0 else f"{count:.1f} {units[step]}"


@dataclass
class Count:
    bytes: int = 0
