"""The model as it is evaluated: in eval mode, with the weights of an EMA or of a schedule-free optimizer's average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sfumato.optim.averaging import eval_weights
from sfumato.training.run import Run


@contextmanager
def eval_mode(run: Run) -> Iterator[None]:
    """Within, the weights are those that are evaluated and nothing is in training mode; then all is as it was."""
    training = [module for module in run.method.modules.modules() if module.training]
    run.method.modules.eval()
    try:
        with eval_weights(run.optimizer), run.ema.using_ema():
            yield
    finally:
        for module in training:
            module.training = True
