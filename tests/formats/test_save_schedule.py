"""Which saves a run makes and which of them stay, against lists worked out by hand from the rules of sd-scripts."""

from __future__ import annotations

from typing import Any

import pytest

from sfumato.config import SaveOptions
from sfumato.formats.save_schedule import count_saves_on_disk, describe_retention, make_save_schedule

# options; steps, epochs -> saves in the order in which they are made, and those that are left before the final one
CASES: list[tuple[dict[str, Any], int, int, list[str], list[str]]] = [
    ({}, 10, 5, [], []),
    ({"save_every_n_steps": 4}, 10, 5, ["step4", "step8"], ["step4", "step8"]),
    ({"save_every_n_steps": 5}, 10, 5, ["step5"], ["step5"]),  # the last step is the final save's
    ({"save_every_n_epochs": 2}, 10, 5, ["2", "4"], ["2", "4"]),
    ({"save_every_n_epochs": 1}, 10, 5, ["1", "2", "3", "4"], ["1", "2", "3", "4"]),
    ({"save_every_n_epochs": 1, "save_last_n_epochs": 2}, 10, 5, ["1", "2", "3", "4"], ["3", "4"]),
    ({"save_every_n_epochs": 2, "save_last_n_epochs": 1}, 20, 10, ["2", "4", "6", "8"], ["8"]),
    ({"save_at_steps": (7, 2, 7)}, 10, 5, ["step2", "step7"], ["step2", "step7"]),
    ({"save_at_steps": (10, 99), "save_at_epochs": (5, 9)}, 10, 5, [], []),  # the last is the final save's
    ({"save_at_epochs": (3,), "save_every_n_epochs": 1, "save_last_n_epochs": 1}, 10, 5, ["1", "2", "3", "4"],
     ["3", "4"]),
    ({"save_at_steps": (3, 4), "save_every_n_steps": 2, "save_last_n_steps": 1}, 10, 5,
     ["step2", "step3", "step4", "step6", "step8"], ["step3", "step4", "step8"]),
    ({"save_n_epoch_ratio": 2}, 10, 5, ["2", "4"], ["2", "4"]),  # floor(5 / 2)
    ({"save_n_epoch_ratio": 9}, 6, 3, ["1", "2"], ["1", "2"]),  # at least every one
    ({"save_n_epoch_ratio": 2, "save_every_n_epochs": 1}, 8, 4, ["2"], ["2"]),  # the ratio takes precedence
    # A span of steps, not a number of files: after step 8 the one of 8 - 3 - 1 = 4 goes; after 6 that of 2.
    ({"save_every_n_steps": 2, "save_last_n_steps": 3}, 10, 5, ["step2", "step4", "step6", "step8"],
     ["step6", "step8"]),
    ({"save_every_n_steps": 2, "save_last_n_steps": 4}, 10, 5, ["step2", "step4", "step6", "step8"],
     ["step4", "step6", "step8"]),
]  # fmt: skip


def expand(short: str) -> str:
    return f"x-step{int(short[4:]):08d}" if short.startswith("step") else f"x-{int(short):06d}"


@pytest.mark.parametrize(("options", "steps", "epochs", "made", "kept"), CASES)
@pytest.mark.parametrize("state", [False, True])
def test_saves_made_and_kept(
    options: dict[str, Any], steps: int, epochs: int, made: list[str], kept: list[str], state: bool
) -> None:
    schedule = make_save_schedule(SaveOptions(output_name="x", **options), epochs)
    names_saved: list[str] = []
    on_disk: list[str] = []
    most = 0
    for step in range(1, steps):
        names = [(schedule.name_at_step(step), schedule.list_expired_at_step(step, state=state))]
        if step % (steps // epochs) == 0:
            epoch = step // (steps // epochs)
            names.append((schedule.name_at_epoch(epoch, epochs), schedule.list_expired_at_epoch(epoch, state=state)))
        for name, expired in names:
            if name:
                names_saved.append(name)
                on_disk.append(name)
                most = max(most, len(on_disk))
                removed = set(expired)
                on_disk = [old for old in on_disk if old not in removed]
    assert names_saved == [expand(name) for name in made]
    assert on_disk == [expand(name) for name in kept]
    assert most <= count_saves_on_disk(schedule, steps=steps, epochs=epochs, state=state)


def test_states_have_spans_of_their_own() -> None:
    options = SaveOptions(save_every_n_epochs=1, save_last_n_epochs=3, save_last_n_epochs_state=1, output_name="x")
    schedule = make_save_schedule(options, 9)
    assert list(schedule.list_expired_at_epoch(5, state=False)) == ["x-000001", "x-000002"]
    assert list(schedule.list_expired_at_epoch(5, state=True)) == ["x-000001", "x-000002", "x-000003", "x-000004"]
    assert describe_retention(schedule, states=True) == [
        "saving every epoch; the last 3 epochs are kept; states: the last 1"
    ]


def test_retention_is_described() -> None:
    listed = make_save_schedule(SaveOptions(save_at_steps=(30, 7), save_at_epochs=(2,)), 4)
    assert describe_retention(listed, states=False) == [
        "saving after step 7, 30; these are kept",
        "saving after epoch 2; these are kept",
    ]
    schedule = make_save_schedule(SaveOptions(save_every_n_steps=10, save_last_n_steps=30, save_n_epoch_ratio=2), 4)
    assert describe_retention(schedule, states=False) == [
        "saving every 10 steps; the last 30 steps are kept",
        "saving every 2 epochs; all are kept",
    ]
    assert describe_retention(schedule, states=True) == [
        "saving every 10 steps; the last 30 steps are kept; states: the last 30",
        "saving every 2 epochs; all are kept; states: all",
    ]
