"""`sfumato dataset clean`: tidies the tags and captions of a metadata file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sfumato.cli.options_command import run_with_options
from sfumato.common.text import plural
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath


class CleanOptions(Options):
    """Cleans a metadata file: spaces for underscores, no rating, of several people no conflicting hair and eyes, no tag
    that another one contains; in captions a girl for a cartoon woman, and the like.
    """

    in_json: FilePath = option(None, "the metadata file", positional=True, required=True)
    out_json: FilePath = option(None, "the metadata file to write", positional=True, required=True)
    debug: bool = option(False, "accepted without effect: the result is in the file")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato dataset clean`."""
    return run_with_options("sfumato dataset clean", argv, CleanOptions, run_cleaning)


def run_cleaning(options: CleanOptions) -> int:
    """Clean; gives the exit code."""
    from sfumato.tools.clean_texts import clean_metadata

    changed = clean_metadata(options.in_json, options.out_json)
    sys.stdout.write(f"{options.out_json}: {plural(changed, 'entry changed', 'entries changed')}\n")
    return 0
