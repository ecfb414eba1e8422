"""`sfumato ema`: a power-function average of any width out of saved ones, by least squares.

An average is a weighted sum of the weights of all steps, so a weighted sum of saved averages is one, too. Its weights
over the steps are brought as near as they come to those of the wanted average (Karras et al. 2024, "Analyzing and
Improving the Training Dynamics of Diffusion Models", sec. 3.2).
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

from sfumato.errors import UserError
from sfumato.formats.checkpoint import DTYPES, TensorFile, write_safetensors, write_stream
from sfumato.formats.hashes import HASHES, with_hashes
from sfumato.formats.header import read_header
from sfumato.formats.metadata import EMA
from sfumato.optim.ema import Power, gamma_of

MADE = "sfumato.ema_made"  # in a file that is such a sum: of what
Numbers = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A file that holds a power average."""

    path: Path
    run: str  # --output_name
    steps: int
    sigma_rel: float


def make_average(
    places: Sequence[Path], sigma_rel: float, *, name: str | None = None, output: Path | None = None
) -> str:
    """Write the average that a run would have at its last saved step; what was done, in a line."""
    saved = of_one_run([each for each in find(places) if name in (None, each.run)])
    last = max(saved, key=lambda each: each.steps)
    output = output or last.path.with_name(f"{last.run}{Power(sigma_rel).suffix}.safetensors")
    if output.resolve() in {each.path.resolve() for each in saved}:
        raise UserError(f"{output.name} is there already, saved by the run itself", fix="give another --output")
    steps, gammas = [each.steps for each in saved], [gamma_of(each.sigma_rel) for each in saved]
    shares, error = fit(steps, gammas, last.steps, gamma_of(sigma_rel))
    write_sum(output, {each.path: share for each, share in zip(saved, shares, strict=True)}, last.path, sigma_rel)
    return f"{output}: {len(saved)} files, step {last.steps}; its shape is met to {error:.2%}"


def find(places: Iterable[Path]) -> Iterator[Saved]:
    """The files that hold power averages; a file that was named and holds none is a UserError."""
    for place in places:
        for path in sorted(place.glob("*.safetensors")) if place.is_dir() else [place]:
            facts = json.loads(read_header(path).metadata.get(EMA, "{}"))
            if "sigma_rel" in facts:
                yield Saved(path=path, run=facts["of"], steps=facts["steps"], sigma_rel=facts["sigma_rel"])
            elif not place.is_dir():
                raise UserError(f"{path} holds no power-function average", fix="train with --ema_sigma_rel 0.05 0.1")


def of_one_run(saved: Sequence[Saved]) -> list[Saved]:
    """One file of each width and step."""
    if not saved:
        raise UserError(
            "no safetensors file of a power-function average was found", fix="train with --ema_sigma_rel 0.05 0.1"
        )
    runs = sorted({each.run for each in saved})
    if len(runs) > 1:
        raise UserError(f"averages of several runs: {', '.join(runs)}", fix="choose one with --name")
    return list({(each.steps, each.sigma_rel): each for each in saved if each.steps}.values())


def fit(steps: Sequence[int], gammas: Sequence[float], step: int, gamma: float) -> tuple[Numbers, float]:
    """The share of each saved average in the wanted one, and how far off their sum stays, relative to it (L2).

    The shares add up to 1, which the paper does not ask for: what is the same in all of them stays what it is, and in
    fine-tuning that is nearly everything.
    """
    times, powers = np.array(steps) / step, np.array(gammas)  # 1 is the wanted step
    inside = overlap(times[:, None], powers[:, None], times[None], powers[None])
    wanted = overlap(times, powers, np.array(1.0), np.array(gamma))
    ones = np.ones((len(times), 1))
    system = np.block([[inside, ones], [ones.T, np.zeros((1, 1))]])
    shares = np.linalg.lstsq(system, np.append(wanted, 1.0), rcond=None)[0][:-1]
    norm = overlap(*(np.array(each) for each in (1.0, gamma, 1.0, gamma)))
    left = norm - 2 * shares @ wanted + shares @ inside @ shares
    return shares, float(np.sqrt(max(left, 0.0) / norm))


def overlap(time: Numbers, gamma: Numbers, other_time: Numbers, other_gamma: Numbers) -> Numbers:
    """The integral of the product of two profiles p(s) = (gamma + 1) s^gamma / time^(gamma + 1), 0 <= s <= time."""
    early, late = np.minimum(time, other_time), np.maximum(time, other_time)  # the product ends where the earlier does
    late_gamma = np.where(time < other_time, other_gamma, gamma)
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * (early / late) ** late_gamma / late


def write_sum(output: Path, shares: Mapping[Path, float], like: Path, sigma_rel: float) -> None:
    """The weighted sum of files, tensor by tensor, in the dtypes of one of them; what is no number is copied."""
    with ExitStack() as stack:
        opened = {path: stack.enter_context(TensorFile(path)) for path in shares}
        header = opened[like].header
        for path, file in opened.items():
            if {n: i.shape for n, i in file.header.tensors.items()} != {n: i.shape for n, i in header.tensors.items()}:
                raise UserError(f"{path} has other tensors than {like}, so they are not of one run")

        def make(name: str) -> Tensor:
            base = opened[like].read(name)
            if not base.is_floating_point():
                return base
            start = base.float()
            total = start.clone()
            for path, share in shares.items():  # as changes, so that what is the same in all keeps its bits
                total += share * (opened[path].read(name, dtype=torch.float32) - start)
            return total.to(base.dtype)

        specs = {name: (DTYPES[info.dtype], info.shape) for name, info in header.tensors.items()}
        made = json.dumps({"sigma_rel": sigma_rel, "of": sorted(path.name for path in shares)})
        metadata = {key: text for key, text in header.metadata.items() if key != EMA} | {MADE: made}
        if HASHES[0] not in metadata:
            write_stream(output, specs, make, metadata)
            return
        tensors = {name: make(name) for name in specs}  # an adapter is small, and its hashes come before its tensors
        write_safetensors(output, tensors, with_hashes(metadata, tensors))
