"""What a run saves: trained files and states. Called by the loop between steps."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sfumato.common import files
from sfumato.common.text import EMPTY, plural
from sfumato.errors import UserError
from sfumato.formats.checkpoint import SAVE_DTYPES
from sfumato.formats.metadata import EMA_KEY, add_save_facts, keep_minimum, make_modelspec
from sfumato.formats.metadata_limit import fit_metadata
from sfumato.formats.state import StateTree, write_state
from sfumato.optim.averaging import eval_weights
from sfumato.optim.ema import Ema
from sfumato.training.nonfinite import check_finite_weights, find_nonfinite_group
from sfumato.training.previews import save_due_previews, save_previews
from sfumato.training.run import Run

log = logging.getLogger(__name__)


def run_due_saves(run: Run, step: int) -> None:
    """Once in a while: everything that is due after this step, counted from 1, before the last one."""
    plan, states = run.plan, run.config.save.save_state
    ends_epoch, epoch = step % plan.steps_per_epoch == 0, step // plan.steps_per_epoch
    save_due_previews(run, step)
    if (name := plan.saves.name_at_step(step)) and save_output_and_state(run, name, step, state=states):
        remove_expired(
            run, plan.saves.list_expired_at_step(step, state=False), plan.saves.list_expired_at_step(step, state=True)
        )
    name = plan.saves.name_at_epoch(epoch, plan.epochs) if ends_epoch else None
    if name and save_output_and_state(run, name, step, state=states):
        remove_expired(
            run,
            plan.saves.list_expired_at_epoch(epoch, state=False),
            plan.saves.list_expired_at_epoch(epoch, state=True),
        )


def save_final(run: Run) -> None:
    """After the last step: the output, or at least a state."""
    save, samples = run.config.save, run.config.samples
    name, total = run.plan.saves.name, run.plan.total_steps
    if samples.sample_every_n_epochs or samples.sample_every_n_steps:
        save_previews(run, total, f"{total:06d}")
    state = save.save_state or save.save_state_on_train_end
    if save_output_and_state(run, name, total, state=state, last=True):
        log.info("saved %s", run.output_path(name))
    elif not state:  # what was learned must not be lost
        failures = save_state_of(run, total, state_folder(run, total), last=True)
        run.failed_saves += failures
        if not failures:
            log.warning("the state is saved instead: %s", state_folder(run, total))


def save_stopped(run: Run, step: int) -> None:
    """The state of a run that stops early. UserError where it cannot be saved."""
    run.metrics.flush()
    broken, state = find_broken_groups(run), collect_state(run, step)
    run.parallel.run_on_main(partial(write_stopped, run, step, state, broken), state.tensors)


def write_stopped(run: Run, step: int, state: StateTree, broken: Sequence[str]) -> None:
    folder = state_folder(run, step)
    check_finite_weights(broken, step)
    try:
        write_state_folder(run, state, folder)
    except OSError as error:
        raise UserError(
            f"stopped after step {step}, but its state could not be saved: {error}",
            code="stop-without-state",
            fix="--resume the last state that was saved before",
        ) from error
    run.hub.upload_state(folder, last=True)
    log.info("stopped after step %d of %d; go on with: --resume %s", step, run.plan.total_steps, folder)


def check_saves(run: Run) -> None:
    """At the end of complete training: UserError where a save failed."""
    if run.failed_saves and run.step == run.plan.total_steps:
        raise UserError(
            f"training is complete, but {plural(len(run.failed_saves), 'save')} failed; the last: "
            f"{run.failed_saves[-1]}",
            code="saves-failed",
        )


def save_output_and_state(run: Run, name: str, step: int, *, state: bool, last: bool = False) -> bool:
    """The output, those of its EMAs, its state if asked for, and their uploads; whether all were written.

    A save that fails is reported and training goes on.
    """
    run.metrics.flush()
    failures: list[str] = []
    with eval_weights(run.optimizer):
        failures += save_output_of(run, name, step, last=last)
    for ema in run.ema:
        with ema.apply():
            failures += save_output_of(run, name + ema.profile.suffix, step, ema_metadata(run, ema), last=last)
    if state:
        failures += save_state_of(run, step, state_folder(run, step, name), last=last)
    run.failed_saves += failures
    run.metrics.publish()
    return not failures


def save_output_of(run: Run, name: str, step: int, more: Mapping[str, str] = EMPTY, *, last: bool = False) -> list[str]:
    """The method's file or folder, those beside it, and their uploads; gives why that failed, if it did.

    All processes take part.
    """
    broken, paths = find_broken_groups(run), run.output_paths(name)

    def write() -> list[str]:
        failures: list[str] = []
        with survive_failed_save(paths[0], step, failures):
            check_finite_weights(broken, step)
            save_output(run, paths[0], step, more)
            for path in paths:
                run.hub.upload(path, last=last)
        return failures

    return run.parallel.run_on_main(write)


def save_state_of(run: Run, step: int, folder: Path, *, last: bool) -> list[str]:
    """The state and its upload, in the same way."""
    broken, state = find_broken_groups(run), collect_state(run, step)

    def write() -> list[str]:
        failures: list[str] = []
        with survive_failed_save(folder, step, failures):
            check_finite_weights(broken, step)
            write_state_folder(run, state, folder)
            run.hub.upload_state(folder, last=last)
        return failures

    return run.parallel.run_on_main(write, state.tensors)


def find_broken_groups(run: Run) -> list[str]:
    """A meeting: of each process the name of a group of weights that are not finite, or an empty text."""
    return run.parallel.exchange(find_nonfinite_group(run.optimizer))


@contextmanager
def survive_failed_save(path: Path, step: int, failures: list[str]) -> Iterator[None]:
    """A save that fails leaves what was there before, a warning now, and a line in `failures`, an error at the end."""
    try:
        yield
    except (UserError, OSError) as error:
        failures.append(f"{path.name} after step {step}: {error}")
        log.warning("%s was not saved after step %d, training goes on: %s", path.name, step, error)


def save_output(run: Run, path: Path, step: int, more: Mapping[str, str] = EMPTY) -> None:
    """The method's file or folder, with its metadata and `more`. For the main process, within `run_on_main`."""
    epoch = -(-step // run.plan.steps_per_epoch)
    metadata = add_save_facts({**run.metadata, **run.file_hashes.result(), **more}, step=step, epoch=epoch)
    if run.config.save.no_metadata:
        metadata = keep_minimum(metadata)
    dtype = SAVE_DTYPES[run.config.save.save_precision]
    fitted, _ = fit_metadata(metadata | run_modelspec(run))  # reported before the first step
    run.method.write(run.model, path, fitted, dtype)


def run_modelspec(run: Run) -> dict[str, str]:
    """The modelspec keys of the run's files."""
    plan, blueprint = run.plan, run.plan.blueprint
    is_whole = not plan.method.modelspec_suffix
    predicts = run.model.objective.predicts
    return make_modelspec(
        plan.config,
        architecture=blueprint.architecture + plan.method.modelspec_suffix,
        implementation=(is_whole and blueprint.checkpoint_implementation) or blueprint.implementation,
        prediction_type="" if predicts == "velocity" else predicts,
        resolution=plan.data.datasets[0].settings.resolution,
    )


def ema_metadata(run: Run, ema: Ema | None) -> dict[str, str]:
    """What a file says of the EMA that it holds."""
    return {EMA_KEY: json.dumps({**ema.facts(), "of": run.plan.saves.name})} if ema else {}


def collect_state(run: Run, step: int) -> StateTree:
    """Everything that the next step depends on, in all processes; the main one alone has every loss.

    All of them have flushed the metrics before.
    """
    return run.state.collect(run.start, step, run.parallel.shared_kinds)


def write_state_folder(run: Run, state: StateTree, folder: Path) -> None:
    """For the main process, within `run_on_main` where others have a part of the weights."""
    write_state(folder, state, run.state.info, run.parallel.make_whole)


def state_folder(run: Run, step: int, name: str | None = None) -> Path:
    """Where the state after a step lies. name: of the save that it belongs to; None where there is none."""
    return run.plan.output_dir / f"{name or f'{run.plan.saves.name}-step{step:08d}'}-state"


def remove_expired(run: Run, outputs: Iterable[str], states: Iterable[str]) -> None:
    """Older saves go once the new one is complete, with the EMAs beside them."""
    paths = [run.plan.output_dir / f"{name}-state" for name in states]
    for name in outputs:
        for suffix in ("", *run.ema.suffixes):
            paths += run.output_paths(name + suffix)
    run.parallel.run_on_main(partial(remove_saves, run, paths))


def remove_saves(run: Run, paths: Iterable[Path]) -> None:
    for path in paths:
        run.hub.finish(path)
        files.remove(path)
