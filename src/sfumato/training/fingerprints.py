"""What the caches know a network by: a hash of its weights, remembered so that a full cache costs no reading."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sfumato.data.cache.entries import Store, TextKeys, make_key
from sfumato.data.cache.shards import make_write_error
from sfumato.data.cache.store import DiskStore, MemoryStore
from sfumato.families.base import Family
from sfumato.families.part import Part
from sfumato.formats.network_record import NetworkRecord, has_network_record, write_network_record
from sfumato.formats.shards import NETWORK_STEMS


def fingerprint_part(model: Family, part: str, store: Store) -> str:
    """A hash of a network's weights as they are loaded and of every change that is made to them.

    The same for the same weights in another file or layout. The weights are read where the store does not know the
    hash yet, or knows it of other sizes and times of the files. A network without files has a name of its own. A store
    on disk keeps a record of the network, for where its file is not.
    """
    network = model.parts[part]
    if not network.network.weights.file.paths():
        return combine_facts(part, *describe_weights(model, network))
    record = network.network.record
    weights = record.fingerprint if record else read_weights_hash(model, network, store)
    if record is None and isinstance(store, DiskStore) and store.writable:
        record_network(model, network, weights, store.folder)
    changes = [change.identity for change in network.changes if change.identity]
    return combine_facts(weights, *changes) if changes else weights


def read_weights_hash(model: Family, part: Part, store: Store) -> str:
    """From the store, else from the weights."""
    key = make_key("network", *describe_weights(model, part))
    stored = store.get(key)
    if stored is not None:
        return stored.hex()
    weights = part.hash_weights(salt=model.name)
    if store.writable:
        store.put(key, bytes.fromhex(weights))
    return weights


def record_network(model: Family, part: Part, fingerprint: str, cache: Path) -> None:
    """Keep in a cache folder what its entries are known by, and what a run needs of the network without its file."""
    name, file = part.spec.name, part.network.weights.file
    status = [path.stat() for path in file.paths()]
    record = NetworkRecord(
        family=model.name,
        part=name,
        fingerprint=fingerprint,
        dtype=part.precision,
        file="/".join(file.header.path.parts[-2:]) if file.header.path.stem in NETWORK_STEMS else file.header.path.name,
        size=sum(stat.st_size for stat in status),
        modified=max(stat.st_mtime for stat in status),
    )
    if has_network_record(cache, record):
        return
    shapes = part.module.state_dict().items()
    specs = {key: (part.dtype, tensor.shape) for key, tensor in shapes if key not in part.network.weights.tied}
    is_text = name in model.text_parts
    tokenizer = model.load_tokenizers(model.blueprint, model.model_options)[name] if is_text else None
    try:
        write_network_record(cache, record, part.network.config, specs, tokenizer and tokenizer.save_pretrained)
    except OSError as error:
        raise make_write_error(cache, error) from error


def describe_weights(model: Family, part: Part) -> list[str]:
    """What a hash is remembered by: the files, where the network lies in them, and how its weights are read."""
    weights = part.network.weights
    facts = [model.name, weights.prefix, part.precision, repr(sorted(weights.stored_keys.items()))]
    for path in weights.file.paths():
        stat = path.stat()
        facts.append(f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}")
    return facts


def make_text_keys(model: Family, part: str, store: Store, *, weighted: bool, negative: bool = False) -> TextKeys:
    """Cache keys of one encoder's features.

    weighted: whether captions have prompt weights. negative: whether they are negative prompts, before which no prefix
    comes. Entries in memory are of this run alone, so nothing is read for their keys.
    """
    network = part if isinstance(store, MemoryStore) else fingerprint_part(model, part, store)
    facts = [part, model.text_fingerprint(part)]
    facts += [name for name, holds in {"emphasis": weighted, "negative": negative}.items() if holds]
    return TextKeys(fingerprint=combine_facts(network, *facts))


def combine_facts(*facts: str) -> str:
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()
