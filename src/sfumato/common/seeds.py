"""Randomness as a function of (seed, purpose, counters), never of history."""

from __future__ import annotations

import hashlib
import random
import struct

SEED_COUNT = 2**64  # how many different ones there are


def seed_of(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed for one purpose and place; all counters are hashed since torch's CPU generator keeps 32 bits.

    seed: of 64 bits, with a sign or without; -1 and 2**64 - 1 are the same.
    """
    packed = struct.pack(f"<Q{len(counters)}q", seed % SEED_COUNT, *counters)
    digest = hashlib.blake2b(purpose.encode() + b"\0" + packed, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def python_random(seed: int, purpose: str, *counters: int) -> random.Random:
    """A generator of its own for captions, flips and orders; torch is not needed for these."""
    return random.Random(seed_of(seed, purpose, *counters))
