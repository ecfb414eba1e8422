"""The usual fix for a TOML or JSON file that cannot be parsed; Windows paths with backslashes are the usual fault."""

from __future__ import annotations

import re

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


def suggest_json_fix(error: ValueError) -> str:
    """The usual fix for a JSON error; empty if there is none."""
    return JSON_BACKSLASH_FIX if "escape" in str(error) else ""
