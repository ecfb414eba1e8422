"""What a run leaves behind: trained files, states, previews. Called by the loop between steps."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfumato import plan
from sfumato.common import files
from sfumato.common.seeds import seed_of
from sfumato.config.prompts import Prompt, read_prompts
from sfumato.errors import UserError
from sfumato.formats.checkpoint import PRECISIONS
from sfumato.formats.metadata import EMA, at_save, minimum, without_paths
from sfumato.formats.state import save_state
from sfumato.optim.averaging import averaged
from sfumato.optim.ema import Average
from sfumato.optim.optimizers import class_name
from sfumato.sample import Picture, fill_in, generate_together, together, without_effect
from sfumato.training.image_metadata import command, recipe, save_picture
from sfumato.training.run import Run

log = logging.getLogger(__name__)
NOTHING: Mapping[str, str] = MappingProxyType({})
# What may be raised where prompts meet samplers and networks of others; none of it is worth a run.
PREVIEW_FAULTS = (UserError, OSError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError)


def saves_due(run: Run, step: int) -> None:
    """Once in a while: everything that is due after this step, counted from 1, before the last one."""
    save, samples = run.config.save, run.config.samples
    ends_epoch = step % run.steps_per_epoch == 0
    epoch = step // run.steps_per_epoch
    if ends_epoch and samples.sample_every_n_epochs and epoch % samples.sample_every_n_epochs == 0:
        save_previews(run, step, f"e{epoch:06d}")
    elif (
        not samples.sample_every_n_epochs and samples.sample_every_n_steps and step % samples.sample_every_n_steps == 0
    ):
        save_previews(run, step, f"{step:06d}")
    if (name := run.saves.at_step(step)) and save_both(run, name, step, state=save.save_state):
        remove(run, run.saves.expired_at_step(step, state=False), run.saves.expired_at_step(step, state=True))
    name = run.saves.at_epoch(epoch, run.epochs) if ends_epoch else None
    if name and save_both(run, name, step, state=save.save_state):
        remove(run, run.saves.expired_at_epoch(epoch, state=False), run.saves.expired_at_epoch(epoch, state=True))


def save_final(run: Run) -> None:
    """After the last step. Raises UserError where this or an earlier save failed."""
    save, samples = run.config.save, run.config.samples
    if samples.sample_every_n_epochs or samples.sample_every_n_steps:
        save_previews(run, run.total, f"{run.total:06d}")
    path, state = output_path(run, run.saves.name), save.save_state or save.save_state_on_train_end
    if save_both(run, run.saves.name, run.total, state=state, last=True):
        log.info("saved %s", path)
    if run.lost:
        raise UserError(f"training is complete, but {len(run.lost)} saves failed; the last: {run.lost[-1]}")


def save_both(run: Run, name: str, step: int, *, state: bool, last: bool = False) -> bool:
    """The output, its state if asked for, and their copies; whether all stand here. What fails is told, not raised."""
    run.journal.flush()
    if not run.is_main:
        return True
    path, folder, lost = output_path(run, name), f"{name}-state", len(run.lost)
    with kept_going(run, path, step), averaged(run.optimizer):
        save_output(run, path, step)
        run.hub.upload(path, last=last)
    for average in run.averages:
        path = output_path(run, name + average.shape.suffix)
        with kept_going(run, path, step), average.in_place():
            save_output(run, path, step, average_facts(run, average))
            run.hub.upload(path, last=last)
    if state:
        with kept_going(run, run.output / folder, step):
            run.hub.upload_state(save_state_folder(run, folder, step), last=last)
    run.journal.publish()
    return len(run.lost) == lost


@contextmanager
def kept_going(run: Run, path: Path, step: int) -> Iterator[None]:
    """A save that fails leaves what was there before, a warning now, and an error at the end."""
    try:
        yield
    except (UserError, OSError) as error:
        run.lost.append(f"{path.name} after step {step}: {error}")
        log.warning("%s was not saved after step %d, training goes on: %s", path.name, step, error)


@contextmanager
def at_rest(run: Run) -> Iterator[None]:
    """For a while the weights are what is evaluated, and nothing is in training mode; then all is as it was."""
    training = [module for module in run.method.modules.modules() if module.training]
    run.method.modules.eval()
    try:
        with averaged(run.optimizer), run.averages.shown():
            yield
    finally:
        for module in training:
            module.training = True


def output_path(run: Run, name: str) -> Path:
    return run.output / (name + run.method.ending(run.model.blueprint))


def average_facts(run: Run, average: Average | None) -> dict[str, str]:
    """What a file says of the average that it holds."""
    return {EMA: json.dumps({**average.facts(), "of": run.saves.name})} if average else {}


def save_output(run: Run, path: Path, step: int, more: Mapping[str, str] = NOTHING) -> None:
    """The method's file or folder, with its metadata and `more`."""
    epoch = -(-step // run.steps_per_epoch)
    metadata = at_save({**run.metadata, **run.named_files.result(), **more}, step=step, epoch=epoch)
    if run.config.save.no_metadata:
        metadata = minimum(metadata)
    run.method.write(run.model, path, metadata | run.modelspec(), PRECISIONS[run.config.save.save_precision])


def save_state_folder(run: Run, name: str, step: int) -> Path:
    """Everything that the next step depends on: trained weights, optimizer, step, recent losses."""
    run.journal.flush()
    folder = run.output / name
    if run.is_main:
        state: dict[str, Any] = {
            "step": step,
            "began": run.begun.state(),
            "weights": run.method.state(),
            "optimizer": run.optimizer.state_dict(),
            "optimizer_class": class_name(run.optimizer),
            "uncertainty": run.recipe.uncertainty.state_dict() if run.recipe.uncertainty else {},
            "averages": run.averages.state_dict(),
            "rates": run.rates.state_dict(),
            "scaler": run.scaler.state_dict(),
            "journal": run.journal.state_dict(),
            "best": vars(run.best),
        }
        save_state(folder, state, {"options": plan.public_options(run.config)})
    return folder


def remove(run: Run, outputs: Iterable[str], states: Iterable[str]) -> None:
    """Older saves go once the new one stands, with the averages that lie beside them."""
    if not run.is_main:
        return
    saved = (name + suffix for name in outputs for suffix in ("", *run.averages.suffixes))
    for path in (*(output_path(run, name) for name in saved), *(run.output / f"{name}-state" for name in states)):
        run.hub.finish(path)
        files.remove(path)


def save_previews(run: Run, step: int, label: str) -> None:
    """Pictures of every prompt; the file is read again each time. A failure is a warning, training goes on."""
    path = run.config.samples.sample_prompts
    if path is None or not run.is_main:
        return
    try:
        with at_rest(run):
            found = [planned(run, prompt, number, step, label) for number, prompt in enumerate(read_prompts(path))]
            for group in together(found, run.config.samples.sample_batch_size or 1):
                save_pictures(run, group, step)
    except PREVIEW_FAULTS as error:
        log.warning("no previews after step %d: %s", step, error, exc_info=run.config.log.debug)
    run.journal.publish()


def planned(run: Run, prompt: Prompt, number: int, step: int, label: str) -> tuple[Picture, Path]:
    """A preview and where it goes; what it asks for in vain is told once."""
    assert run.config.loop.seed is not None
    samples = run.config.samples
    seed = seed_of(run.config.loop.seed, "preview", step, number) & 0xFFFFFFFF
    picture = fill_in(prompt, run.model, sampler=samples.sample_sampler, seed=seed, weighted=samples.prompt_weighting)
    run.warn_once((*prompt.notes, *without_effect(prompt, picture, run.model)))
    given = "" if prompt.seed is None else f"_{prompt.seed}"
    name = f"{run.saves.name}_{label}_{number:02d}_{time.strftime('%Y%m%d%H%M%S')}{given}.png"
    return picture, run.output / "sample" / name


def save_pictures(run: Run, group: Sequence[tuple[Picture, Path]], step: int) -> None:
    """PNGs that carry their recipes, and how to make them again."""
    with run.autocast():
        images = generate_together(run.model, run.method, [picture for picture, _ in group], run.frozen_text)
    for image, (picture, path) in zip(images, group, strict=True):
        save_picture(path, image, recipe(picture) | origin(run, picture, step))


def origin(run: Run, picture: Picture, step: int) -> dict[str, str]:
    """When a preview was made and of what: the model, the file of this moment, and the command that uses both.

    Files by their names, or as the user gave them where that is relative; never an absolute path.
    """
    file, note = weights_after(run, step)
    more: dict[str, object] = {run.method.reader: file} if file else {}
    if run.config.memory.mixed_precision != "no" and not run.config.memory.full_bf16:
        more |= {"float32_parts": sorted(run.method.own_weights(run.model.blueprint)) or None}
    if run.config.model.enable_scaled_pos_embed:
        more["resolution"] = run.config.buckets.resolution
    text = {
        "step": str(step),
        "epoch": str(-(-step // run.steps_per_epoch)),
        "model": run.outlook.blueprint.source.name,
        "trained": without_paths(file),
        "command": command(run.config, picture, run.model.sampling, more),
        "note": note,
    }
    return {name: value for name, value in text.items() if value}


def weights_after(run: Run, step: int) -> tuple[str, str]:
    """The file with the weights that a picture after this step is made of, and what sets the two apart."""
    if step == 0:
        given = run.config.network.network_weights
        return str(given) if given else "", ""
    ends_epoch = step % run.steps_per_epoch == 0
    at_epoch = run.saves.at_epoch(step // run.steps_per_epoch, run.epochs) if ends_epoch else None
    name = run.saves.name if step == run.total else run.saves.at_step(step) or at_epoch
    precision = run.config.save.save_precision
    note = f"the file is in {precision}, this picture was made before the weights were rounded" if precision else ""
    suffix = run.averages.evaluated.shape.suffix if run.averages.evaluated else ""
    if name is None:
        name, note = (
            f"{run.saves.name}-step{step:08d}",
            "nothing was saved after this step; a save would have that name",
        )
    return str(output_path(run, name + suffix)), note
