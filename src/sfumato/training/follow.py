"""Following the steps, each one step late: log its numbers, say why it was skipped, end a run that cannot go on."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sfumato.data.loader import Step
from sfumato.optim.lr_schedule import current_learning_rates
from sfumato.training.diagnose import diagnose_nonfinite
from sfumato.training.outcomes import Outcome, StepResult
from sfumato.training.run import Run
from sfumato.training.saving import state_folder


def follow_step(run: Run, step: Step, result: StepResult, curves: Mapping[str, Tensor]) -> None:
    """Call when a step is launched: starts the copies of its numbers, and looks at those of the step before.

    The host so is one step ahead of the device and never more. curves: further series, 0-d.
    """
    earlier = run.outcomes.pending
    outcome = run.outcomes.pending = run.outcomes.fetch(step, result, {"grad_norm": result.grad_norm, **curves})
    run.metrics.log_step(step.index + 1, outcome, current_learning_rates(run.optimizer))
    if earlier is not None:
        look_at(run, earlier)


def settle(run: Run) -> None:
    """Look at the last step, too, before the run ends."""
    run.outcomes.trace.finish()
    outcome, run.outcomes.pending = run.outcomes.pending, None
    if outcome is not None:
        look_at(run, outcome)


def look_at(run: Run, outcome: Outcome) -> None:
    """UserError after too many skipped steps in a row, or where what was asked to train does not."""
    guard = run.outcomes.guard
    guard.count(sound=outcome.sound)
    if not outcome.sound:
        guard.report_skip(
            outcome.step.index + 1, diagnose_nonfinite(run, outcome.step), fused=run.optimization.owner.in_backward
        )
    if guard.exhausted:
        raise guard.error(state_folder(run, run.step))
    if outcome.finite:
        run.outcomes.check.note(outcome.measured)
    if line := run.outcomes.find_spill(outcome):
        run.warn([line])
