"""Whether the processes of a run were started for the same run, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sfumato.errors import UserError
from sfumato.parallel.base import ParallelStrategy
from sfumato.training.run_state import compare_options
from sfumato.training.start_point import StartPoint


def check_agreement(parallel: ParallelStrategy, info: Mapping[str, Any], start: StartPoint) -> None:
    """UserError where options, data or the step to go on from differ; names of files count, their folders do not."""
    everyone = parallel.exchange({"options": info["options"], "data": info["data"], "start": asdict(start)})
    for rank, other in enumerate(everyone):
        different = find_difference(everyone[0], other)
        if different:
            raise UserError(
                f"process {rank} was started for another run than process 0: {different}",
                code="processes-differ",
                fix="give all processes the same options and files",
            )


def find_difference(main: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What differs first, in words; empty where nothing does."""
    if options := compare_options(main["options"], other["options"]):
        name = min(options)
        return f"--{name} is {other['options'].get(name, 'not set')} there, not {main['options'].get(name, 'not set')}"
    if main["data"] != other["data"]:
        return "it found other images or captions"
    if main["start"] != other["start"]:
        return f"it goes on from step {other['start']['step']}, not {main['start']['step']}"
    return ""
