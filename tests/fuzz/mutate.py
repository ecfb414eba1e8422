"""Damages bytes, as a function of a random generator: bits, cuts, splices, lengths, numbers, nesting, encodings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

MAX_BYTES = 1 << 16  # of an input: work that grows with the square of it shows
FIELD_BYTES = (1, 2, 3, 4, 8, 11)  # of a length field; eleven are tar's
FIELD_VALUES = (0, 1, -1, -2, -512, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**87 - 1)
NUMBERS = (
    b"0", b"-1", b"1e999", b"-1e999", b"1e-999", b"NaN", b"nan", b"inf", b"-Infinity", b"4294967296", b"1" + b"0" * 18,
    b"9" * 400, b"9" * 5000, b"0x10", b"1_000", b"0.1.2", b"1e", "٣".encode(), b"true", b"null",
)  # fmt: skip
BRACKETS = (b"[", b"{", b"(", b'{"a":', b"((", b"([", b'[{"a":[', b"\\(", b"(a:")
LETTERS = (
    b"\0", b"\n", b"\r", b"\r\n", b"\t", b" ", b'"', b"'", b"\\", b"=", b",", b":", b"|", b"--", b"\x7f", b"\x1b[31m",
    b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\\ud800", b"\\u0000",
    "\u2028".encode(), "\u3000".encode(), "\U0001f468\u200d\U0001f469".encode(), "e\u0301".encode(),
)  # fmt: skip
ENCODINGS = ("utf-16-le", "utf-16", "utf-32", "latin-1", "cp932")
DIGITS = re.compile(rb"-?\d+\.?\d*")
DEEP = 40_000  # brackets


class Mutator:
    """Makes damaged inputs from good ones; equal generators make equal inputs.

    tokens: byte strings that mean something to the reader.
    """

    def __init__(self, random: Random, tokens: Sequence[bytes] = ()) -> None:
        self.random = random
        self.tokens = tokens
        self.operations: list[Callable[[bytes], bytes]] = [
            self.flip_bit, self.set_byte, self.cut, self.remove, self.repeat, self.write_field, self.write_field,
            self.insert_letters, self.replace_number, self.nest, self.encode,
        ]  # fmt: skip
        if tokens:
            self.operations += [self.insert_token, self.overwrite_with_token]

    def make_input(self, seeds: Sequence[bytes]) -> bytes:
        """One of the seeds, or the start of one and the end of another, with one to five changes."""
        data = self.random.choice(seeds)
        if self.random.random() < 0.1:
            other = self.random.choice(seeds)
            data = data[: self.choose_place(data)] + other[self.choose_place(other) :]
        changes = 1
        while changes < 5 and self.random.random() < 0.4:
            changes += 1
        for _ in range(changes):
            data = self.random.choice(self.operations)(data)[: max(MAX_BYTES, len(data))]
        return data

    def choose_place(self, data: bytes) -> int:
        """An offset from 0 to the end; every second time in the first 64 bytes, where headers are."""
        end = min(len(data), 64) if self.random.random() < 0.5 else len(data)
        return self.random.randint(0, end)

    def overwrite(self, data: bytes, place: int, new: bytes) -> bytes:
        return data[:place] + new + data[place + len(new) :]

    def flip_bit(self, data: bytes) -> bytes:
        place = self.choose_place(data)
        old = data[place] if place < len(data) else 0
        return self.overwrite(data, place, bytes([old ^ 1 << self.random.randrange(8)]))

    def set_byte(self, data: bytes) -> bytes:
        return self.overwrite(data, self.choose_place(data), bytes([self.random.choice((0, 1, 127, 128, 255))]))

    def cut(self, data: bytes) -> bytes:
        return data[: self.choose_place(data)]

    def remove(self, data: bytes) -> bytes:
        place = self.choose_place(data)
        return data[:place] + data[place + self.random.choice((1, 2, 4, 16, 100)) :]

    def repeat(self, data: bytes) -> bytes:
        """A short piece up to a thousand times, or a long one twice."""
        place = self.choose_place(data)
        length, times = self.random.choice(((1, 1000), (8, 1000), (20, 200), (len(data), 2)))
        return data[:place] + data[place : place + length] * times + data[place + length :]

    def write_field(self, data: bytes) -> bytes:
        """A whole number at the limits of its type, in either byte order."""
        count = self.random.choice(FIELD_BYTES)
        value = self.random.choice((*FIELD_VALUES, len(data), len(data) * 2)) % (1 << 8 * count)
        order = "little" if self.random.random() < 0.5 else "big"
        return self.overwrite(data, self.choose_place(data), value.to_bytes(count, order))

    def insert_letters(self, data: bytes) -> bytes:
        place = self.choose_place(data)
        return data[:place] + self.random.choice(LETTERS) * self.random.choice((1, 1, 3)) + data[place:]

    def replace_number(self, data: bytes) -> bytes:
        """One of the decimal numbers in the text by one that is hard to read."""
        found = list(DIGITS.finditer(data[:MAX_BYTES]))
        if not found:
            return self.insert_letters(data)
        match = self.random.choice(found)
        return data[: match.start()] + self.random.choice(NUMBERS) + data[match.end() :]

    def nest(self, data: bytes) -> bytes:
        bracket = self.random.choice(BRACKETS)
        place = self.choose_place(data)
        return data[:place] + bracket * (self.random.choice((2, 100, 2000, DEEP)) // len(bracket) + 1) + data[place:]

    def encode(self, data: bytes) -> bytes:
        """The text in another encoding."""
        return data.decode("utf-8", "replace").encode(self.random.choice(ENCODINGS), "replace")

    def insert_token(self, data: bytes) -> bytes:
        place = self.choose_place(data)
        return data[:place] + self.random.choice(self.tokens) + data[place:]

    def overwrite_with_token(self, data: bytes) -> bytes:
        return self.overwrite(data, self.choose_place(data), self.random.choice(self.tokens))
