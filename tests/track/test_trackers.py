"""Curves: every step once, under the field's names, also after a resume, and nothing private."""

import json
import logging
import math
import re
import resource
import sys
import types
from pathlib import Path

import pytest
import torch

from sfumato.config import LogOptions
from sfumato.errors import UserError
from sfumato.track.journal import Journal
from sfumato.track.progress import Progress
from sfumato.track.trackers import (
    DISCREET,
    JsonLines,
    TensorBoard,
    Wandb,
    check_trackers,
    log_folder,
    make_trackers,
)


def rows(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def quiet(total=10, start=0):
    return Progress(total, start, plain=True, visible=False)


@pytest.fixture
def warnings(messages):
    """Call it for the warnings so far."""
    return lambda: [record.getMessage() for record in messages if record.levelno >= logging.WARNING]


# ---------------------------------------------------------------- run.jsonl


def test_one_line_per_step_at_once(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    tracker = JsonLines(path, 0)
    tracker.log(1, {"loss/current": 0.1, "lr/unet": 1e-4})
    assert rows(path) == [{"step": 1, "loss/current": 0.1, "lr/unet": 1e-4}]
    tracker.log(2, {"loss/current": math.nan, "loss/average": math.inf})
    assert rows(path)[1] == {"step": 2, "loss/current": None, "loss/average": None}
    tracker.close()


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_a_resumed_run_drops_the_steps_that_it_does_again(tmp_path, start):
    path = tmp_path / "run.jsonl"
    first = JsonLines(path, 0)
    for step in range(1, 6):
        first.log(step, {"loss/current": step})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 6, "loss/cur')  # killed while writing
    second = JsonLines(path, start)
    second.log(start + 1, {"loss/current": 100})
    second.close()
    expected = [{"step": step, "loss/current": step} for step in range(1, start + 1)]
    assert rows(path) == [*expected, {"step": start + 1, "loss/current": 100}]


def test_a_full_disk_costs_lines_only(tmp_path, warnings):
    path = tmp_path / "run.jsonl"
    tracker = JsonLines(path, 0)
    tracker.log(1, {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
        for step in range(2, 6):
            tracker.log(step, {"a": step})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.log(6, {"a": 6})
    tracker.close()
    assert len(warnings()) == 1
    again = JsonLines(path, 6)  # the torn line is dropped
    again.close()
    assert rows(path) == [{"step": 1, "a": 1}, {"step": 6, "a": 6}]


# ---------------------------------------------------------------- TensorBoard


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}, found


def test_tensorboard_reads_what_was_written(tmp_path):
    board = TensorBoard(tmp_path / "logs", 0)
    for step in (1, 2):
        board.log(step, {"loss/average": step / 4, "lr/unet": 0.5})
    board.text("options", "    x = 1")
    board.close()
    scalars, found = events(tmp_path / "logs")
    assert scalars == {"loss/average": [(1, 0.25), (2, 0.5)], "lr/unet": [(1, 0.5), (2, 0.5)]}
    assert "options/text_summary" in found.Tags()["tensors"]


def test_a_missing_package_is_one_line_with_the_command(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="TensorBoard is not installed — pip install tensorboard") as caught:
        TensorBoard(tmp_path / "logs", 0)
    assert "\n" not in str(caught.value)


def test_tensorboard_is_imported_only_when_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    trackers = make_trackers(LogOptions(), tmp_path, "last", 0, {})
    assert [type(tracker) for tracker in trackers] == [JsonLines]
    assert (tmp_path / "last.run.jsonl").exists()
    trackers[0].close()


# ---------------------------------------------------------------- which, where, what


def test_a_folder_means_tensorboard_and_tensorboard_needs_a_folder(tmp_path):
    trackers = make_trackers(LogOptions(logging_dir=tmp_path / "logs"), tmp_path, "x", 0, {})
    assert [type(tracker) for tracker in trackers] == [JsonLines, TensorBoard]
    for tracker in trackers:
        tracker.close()
    with pytest.raises(UserError, match="--log_with tensorboard needs a folder — --logging_dir"):
        make_trackers(LogOptions(log_with="tensorboard"), tmp_path, "y", 0, {})
    assert not (tmp_path / "y.run.jsonl").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--logging_dir: cannot write"):
        TensorBoard(tmp_path / "file" / "logs", 0)


def test_the_log_folder_is_the_fields():
    folder = log_folder(LogOptions(log_prefix="my_", log_tracker_name="cats"), Path("logs"))
    assert re.fullmatch(r"logs/my_\d{14}/cats", folder.as_posix())
    assert re.fullmatch(r"logs/\d{14}/network_train", log_folder(LogOptions(), Path("logs")).as_posix())


def test_no_canary_in_any_log(tmp_path):
    canary = "/home/canary-user/private"
    options = LogOptions(logging_dir=tmp_path / "logs", log_config=True)
    facts = {"vae": f"{canary}/v.pt", "network_args": f"preset={canary}/p.toml", "learning_rate": "0.0001"}
    for tracker in make_trackers(options, tmp_path, "x", 0, facts):
        tracker.log(1, {"loss/current": 1.0})
        tracker.close()
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"canary" not in content
    assert b"private" not in content
    assert b"learning_rate = 0.0001" in content


# ---------------------------------------------------------------- the journal


class Kept:
    def __init__(self):
        self.rows = []

    def log(self, step, values):
        self.rows.append((step, dict(values)))

    def close(self):
        self.rows.append("closed")


def test_series_have_the_fields_names_and_average_over_an_epoch():
    kept = Kept()
    with Journal([kept], quiet(), window=2) as journal:
        for step, loss in enumerate([1.0, 2.0, 4.0], 1):
            journal.note(step, torch.tensor(loss), {"unet": 0.5})
            assert len(kept.rows) == step - 1  # one step late, so that nobody waits for the device
    assert kept.rows == [
        (1, {"loss/current": 1.0, "loss/average": 1.0, "lr/unet": 0.5}),
        (2, {"loss/current": 2.0, "loss/average": 1.5, "loss/epoch_average": 1.5, "lr/unet": 0.5}),
        (3, {"loss/current": 4.0, "loss/average": 3.0, "lr/unet": 0.5}),
        "closed",
    ]


def test_what_is_measured_after_a_step_goes_with_its_numbers():
    kept = Kept()
    with Journal([kept], quiet(), window=4) as journal:
        journal.add(0, {"loss/validation/t200": 3.0})
        journal.note(1, torch.tensor(1.0), {})
        journal.add(1, {"loss/validation/t200": 2.0})
        journal.note(2, torch.tensor(3.0), {})
    assert kept.rows == [
        (0, {"loss/validation/t200": 3.0}),
        (1, {"loss/current": 1.0, "loss/average": 1.0, "loss/validation/t200": 2.0}),
        (2, {"loss/current": 3.0, "loss/average": 2.0}),
        "closed",
    ]


def test_the_average_goes_on_after_a_resume():
    losses = [0.1, 0.7, 0.2, 0.9, 0.4, 0.3]
    straight, before, after = Kept(), Kept(), Kept()
    with Journal([straight], quiet(), window=4) as journal:
        for step, loss in enumerate(losses, 1):
            journal.note(step, torch.tensor(loss), {})
    with Journal([before], quiet(), window=4) as journal:
        for step, loss in enumerate(losses[:3], 1):
            journal.note(step, torch.tensor(loss), {})
        journal.flush()
        state = json.loads(json.dumps(journal.state_dict()))
    with Journal([after], quiet(), window=4) as journal:
        journal.load_state_dict(state)
        for step, loss in enumerate(losses[3:], 4):
            journal.note(step, torch.tensor(loss), {})
    assert before.rows[:-1] + after.rows[:-1] == straight.rows[:-1]


def test_a_tracker_that_fails_is_left_out_with_one_warning(warnings):
    class Broken(Kept):
        def log(self, step, values):
            raise OSError(28, "No space left on device")

    kept = Kept()
    with Journal([Broken(), kept], quiet(), window=2) as journal:
        for step in (1, 2, 3):
            journal.note(step, torch.tensor(1.0), {})
    assert [row[0] for row in kept.rows[:-1]] == [1, 2, 3]
    assert len(warnings()) == 1
    assert "Broken cannot be written any more" in warnings()[0]


# ---------------------------------------------------------------- wandb and the trackers' own arguments


class FakeRun:
    def __init__(self, calls):
        self.calls = calls

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the module, which records what it is told."""
    module = types.ModuleType("wandb")
    module.calls = []
    module.Error = type("Error", (Exception,), {})
    module.Settings = lambda **settings: settings
    module.init = lambda **given: module.calls.append(("init", given)) or FakeRun(module.calls)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_curves_and_options_and_nothing_else(tmp_path, wandb):
    options = LogOptions.model_validate(
        {"log_with": "wandb", "wandb_run_name": "one", "wandb_api_key": "canary-key", "log_config": True}
    )
    trackers = make_trackers(options, tmp_path / "out", "x", 0, {"vae": "/home/me/v.pt", "seed": "7"})
    assert [type(tracker) for tracker in trackers] == [JsonLines, Wandb]
    trackers[1].log(3, {"loss/current": 0.5})
    for tracker in trackers:
        tracker.close()
    (_, given), *rest = wandb.calls
    assert given.pop("settings") == {**DISCREET, "api_key": "canary-key"}
    assert given == {
        "project": "network_train", "name": "one", "dir": str(tmp_path / "out"), "config": {"vae": "v.pt", "seed": "7"}
    }  # fmt: skip
    assert rest == [("log", 3, {"loss/current": 0.5}), ("finish",)]


def test_the_tracker_file_goes_before_defaults_and_options_before_the_file(tmp_path, wandb):
    file = tmp_path / "trackers.toml"
    file.write_text(
        '[wandb]\nname = "file"\nentity = "us"\nproject = "p"\nsettings.console = "wrap"\n'
        '[tensorboard]\nfilename_suffix = ".ours"\n'
    )
    options = LogOptions(log_with="all", logging_dir=tmp_path / "logs", log_tracker_config=file, wandb_run_name="line")
    for tracker in make_trackers(options, tmp_path, "x", 0, {}):
        tracker.close()
    given = wandb.calls[0][1]
    assert (given["name"], given["entity"], given["project"]) == ("line", "us", "p")
    assert given["settings"] == {**DISCREET, "console": "wrap"}
    assert given["config"] == {}
    assert Path(given["dir"]).parent == tmp_path / "logs"
    (event,) = (tmp_path / "logs").rglob("events*")
    assert event.name.endswith(".ours")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[wandb", "trackers.toml: Expected"),
        ("x = 1", "x is neither"),
        ("[comet]", "comet is neither"),
        ("[tensorboard]\nbanana = 1", "[tensorboard]"),
        (b"\xff\xfe", "trackers.toml: "),
    ],
)
def test_a_faulty_tracker_file_is_told(tmp_path, content, expected):
    file = tmp_path / "trackers.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    options = LogOptions(logging_dir=tmp_path / "logs", log_tracker_config=file)
    with pytest.raises(UserError, match=re.escape(expected)):
        make_trackers(options, tmp_path, "x", 0, {})


def test_wandb_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_trackers(LogOptions())
    with pytest.raises(UserError, match="wandb is not installed — pip install wandb"):
        check_trackers(LogOptions(log_with="wandb"))


def test_wandb_that_fails_costs_its_curves_only(tmp_path, wandb, warnings):
    def refuse(*words, **more):
        raise wandb.Error("no route to host")

    trackers = list(make_trackers(LogOptions(log_with="wandb"), tmp_path, "x", 0, {}))
    trackers[1].run.log = trackers[1].run.finish = refuse
    with Journal(trackers, quiet(), window=2) as journal:
        for step in (1, 2, 3):
            journal.note(step, torch.tensor(1.0), {})
    assert [row["step"] for row in rows(tmp_path / "x.run.jsonl")] == [1, 2, 3]
    assert len(warnings()) == 1
    assert "no route to host" in warnings()[0]
    wandb.init = refuse
    (only,) = make_trackers(LogOptions(log_with="wandb"), tmp_path, "y", 0, {})
    only.close()
    assert "wandb could not be started" in warnings()[1]


@pytest.mark.slow
def test_the_real_wandb_offline_tells_neither_command_line_nor_paths(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["/canary-home/train.py", "--wandb_api_key", "canary-key"])
    options = LogOptions.model_validate(
        {"log_with": "wandb", "wandb_api_key": "canary-key" * 4, "log_config": True, "wandb_run_name": "tell-this"}
    )
    place = tmp_path / "runs"
    trackers = make_trackers(options, place, "x", 0, {"vae": "/canary-home/v.pt", "learning_rate": "0.125"})
    assert [type(tracker) for tracker in trackers] == [JsonLines, Wandb]
    trackers[1].log(1, {"loss/current": 0.5})
    for tracker in trackers:
        tracker.close()
    content = b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())
    assert b"loss/current" in content
    assert b"tell-this" in content
    assert b"canary" not in content
