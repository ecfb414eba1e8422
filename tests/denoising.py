"""Help for tests that denoise: the loop with a sampler by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from families.loading import NoMethod
from sfumato.families.base import Family
from sfumato.sampling.denoise import DenoiseRequest, Guidance, denoise
from sfumato.sampling.schedulers import make_scheduler


def run_denoising(
    model: Family,
    noise: Tensor,
    text: Any,
    guidance: Guidance | None = None,
    *,
    method: Any = None,
    sampler: str = "ddim",
    seed: int = 1,
    **more: Any,
) -> Tensor:
    """Latents; `more` are further fields of the request. seed: of the noise that some samplers add."""
    request = DenoiseRequest(
        noise=noise, text=text, scheduler=make_scheduler(sampler, model.objective),
        generators=Generator().manual_seed(seed), **more,
    )  # fmt: skip
    with torch.no_grad():
        return denoise(model, method or NoMethod(), request, guidance or Guidance())
