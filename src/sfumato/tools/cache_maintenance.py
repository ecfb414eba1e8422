"""`sfumato dataset cache --stats`, `--verify` and `--prune`: count, check and clear the cache without training."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from sfumato.common.text import format_bytes, plural
from sfumato.config import Config
from sfumato.data.cache.entries import ContentHashes
from sfumato.data.cache.maintenance import (
    NETWORKS,
    USEFUL_TYPES,
    Record,
    RecordTotals,
    collect_keys,
    count_records,
    prune,
    read_records,
    refuse_in_use,
)
from sfumato.data.cache.references import StoredReference, read_references, select_current
from sfumato.data.cache.store import DiskStore
from sfumato.data.find.discover import find_data
from sfumato.data.find.image_table import ImageRow
from sfumato.data.find.index import cache_folder
from sfumato.data.images import hash_content
from sfumato.errors import Problems, UserError
from sfumato.formats.network_record import read_network_records
from sfumato.track.progress_task import ProgressTask


def show_stats(config: Config) -> None:
    """Print counts and bytes of the cache's entries, and which datasets need them."""
    store = open_cache(config)
    print(f"cache {store.folder}")
    for line in format_totals(count_records(read_records(store, check=False))):
        print(f"  {line}")
    shards, others = [], 0
    for path in store.folder.rglob("*"):
        if path.is_file() and path.parent != store.shards:
            others += path.stat().st_size
        elif path.suffix == ".shard":
            shards.append(path.stat().st_size)
    print(f"  {'files':<16}{len(shards):>9} shards {format_bytes(sum(shards)):>12}, the rest {format_bytes(others)}")
    for record in read_network_records(store.folder):
        print(f"  outputs of {record.part} of the family {record.family}, {record}")
    references = read_references(store.folder)
    current = select_current(references)
    for reference in references:
        text = describe_reference(reference)
        print(f"needed by {text}" if reference in current else f"was needed by {text}, which no longer exists")
    store.close()


def verify_cache(config: Config) -> None:
    """Read every record, and every image of the datasets given; UserError where anything is wrong."""
    store = open_cache(config)
    totals = count_records(read_all_records(store, config))
    for line in format_totals(totals):
        print(line)
    changed = find_changed_images(store, list_dataset_images(config))
    store.close()
    for image in changed.values():
        print(f"changed without a new modification time: {image.path}")
    damaged = sum(total.records for kind, total in totals.items() if kind not in USEFUL_TYPES and kind != "repeated")
    faults = []
    if damaged:
        faults.append(plural(damaged, "damaged entry", "damaged entries"))
    if changed:
        faults.append(f"entries of {plural(len(changed), 'image')} whose content changed but not their size and time")
    if faults:
        raise UserError(
            f"the cache holds {' and '.join(faults)}",
            code="cache-entries-invalid",
            fix="the same command with --prune instead deletes them",
        )
    print("no faults found")


def prune_cache(config: Config, *, yes: bool, unused_days: float | None, ask: Callable[[str], str] = input) -> None:
    """List the entries that no current dataset needs, then delete them if the user agrees."""
    store = open_cache(config)
    refuse_in_use(store)
    references = read_references(store.folder)
    current = select_current(references, unused_days=unused_days)
    changed = find_changed_images(store, list_dataset_images(config))
    keys = collect_keys(current) - changed.keys()
    for reference in references:
        state = "needed by" if reference in current else "no longer needed by"
        print(f"{state} {describe_reference(reference)}")
    records = read_all_records(store, config)
    keys |= {record.key for record in records if record.content_type == NETWORKS}  # small, and any dataset's
    unneeded = [record for record in records if record.content_type not in USEFUL_TYPES or record.key not in keys]
    if not unneeded:
        print("nothing to delete")
    elif confirm_deletion(unneeded, yes=yes, ask=ask):
        freed = prune(store, records, lambda record: record.key in keys)
        for reference in references:
            if reference not in current:
                reference.path.unlink(missing_ok=True)
        print(f"deleted; {format_bytes(freed)} are free")
    store.close()


def confirm_deletion(records: Sequence[Record], *, yes: bool, ask: Callable[[str], str]) -> bool:
    """Print what would be deleted; whether --yes or the user at the terminal agrees."""
    print("to be deleted:")
    for line in format_totals(count_records(records)):
        print(f"  {line}")
    if yes:
        return True
    if sys.stdin.isatty() and ask("delete them? [y/N] ").strip().lower() in ("y", "yes"):
        return True
    print("nothing deleted; --yes deletes without asking")
    return False


def read_all_records(store: DiskStore, config: Config) -> list[Record]:
    """Every record with its content checked, with a progress bar."""
    total = sum(path.stat().st_size for path in store.shards.glob("*.shard"))
    done = 0
    with ProgressTask("reading the cache", "MB", plain=config.log.console_log_simple) as task:

        def progress(byte_count: int) -> None:
            nonlocal done
            done += byte_count
            task(done // 2**20, total // 2**20)

        return list(read_records(store, check=True, progress=progress))


def list_dataset_images(config: Config) -> list[ImageRow]:
    """The images of the datasets that the options name; none where they name no dataset."""
    if not config.is_changed("train_data_dir", "dataset_config", "in_json", "dataset_class"):
        return []
    problems = Problems()
    plan = find_data(config, bucket_step=1, problems=problems)
    problems.raise_all()
    return [item.image for _, _, item in plan.iterate_used()]


def find_changed_images(store: DiskStore, images: Iterable[ImageRow]) -> dict[bytes, ImageRow]:
    """The images whose content differs from what is cached for their path, size and time, by the key of the entry."""
    hashes = ContentHashes(store)
    changed = {}
    for image in images:
        key = hashes.make_key(image)
        cached_hash = store.get(key)
        if cached_hash is not None and cached_hash != hash_content(image.read()):
            changed[key] = image
    return changed


def open_cache(config: Config) -> DiskStore:
    """The cache of --cache_dir; UserError where there is none, so that a wrong name does not look like an empty one."""
    folder = cache_folder(config)
    if not (folder / "shards").is_dir():
        raise UserError(f"there is no cache in {folder}", code="cache-folder-missing", fix="check --cache_dir")
    return DiskStore(folder)


def describe_reference(stored: StoredReference) -> str:
    """What is cached of which dataset, at which sizes, and when it was last filled."""
    day = time.strftime("%Y-%m-%d", time.localtime(stored.updated))
    reference = stored.reference
    sizes = f" at {', '.join(reference.sizes)}" if reference.sizes else ""
    return f"{reference.content_type} of {', '.join(reference.sources)}{sizes}, filled {day}"


def format_totals(totals: Mapping[str, RecordTotals]) -> list[str]:
    """A line per kind of entry: its name, count and bytes."""
    lines = []
    for kind, total in totals.items():
        lines.append(f"{kind:<16}{total.records:>9} entries {format_bytes(total.bytes):>11}")
    return lines or ["no entries"]
