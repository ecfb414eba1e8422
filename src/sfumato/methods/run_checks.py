"""What can be wrong with a run as a whole, once its model, its data and the number of its steps are known."""

from __future__ import annotations

from sfumato.config import Config
from sfumato.data.plans import DataPlan
from sfumato.errors import Problems
from sfumato.methods.disk_check import check_disk
from sfumato.methods.model_plan import ModelPlan
from sfumato.methods.sharing_rules import Planned, list_broken_sharing_rules


def check_run(config: Config, data: DataPlan, total_steps: int, model: ModelPlan, problems: Problems) -> None:
    """Add a problem for weights that cannot be shared out and, where all else is well, for a disk that is too small."""
    planned = Planned(config, model.blueprint, model.method, model.parts, data)
    problems.found += list_broken_sharing_rules(planned)
    if total_steps and not problems.found:
        with problems.catch():
            check_disk(config, data, total_steps, model)
