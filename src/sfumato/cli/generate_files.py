"""The files beside the model that `sfumato generate` takes: adapters with their multipliers, new words."""

from __future__ import annotations

from pathlib import Path

from sfumato.cli.generate_options import GenerateOptions
from sfumato.common.text import plural
from sfumato.config import Config
from sfumato.config.precision_rules import LOW_PRECISION
from sfumato.errors import UserError

EMBEDDING_SUFFIXES = (".safetensors", ".pt", ".bin")


def list_networks(options: GenerateOptions, config: Config) -> list[tuple[Path, float]]:
    """Adapter files with their multipliers; the configuration file may name one."""
    paths, multipliers = options.network_weights, options.network_mul
    if not paths and config.network.network_weights:
        paths = (config.network.network_weights,)
    if len(multipliers) > len(paths):
        raise UserError(
            f"--network_mul has {plural(len(multipliers), 'value')} for {plural(len(paths), 'file')} of "
            "--network_weights",
            code="network-multiplier-count",
            fix="give one value for each file, or fewer; missing ones are 1",
        )
    for path in paths:
        if not path.exists():
            raise UserError(f"--network_weights: {path} does not exist", code="network-weights-missing")
    return list(zip(paths, (*multipliers, *[1.0] * len(paths)), strict=False))


def check_pre_calc(options: GenerateOptions, config: Config) -> None:
    """UserError for weights that cannot change and come back: in fewer bits, or with the adapters in them already."""
    if not options.network_pre_calc:
        return
    if options.network_merge:
        raise UserError(
            "--network_merge and --network_pre_calc are two ways to add adapters to the weights",
            code="network-merge-with-pre-calc",
            fix="remove one of them",
        )
    given = [name for name in LOW_PRECISION if config.is_changed(name)]
    if given:
        raise UserError(
            f"--network_pre_calc cannot be combined with --{given[0]}: such weights are rounded at each change",
            code="network-pre-calc-in-low-precision",
            fix="remove --network_pre_calc; the adapters are then computed beside the weights",
        )


def list_embeddings(options: GenerateOptions) -> list[tuple[Path, str]]:
    """Files of textual inversion, each with its word or ""; a folder stands for the files in it."""
    found: list[tuple[Path, str]] = []
    for given in options.textual_inversion_embeddings:
        path, word = Path(given), ""
        if not path.exists():
            name, _, word = given.rpartition("=")
            path = Path(name)
        if not path.exists() or (path.is_dir() and word):
            raise UserError(
                f"--textual_inversion_embeddings: {given} is no file",
                code="embedding-file-missing",
                fix="give FILE or FILE=WORD",
            )
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found += [(file, word) for file in files if file.suffix in EMBEDDING_SUFFIXES or not path.is_dir()]
    return found
