"""The training step and the preview of a rehearsal, as the loop takes them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from sfumato.config.prompts import read_prompts
from sfumato.errors import UserError
from sfumato.sample import generate_batch
from sfumato.sampling.request import make_request
from sfumato.train import train_step
from sfumato.training.evaluation import eval_mode
from sfumato.training.follow import follow_step, settle
from sfumato.training.prefetch import prefetch
from sfumato.training.run import Run


def rehearse_step(run: Run) -> None:
    """As the loop takes one."""
    step = next(prefetch(run, 0))
    follow_step(run, step, train_step(run, step), run.method.after_step())
    run.ema.update()
    settle(run)


def take_step(run: Run, index: int, stage: AbstractContextManager[None]) -> None:
    """The same for one that is measured: looking at its numbers, which resets the device's own peak, is outside."""
    with stage:
        step = next(prefetch(run, index))
        result = train_step(run, step)
        curves = run.method.after_step()
        run.ema.update()
    follow_step(run, step, result, curves)
    settle(run)


def check_step(run: Run) -> None:
    """Raise UserError where the step did not change what trains; warn of layers without a gradient."""
    guard = run.outcomes.guard
    if guard.skipped:
        raise UserError(
            f"the step gave a non-finite loss or gradient: {guard.reason}",
            code="dry-run-nonfinite",
            fix="a lower --learning_rate, or --mixed_precision bf16 or no",
        )
    run.warn_once(run.method.report())


def rehearse_preview(run: Run, prompts: Path) -> None:
    """The largest image of the prompts: one denoising step, and its decoding."""
    samples = run.config.samples
    requests = [
        make_request(prompt, run.model, sampler=samples.sample_sampler, seed=0, weighted=samples.prompt_weighting)
        for prompt in read_prompts(prompts)
    ]
    largest = max(requests, key=lambda request: request.width * request.height)
    count = min(len(requests), samples.sample_batch_size or 1)
    with eval_mode(run), run.autocast(), run.method.sampling():
        generate_batch(run.model, run.method, [replace(largest, steps=1)] * count, run.context.text)
