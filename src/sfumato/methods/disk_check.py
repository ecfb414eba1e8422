"""Whether what a run will save fits on the disk, known from the plan."""

from __future__ import annotations

from sfumato.common.files import DiskNeed, check_disk_space
from sfumato.config import Config
from sfumato.data.plans import DataPlan
from sfumato.formats.checkpoint import SAVE_DTYPES
from sfumato.formats.save_schedule import count_saves_on_disk, make_save_schedule
from sfumato.methods.model_plan import ModelPlan


def check_disk(config: Config, data: DataPlan, total_steps: int, model: ModelPlan) -> None:
    """Everything that the run will have on the disk at once must fit there; a state counts with what it surely has."""
    if config.source("output_dir") == "launcher":  # a stand-in of a published model's rehearsal: nothing is saved there
        return
    save = config.save
    assert save.output_dir is not None
    epochs = -(-total_steps // data.count_steps_per_epoch(config.loop.gradient_accumulation_steps))
    saves = make_save_schedule(save, epochs)
    averages = config.ema.ema_count
    outputs = (1 + count_saves_on_disk(saves, steps=total_steps, epochs=epochs, state=False)) * (1 + averages)
    outputs += 2 if config.validation.save_best else 0  # the best yet stands until a better one does
    states = count_saves_on_disk(saves, steps=total_steps, epochs=epochs, state=True) if save.save_state else 0
    states += save.save_state or save.save_state_on_train_end
    one = model.method.output_bytes(model.blueprint, SAVE_DTYPES[save.save_precision])
    moments = 2 if config.optim.optimizer == "AdamW" else 0  # other optimizers may keep less than the weights
    state = sum(part.parameters for part in model.parts) * 4 * (1 + moments + averages)
    needs = [DiskNeed("saves", outputs, one), DiskNeed("states", states, state)]
    fewer = "save less often, keep fewer (--save_last_n_steps, --save_last_n_epochs), or --save_precision fp16"
    check_disk_space(save.output_dir, needs, mine=save.output_name, fix=fewer)
