"""The usual fix for a TOML or JSON file that cannot be parsed; Windows paths with backslashes are the usual fault."""

from __future__ import annotations

import re
from json import JSONDecodeError

BACKSLASH_FIX = r"in double quotes write \\ for one backslash; or use forward slashes, or in TOML 'single quotes'"
JSON_BACKSLASH_FIX = r"write \\ for one backslash, or use forward slashes"


def suggest_toml_fix(text: str, error: ValueError) -> str:
    """The usual fix for the line of a TOML error; empty if there is none."""
    message = str(error)
    if "Cannot overwrite" in message or "Cannot declare" in message:
        return "a key or table is given twice there; keep one"
    lines, number = text.splitlines(), re.search(r"line (\d+)", message)
    line = lines[int(number[1]) - 1] if number and int(number[1]) <= len(lines) else ""
    if re.search(r'"[^"]*\\', line):
        return BACKSLASH_FIX
    if re.search(r"=\s*(True|False)\b", line):
        return "TOML writes true and false in lower case"
    return ""


def suggest_json_fix(error: ValueError, text: str = "") -> str:
    """The usual fix for a JSON error; empty if there is none."""
    if "escape" in str(error):
        return JSON_BACKSLASH_FIX
    if not isinstance(error, JSONDecodeError):
        return ""
    before, rest = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    after_comma = rest if before.endswith(",") else rest[1:].lstrip() if rest.startswith(",") else ""
    if after_comma[:1] in ("}", "]") and after_comma:
        return "remove the comma after the last value"
    if re.match(r"(True|False|None)\b", rest):
        return "JSON writes true, false and null in lower case"
    if rest.startswith("'"):
        return "JSON takes double quotes alone"
    return ""
