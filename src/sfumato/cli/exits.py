"""Exit codes, and the last line of a command that failed."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from io import TextIOWrapper

from sfumato.common.quiet_imports import silence_lost_stores
from sfumato.common.stop_signals import INTERRUPTED, INTERRUPTED_LINE, handle_stop_signals, raise_interrupt
from sfumato.common.text import join_lines
from sfumato.errors import InternalError, SeveralErrors, UserError

INTERNAL_ERROR, USER_ERROR = 1, 2  # exit codes


def run_guarded(run: Callable[[], int | None], *, debug: bool) -> int:
    """Call `run`; gives its exit code, 0 for None. A failure becomes an exit code and a last line on stderr.

    debug: show the traceback of what the user can fix, too.
    """
    print_every_letter()
    silence_lost_stores()
    try:
        with handle_stop_signals(raise_interrupt):
            return run() or 0
    except UserError as error:
        if debug:
            report(traceback.format_exc())
        report_error(error)
        return USER_ERROR
    except InternalError as error:
        report(traceback.format_exc())
        report_error(error)
        return INTERNAL_ERROR
    except KeyboardInterrupt:
        print(INTERRUPTED_LINE, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # nobody reads our output any more, e.g. `sfumato train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def print_every_letter() -> None:
    """Let stdout and stderr write letters that their encoding lacks as \\u....; pipes on Windows lack most of them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "surrogatepass"):
            stream.reconfigure(errors="backslashreplace")


def report_error(error: UserError | InternalError) -> None:
    """One line for each fault, and a last line that sums them up."""
    if isinstance(error, SeveralErrors):
        for fault in error.errors:
            report(f"- {join_lines(fault)}")
    report(f"error: {join_lines(error)}")


def report(text: str) -> None:
    """Text on stderr, without the secrets of this computer and of the command line, however they came into it."""
    from sfumato.config.secrets import collect_machine_secrets, find_secret_words, redact

    print(redact(text, collect_machine_secrets() | find_secret_words(sys.argv)), file=sys.stderr)
