"""`sfumato ema`: reconstructs a power-function EMA of any width from saved ones, by least squares.

An EMA is a weighted sum of the weights of all steps, and so is a weighted sum of saved EMAs. The coefficients bring its
profile over the steps as near as possible to the wanted one (Karras et al. 2024, "Analyzing and Improving the Training
Dynamics of Diffusion Models", sec. 3.2).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.common.json_toml import decode_json
from sfumato.common.text import plural
from sfumato.errors import UserError
from sfumato.formats.checkpoint import SAFETENSORS_DTYPES, TensorFile
from sfumato.formats.checkpoint_writer import write_safetensors, write_stream
from sfumato.formats.hashes import HASH_KEYS, add_hashes
from sfumato.formats.header import read_header
from sfumato.formats.metadata import EMA_KEY
from sfumato.optim.ema import PowerProfile, gamma_from_sigma_rel
from sfumato.tools.adapter_files.written_values import WrittenValues

RECONSTRUCTED_EMA = "sfumato.ema_made"  # metadata key of such a file: its width, and the files it was made from
TRAIN_FIX = "train with --ema_sigma_rel 0.05 0.1"
Numbers = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class SavedEma:
    """A file that holds a power-function EMA."""

    path: Path
    run: str  # --output_name
    steps: int
    sigma_rel: float


def reconstruct_ema(
    paths: Sequence[Path], sigma_rel: float, *, name: str | None = None, output: Path | None = None
) -> str:
    """Write the EMA of width `sigma_rel` that a run would have at its last saved step; the lines of the report."""
    saved = select_run([ema for ema in find_saved_emas(paths) if name in (None, ema.run)])
    last = max(saved, key=lambda ema: ema.steps)
    output = output or last.path.with_name(f"{last.run}{PowerProfile(sigma_rel).suffix}.safetensors")
    if output.resolve() in {ema.path.resolve() for ema in saved}:
        raise UserError(
            f"{output.name} exists already, saved by the run itself",
            code="ema-output-is-input",
            fix="give another --output",
        )
    steps, gammas = [ema.steps for ema in saved], [gamma_from_sigma_rel(ema.sigma_rel) for ema in saved]
    solution, error = solve_coefficients(steps, gammas, last.steps, gamma_from_sigma_rel(sigma_rel))
    coefficients = {ema.path: coefficient for ema, coefficient in zip(saved, solution, strict=True)}
    warnings = write_weighted_sum(output, coefficients, last.path, sigma_rel)
    made = f"{output}: {plural(len(saved), 'file')}, step {last.steps}, relative error of the profile {error:.2%}"
    return "\n".join([*warnings, made])


def find_saved_emas(paths: Iterable[Path]) -> Iterator[SavedEma]:
    """The files that hold power-function EMAs; a file that was named and holds none is a UserError."""
    for path in paths:
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            saved = parse_ema_facts(file, read_header(file).metadata.get(EMA_KEY, "{}"))
            if saved:
                yield saved
            elif not path.is_dir():
                raise UserError(f"{file} holds no power-function EMA", code="file-without-power-ema", fix=TRAIN_FIX)


def parse_ema_facts(file: Path, text: str) -> SavedEma | None:
    """From what the metadata of a file says; None for a file of no such EMA. UserError where it is damaged."""
    try:
        facts = decode_json(text)
        if "sigma_rel" not in facts:
            return None
        run, steps, sigma_rel = facts["of"], facts["steps"], facts["sigma_rel"]
    except (ValueError, KeyError, TypeError):
        run, steps, sigma_rel = None, None, None
    if not (isinstance(run, str) and type(steps) is int and 0 <= steps < 2**53 and type(sigma_rel) is float):
        raise UserError(f"{file}: what its metadata says of its EMA is damaged", code="ema-metadata-damaged")
    return SavedEma(path=file, run=run, steps=steps, sigma_rel=sigma_rel)


def select_run(saved: Sequence[SavedEma]) -> list[SavedEma]:
    """One file of each width and step."""
    if not saved:
        raise UserError("no safetensors file with a power-function EMA found", code="power-ema-missing", fix=TRAIN_FIX)
    runs = sorted({ema.run for ema in saved})
    if len(runs) > 1:
        raise UserError(
            f"EMAs of several runs: {', '.join(runs)}", code="ema-run-ambiguous", fix="choose one with --name"
        )
    return list({(ema.steps, ema.sigma_rel): ema for ema in saved if ema.steps}.values())


def solve_coefficients(steps: Sequence[int], gammas: Sequence[float], step: int, gamma: float) -> tuple[Numbers, float]:
    """The coefficient of each saved EMA, and the error of their sum relative to the wanted profile (L2 norm).

    The coefficients sum to 1, which the paper does not ask for: what is equal in all EMAs stays as it is, and in
    fine-tuning that is nearly everything.
    """
    times, powers = np.array(steps) / step, np.array(gammas)  # time 1 is the wanted step
    saved = correlate_profiles(times[:, None], powers[:, None], times[None], powers[None])
    wanted = correlate_profiles(times, powers, np.array(1.0), np.array(gamma))
    ones = np.ones((len(times), 1))
    system = np.block([[saved, ones], [ones.T, np.zeros((1, 1))]])
    coefficients = np.linalg.lstsq(system, np.append(wanted, 1.0), rcond=None)[0][:-1]
    norm = correlate_profiles(np.array(1.0), np.array(gamma), np.array(1.0), np.array(gamma))
    residual = norm - 2 * coefficients @ wanted + coefficients @ saved @ coefficients
    return coefficients, float(np.sqrt(max(residual, 0.0) / norm))


def correlate_profiles(time: Numbers, gamma: Numbers, other_time: Numbers, other_gamma: Numbers) -> Numbers:
    """The integral of the product of two profiles p(s) = (gamma + 1) s^gamma / time^(gamma + 1), 0 <= s <= time."""
    early, late = np.minimum(time, other_time), np.maximum(time, other_time)  # the product ends where the earlier does
    late_gamma = np.where(time < other_time, other_gamma, gamma)
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * (early / late) ** late_gamma / late


def write_weighted_sum(output: Path, coefficients: Mapping[Path, float], like: Path, sigma_rel: float) -> list[str]:
    """The weighted sum of files, tensor by tensor, in the dtypes of the file `like`; integer tensors are its own.

    The report's lines about files that are not finite.
    """
    with ExitStack() as stack:
        files = {path: stack.enter_context(TensorFile(path)) for path in coefficients}
        header = files[like].header
        check_same_tensors(files, like)
        values = WrittenValues()

        def make(name: str) -> Tensor:
            base, origins = files[like].read(name), [(file, name) for file in files.values()]
            if not base.is_floating_point():
                return base
            start = base.float()
            total = start.clone()
            for path, coefficient in coefficients.items():  # sums differences, so what is equal in all keeps its bits
                total += coefficient * (files[path].read(name, dtype=torch.float32) - start)
            values.check(output, name, total, base.dtype, origins)
            return total.to(base.dtype)

        specs = {name: (SAFETENSORS_DTYPES[info.dtype], info.shape) for name, info in header.tensors.items()}
        facts = json.dumps({"sigma_rel": sigma_rel, "of": sorted(path.name for path in coefficients)})
        metadata = {key: text for key, text in header.metadata.items() if key != EMA_KEY} | {RECONSTRUCTED_EMA: facts}
        if HASH_KEYS[0] not in metadata:
            write_stream(output, specs, make, metadata)
        else:  # an adapter is small, and its hashes come before its tensors
            tensors = {name: make(name) for name in specs}
            write_safetensors(output, tensors, add_hashes(metadata, tensors))
    return values.list_warnings()


def check_same_tensors(files: Mapping[Path, TensorFile], like: Path) -> None:
    """UserError where a file has not the names and shapes of the file `like`."""
    shapes = {name: info.shape for name, info in files[like].header.tensors.items()}
    for path, file in files.items():
        if {name: info.shape for name, info in file.header.tensors.items()} != shapes:
            raise UserError(
                f"{path} has other tensors than {like}: they are not of one run",
                code="ema-tensors-differ",
                fix="give the files of one run",
            )
