"""Reading the text files that users write, in the encodings they come in: captions, prompts, TOML, JSON."""

from __future__ import annotations

import codecs
from pathlib import Path

from sfumato.common.files import read_file
from sfumato.errors import UserError

BYTE_ORDER_MARKS = (  # UTF-32 before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
SAVE_AS_UTF8 = "save it as UTF-8"
GUESS_BYTES = 4096  # of a text, to guess its encoding
MAX_FOREIGN_SHARE = 0.4  # letters beyond ASCII in a text of a Western European language
WESTERN_SIGNS = "‘’“”–—…°×"


def read_text_file(path: Path) -> str:
    """The text of a file, decoded as `decode_text` does. OSError where it cannot be read, UserError as there."""
    return decode_text(read_file(path), str(path))


def decode_text(data: bytes, where: str) -> str:
    """UTF-8, or UTF-16 and UTF-32 where a byte order mark or the zero bytes show it.

    where: the file, for messages. UserError, with the line, for other encodings and for NUL letters.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return decode_strictly(data[len(mark) :], encoding, where)
    return decode_strictly(data, guess_encoding(data), where)


def guess_encoding(data: bytes) -> str:
    """UTF-16 where half of the letters or more are Latin, so that every second byte of those is zero; else UTF-8."""
    if b"\0" in data and len(data) % 2 == 0:
        high, low = data[1::2], data[0::2]
        for encoding, zeros, others in (("utf-16-le", high, low), ("utf-16-be", low, high)):
            if 2 * zeros.count(0) >= len(zeros) and not others.count(0):
                return encoding
    return "utf-8"


def decode_strictly(data: bytes, encoding: str, where: str) -> str:
    """UserError that names the line where the data are not in this encoding, or hold NUL letters."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "replace").count("\n") + 1
        hint = describe_other_encoding(data) if encoding == "utf-8" else "; it may be cut short"
        what = f"{where}, line {line}, is not {encoding[:6].upper().removesuffix('-')}{hint}"
        raise UserError(what, code="text-file-not-utf8", fix=SAVE_AS_UTF8) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        cause = "it is damaged, or in UTF-16 without a byte order mark" if text.strip("\0") else "it is damaged"
        what = f"{where}, line {line}, has NUL letters: {cause}"
        raise UserError(what, code="text-file-with-nul", fix=f"write it again, or {SAVE_AS_UTF8}")
    return text


def describe_other_encoding(data: bytes) -> str:
    """A few words on what a text that is not UTF-8 seems to be; "" where that is open."""
    if b"\0" in data:
        return "; it may be UTF-16 without a byte order mark"
    text = data[:GUESS_BYTES].decode("cp1252", "replace")
    foreign = [letter for letter in text if ord(letter) > 127]
    is_western = all(letter.isalpha() or letter in WESTERN_SIGNS for letter in foreign)
    if is_western and len(foreign) <= max(2, MAX_FOREIGN_SHARE * len(text)):
        return f"; it may be Latin-1 or Windows-1252, with letters such as {foreign[0]!r}" if foreign else ""
    return ""
