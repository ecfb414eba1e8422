"""When something is saved, under which name, and what may then go: pure functions of step and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sfumato.config import SaveOptions


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The saving options of one run, with their fall-backs resolved. Steps and epochs count from 1."""

    name: str
    every_steps: int | None
    every_epochs: int | None
    last_steps: int | None
    last_epochs: int | None
    last_steps_state: int | None
    last_epochs_state: int | None
    steps: tuple[int, ...] = ()  # after which something is saved, too, and stays
    epochs: tuple[int, ...] = ()  # the same

    def at_step(self, step: int) -> str | None:
        """Name of what is saved after this step, if anything is."""
        due = step in self.steps or (self.every_steps and step % self.every_steps == 0)
        return f"{self.name}-step{step:08d}" if due else None

    def at_epoch(self, epoch: int, epochs: int) -> str | None:
        """Name of what is saved after this epoch; the last one is left to the final save."""
        due = epoch in self.epochs or (self.every_epochs and epoch % self.every_epochs == 0)
        return f"{self.name}-{epoch:06d}" if due and epoch < epochs else None

    def expired_at_step(self, step: int, *, state: bool) -> Iterator[str]:
        """Names of step saves that may go once the one of `step` stands."""
        keep = self.last_steps_state if state else self.last_steps
        if self.every_steps and keep is not None:
            newest = (step - keep - 1) // self.every_steps * self.every_steps
            old = (old for old in range(self.every_steps, newest + 1, self.every_steps) if old not in self.steps)
            yield from (f"{self.name}-step{each:08d}" for each in old)

    def expired_at_epoch(self, epoch: int, *, state: bool) -> Iterator[str]:
        """Names of epoch saves that may go once the one of `epoch` stands."""
        keep = self.last_epochs_state if state else self.last_epochs
        if self.every_epochs and keep is not None:
            newest = epoch - keep * self.every_epochs
            old = (old for old in range(self.every_epochs, newest + 1, self.every_epochs) if old not in self.epochs)
            yield from (f"{self.name}-{each:06d}" for each in old)


def most_kept(plan: Plan, *, steps: int, epochs: int, state: bool) -> int:
    """How many saves lie on the disk at once, at most, before the final one: an older goes only once the new stands."""
    by_step, by_epoch = plan.last_steps, plan.last_epochs
    if state:
        by_step, by_epoch = plan.last_steps_state, plan.last_epochs_state
    found = sum(step < steps for step in plan.steps) + sum(epoch < epochs for epoch in plan.epochs)
    if plan.every_steps:
        made = (steps - 1) // plan.every_steps
        found += made if by_step is None else min(made, 1 + -(-(by_step + 1) // plan.every_steps))
    if plan.every_epochs:
        made = (epochs - 1) // plan.every_epochs
        found += made if by_epoch is None else min(made, 1 + by_epoch)
    return found


def make_plan(save: SaveOptions, epochs: int) -> Plan:
    every = save.save_every_n_epochs
    if save.save_n_epoch_ratio:  # goes first, as it does in the field
        every = max(1, epochs // save.save_n_epoch_ratio)
    last_epochs, last_steps = save.save_last_n_epochs, save.save_last_n_steps
    return Plan(
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


def retention(plan: Plan, *, states: bool) -> list[str]:
    """What is kept and for how long, one line each, said before training starts."""
    lines = []
    rows = (
        ("step", plan.every_steps, plan.last_steps, plan.last_steps_state),
        ("epoch", plan.every_epochs, plan.last_epochs, plan.last_epochs_state),
    )
    for what, every, last, last_state in rows:
        if every:
            kept = f"the last {last} {what}s are kept" if last is not None else "all are kept"
            kept += f"; states: {'all' if last_state is None else f'the last {last_state}'}" if states else ""
            lines.append(f"saving every {every} {what}s; {kept}")
    for what, listed in (("step", plan.steps), ("epoch", plan.epochs)):
        if listed:
            lines.append(f"saving after {what} {', '.join(map(str, listed))}; these are kept")
    return lines
