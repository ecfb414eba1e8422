"""`sfumato model inspect`: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.exits import USER_ERROR
from sfumato.cli.options_command import run_with_options
from sfumato.config.base import Options, option
from sfumato.config.values import ModelPath


class ModelInspectOptions(Options):
    """Shows what a checkpoint holds, from its headers: its family, its networks with their sizes and precisions, its
    metadata, and the keys that no network has a place for. The exit code is 2 where no family knows it.
    """

    model: ModelPath = option(None, "the model: a file, a folder, or a name on the hub", positional=True, required=True)
    family: str | None = option(None, "the model family, where the files do not say it")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato model inspect`."""
    return run_with_options("sfumato model inspect", argv, ModelInspectOptions, run)


def run(options: ModelInspectOptions) -> int:
    from sfumato.tools.model_inspect import inspect_model, render_model

    facts = inspect_model(options.model, options.family)
    print("\n".join(render_model(facts)))
    return USER_ERROR if facts.problems else 0
