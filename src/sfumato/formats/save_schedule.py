"""The save schedule: when something is saved, under which name, and which older saves are removed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sfumato.common.text import plural
from sfumato.config import SaveOptions


@dataclass(frozen=True, kw_only=True)
class SaveSchedule:
    """The save options of one run with their defaults resolved. Steps and epochs count from 1."""

    name: str
    every_steps: int | None
    every_epochs: int | None
    last_steps: int | None
    last_epochs: int | None
    last_steps_state: int | None
    last_epochs_state: int | None
    steps: tuple[int, ...] = ()  # saved in addition, and never removed
    epochs: tuple[int, ...] = ()  # the same

    def name_at_step(self, step: int) -> str | None:
        """Name of the save after this step; None without one."""
        due = step in self.steps or (self.every_steps and step % self.every_steps == 0)
        return f"{self.name}-step{step:08d}" if due else None

    def name_at_epoch(self, epoch: int, epochs: int) -> str | None:
        """Name of the save after this epoch; None without one, and after the last epoch, which has the final save."""
        due = epoch in self.epochs or (self.every_epochs and epoch % self.every_epochs == 0)
        return f"{self.name}-{epoch:06d}" if due and epoch < epochs else None

    def list_expired_at_step(self, step: int, *, state: bool) -> Iterator[str]:
        """Names of step saves to remove once the one of `step` is complete."""
        keep = self.last_steps_state if state else self.last_steps
        if self.every_steps and keep is not None:
            newest = (step - keep - 1) // self.every_steps * self.every_steps
            for old in range(self.every_steps, newest + 1, self.every_steps):
                if old not in self.steps:
                    yield f"{self.name}-step{old:08d}"

    def list_expired_at_epoch(self, epoch: int, *, state: bool) -> Iterator[str]:
        """Names of epoch saves to remove once the one of `epoch` is complete."""
        keep = self.last_epochs_state if state else self.last_epochs
        if self.every_epochs and keep is not None:
            newest = epoch - keep * self.every_epochs
            for old in range(self.every_epochs, newest + 1, self.every_epochs):
                if old not in self.epochs:
                    yield f"{self.name}-{old:06d}"


def count_saves_on_disk(schedule: SaveSchedule, *, steps: int, epochs: int, state: bool) -> int:
    """The most saves on disk at once before the final one; an old one is removed once the new one is complete."""
    keep_steps, keep_epochs = schedule.last_steps, schedule.last_epochs
    if state:
        keep_steps, keep_epochs = schedule.last_steps_state, schedule.last_epochs_state
    count = sum(step < steps for step in schedule.steps) + sum(epoch < epochs for epoch in schedule.epochs)
    if schedule.every_steps:
        saves = (steps - 1) // schedule.every_steps
        count += saves if keep_steps is None else min(saves, 1 + -(-(keep_steps + 1) // schedule.every_steps))
    if schedule.every_epochs:
        saves = (epochs - 1) // schedule.every_epochs
        count += saves if keep_epochs is None else min(saves, 1 + keep_epochs)
    return count


def make_save_schedule(save: SaveOptions, epochs: int) -> SaveSchedule:
    every = save.save_every_n_epochs
    if save.save_n_epoch_ratio:  # takes precedence, as in sd-scripts
        every = max(1, epochs // save.save_n_epoch_ratio)
    last_epochs, last_steps = save.save_last_n_epochs, save.save_last_n_steps
    return SaveSchedule(
        name=save.output_name,
        every_steps=save.save_every_n_steps,
        every_epochs=every,
        last_steps=last_steps,
        last_epochs=last_epochs,
        last_steps_state=save.save_last_n_steps_state or last_steps,
        last_epochs_state=save.save_last_n_epochs_state or last_epochs,
        steps=tuple(sorted(set(save.save_at_steps))),
        epochs=tuple(sorted(set(save.save_at_epochs))),
    )


def describe_retention(schedule: SaveSchedule, *, states: bool) -> list[str]:
    """One line for each kind of save: when it is made and how long it is kept."""
    lines: list[str] = []
    rows = (
        ("step", schedule.every_steps, schedule.last_steps, schedule.last_steps_state),
        ("epoch", schedule.every_epochs, schedule.last_epochs, schedule.last_epochs_state),
    )
    for unit, every, last, last_state in rows:
        if every:
            retention = f"the last {last} {unit}s are kept" if last is not None else "all are kept"
            retention += f"; states: {'all' if last_state is None else f'the last {last_state}'}" if states else ""
            lines.append(f"saving every {plural(every, unit) if every > 1 else unit}; {retention}")
    for unit, listed in (("step", schedule.steps), ("epoch", schedule.epochs)):
        if listed:
            lines.append(f"saving after {unit} {', '.join(map(str, listed))}; these are kept")
    return lines
