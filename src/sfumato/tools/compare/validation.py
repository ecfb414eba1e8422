"""The validation loss of each checkpoint: as its run wrote it down, else measured now in the same way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from sfumato.config import Config
from sfumato.data.plans import DataPlan
from sfumato.optim.ema import list_profiles
from sfumato.tools.compare.checkpoints import SavedCheckpoint
from sfumato.tools.compare.models import CheckpointModels
from sfumato.track.report_charts import VALIDATION
from sfumato.track.report_curves import METRICS_SUFFIX, Curves
from sfumato.training.held_out import measure_held_out_loss


class ValidationLosses:
    """Of the checkpoints of one run. config: as it holds for the model."""

    def __init__(self, config: Config, folder: Path, name: str, plan: DataPlan) -> None:
        self.config, self.plan = config, plan
        curves = Curves(folder / f"{name}{METRICS_SUFFIX}")
        curves.read()
        steps, losses = curves.xy(VALIDATION)
        profiles = list_profiles(config.ema) if config.ema.evaluate_with_ema else []
        self.validated = profiles[0].suffix if profiles else ""  # the end of the name of the weights that it measured
        self.written = dict(zip(steps.astype(int).tolist(), losses.tolist(), strict=True))

    def find_written(self, checkpoint: SavedCheckpoint) -> float:
        """nan where the run has not validated after that step, or another average of its weights."""
        return self.written.get(checkpoint.step, math.nan) if checkpoint.ema == self.validated else math.nan

    def measure(self, checkpoints: Sequence[SavedCheckpoint], models: CheckpointModels) -> list[float]:
        """One a checkpoint; nan where no image was held out and nothing is written."""
        losses: list[float] = []
        for checkpoint in checkpoints:
            loss = self.find_written(checkpoint)
            if math.isnan(loss) and self.plan.validation:
                with models.use(checkpoint.path) as (model, adapters):
                    for part in (name for name in model.parts if name not in model.text_parts):
                        model.parts[part].load()
                    loss = measure_held_out_loss(self.config, self.plan, model, adapters)
            losses.append(loss)
        return losses
