"""What the caches know a network by: a hash of its weights, remembered so that a full cache costs no reading."""

from __future__ import annotations

import hashlib

from sfumato.data.cache.entries import Store, TextKeys, make_key
from sfumato.data.cache.store import MemoryStore
from sfumato.families.base import Family
from sfumato.families.part import Part


def fingerprint_part(model: Family, part: str, store: Store) -> str:
    """A hash of a network's weights as they are loaded and of every change that is made to them.

    The same for the same weights in another file or layout. The weights are read where the store does not know the
    hash yet, or knows it of other sizes and times of the files. A network without files has a name of its own.
    """
    network = model.parts[part]
    if not network.network.weights.file.paths():
        return combine_facts(part, *describe_weights(model, network))
    key = make_key("network", *describe_weights(model, network))
    stored = store.get(key)
    if stored is None:
        weights = network.hash_weights(salt=model.name)
        if store.writable:
            store.put(key, bytes.fromhex(weights))
    else:
        weights = stored.hex()
    changes = [change.identity for change in network.changes if change.identity]
    return combine_facts(weights, *changes) if changes else weights


def describe_weights(model: Family, part: Part) -> list[str]:
    """What a hash is remembered by: the files, where the network lies in them, and how its weights are read."""
    weights = part.network.weights
    facts = [model.name, weights.prefix, str(part.dtype), repr(sorted(weights.stored_keys.items()))]
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
