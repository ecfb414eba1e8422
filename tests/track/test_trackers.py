"""Trackers: every step once, also after a resume, and nothing private."""

import json
import math
import re
import resource
import shutil
import sys
import types
from pathlib import Path

import pytest

from sfumato.config import LogOptions
from sfumato.errors import UserError
from sfumato.track.trackers import (
    WANDB_PRIVACY,
    JsonLines,
    TensorBoard,
    Wandb,
    check_trackers,
    choose_log_folder,
    make_trackers,
)


def read_rows(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_one_line_per_step_at_once(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    tracker = JsonLines(path, 0)
    tracker.log(1, {"loss/current": 0.1, "lr/unet": 1e-4})
    assert read_rows(path) == [{"step": 1, "loss/current": 0.1, "lr/unet": 1e-4}]
    tracker.log(2, {"loss/current": math.nan, "loss/average": math.inf})
    assert read_rows(path)[1] == {"step": 2, "loss/current": None, "loss/average": None}
    tracker.close()


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_a_resumed_run_removes_the_steps_that_it_repeats(tmp_path, start):
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
    assert read_rows(path) == [*expected, {"step": start + 1, "loss/current": 100}]


def test_lines_wait_while_the_disk_is_full(tmp_path):
    path = tmp_path / "run.jsonl"
    tracker = JsonLines(path, 0)
    tracker.log(1, {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
        for step in range(2, 6):
            with pytest.raises(OSError, match="too large"):
                tracker.log(step, {"a": step})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.log(6, {"a": 6})
    tracker.close()
    assert read_rows(path) == [{"step": step, "a": step} for step in range(1, 7)]


def test_a_deleted_folder_is_made_again_with_all_lines(tmp_path):
    path = tmp_path / "out" / "run.jsonl"
    tracker = JsonLines(path, 0)
    for step in (1, 2):
        tracker.log(step, {"a": step})
    shutil.rmtree(path.parent)
    for step in (3, 4):
        tracker.log(step, {"a": step})
    tracker.close()
    assert read_rows(path) == [{"step": step, "a": step} for step in range(1, 5)]


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    scalars: dict[str, list[tuple[int, float]]] = {}
    for name in accumulator.Tags()["scalars"]:
        scalars[name] = [(event.step, event.value) for event in accumulator.Scalars(name)]
    return scalars, accumulator


def test_tensorboard_reads_what_was_written(tmp_path):
    board = TensorBoard(tmp_path / "logs", 0)
    for step in (1, 2):
        board.log(step, {"loss/average": step / 4, "lr/unet": 0.5})
    board.text("options", "    x = 1")
    board.close()
    scalars, accumulator = events(tmp_path / "logs")
    assert scalars == {"loss/average": [(1, 0.25), (2, 0.5)], "lr/unet": [(1, 0.5), (2, 0.5)]}
    assert "options/text_summary" in accumulator.Tags()["tensors"]


def test_a_missing_package_is_one_line_with_the_command(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="TensorBoard") as error:
        TensorBoard(tmp_path / "logs", 0)
    assert (error.value.code, error.value.fix) == ("tracker-package-missing", "pip install tensorboard")
    assert "\n" not in str(error.value)


def test_tensorboard_is_imported_only_when_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    trackers = make_trackers(LogOptions(), tmp_path, "last", 0, {})
    assert [type(tracker) for tracker in trackers] == [JsonLines]
    assert (tmp_path / "last.run.jsonl").exists()
    trackers[0].close()


def test_a_folder_means_tensorboard_and_tensorboard_needs_a_folder(tmp_path):
    trackers = make_trackers(LogOptions(logging_dir=tmp_path / "logs"), tmp_path, "x", 0, {})
    assert [type(tracker) for tracker in trackers] == [JsonLines, TensorBoard]
    for tracker in trackers:
        tracker.close()
    with pytest.raises(UserError, match="--log_with tensorboard") as error:
        make_trackers(LogOptions(log_with="tensorboard"), tmp_path, "y", 0, {})
    assert error.value.code == "tracker-folder-missing"
    assert not (tmp_path / "y.run.jsonl").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--logging_dir") as error:
        TensorBoard(tmp_path / "file" / "logs", 0)
    assert error.value.code == "logging-dir-not-writable"


def test_the_log_folder_is_that_of_sd_scripts():
    folder = choose_log_folder(LogOptions(log_prefix="my_", log_tracker_name="cats"), Path("logs"))
    assert re.fullmatch(r"logs/my_\d{14}/cats", folder.as_posix())
    assert re.fullmatch(r"logs/\d{14}/network_train", choose_log_folder(LogOptions(), Path("logs")).as_posix())


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


class FakeRun:
    def __init__(self, calls):
        self.calls = calls

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the module, which records its calls."""
    module = types.ModuleType("wandb")
    module.calls = []
    module.Error = type("Error", (Exception,), {})
    module.Settings = lambda **settings: settings
    module.init = lambda **given: module.calls.append(("init", given)) or FakeRun(module.calls)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_metrics_and_options_and_nothing_else(tmp_path, wandb):
    options = LogOptions.model_validate(
        {"log_with": "wandb", "wandb_run_name": "one", "wandb_api_key": "canary-key", "log_config": True}
    )
    trackers = make_trackers(options, tmp_path / "out", "x", 0, {"vae": "/home/me/v.pt", "seed": "7"})
    assert [type(tracker) for tracker in trackers] == [JsonLines, Wandb]
    trackers[1].log(3, {"loss/current": 0.5})
    for tracker in trackers:
        tracker.close()
    (_, given), *rest = wandb.calls
    assert given.pop("settings") == {**WANDB_PRIVACY, "api_key": "canary-key"}
    assert given == {
        "project": "network_train", "name": "one", "dir": str(tmp_path / "out"), "config": {"vae": "v.pt", "seed": "7"}
    }  # fmt: skip
    assert rest == [("log", 3, {"loss/current": 0.5}), ("finish",)]


def test_the_tracker_file_overrides_defaults_and_options_override_the_file(tmp_path, wandb):
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
    assert given["settings"] == {**WANDB_PRIVACY, "console": "wrap"}
    assert given["config"] == {}
    assert Path(given["dir"]).parent == tmp_path / "logs"
    (event,) = (tmp_path / "logs").rglob("events*")
    assert event.name.endswith(".ours")


@pytest.mark.parametrize(
    ("content", "code", "value"),
    [
        (b"[wandb", "tracker-config-invalid", "trackers.toml"),
        (b"[wandb]\n# \xe9", "text-file-not-utf8", "trackers.toml, line 2"),
        (b"x = 1", "tracker-config-section-unknown", "x is neither"),
        (b"[comet]", "tracker-config-section-unknown", "comet is neither"),
        (b"[tensorboard]\nbanana = 1", "tensorboard-arguments-refused", "banana"),
    ],
)
def test_an_invalid_tracker_file_is_an_error(tmp_path, content, code, value):
    file = tmp_path / "trackers.toml"
    file.write_bytes(content)
    options = LogOptions(logging_dir=tmp_path / "logs", log_tracker_config=file)
    with pytest.raises(UserError, match=value) as error:
        make_trackers(options, tmp_path, "x", 0, {})
    assert error.value.code == code


def test_a_missing_wandb_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_trackers(LogOptions())
    with pytest.raises(UserError) as error:
        check_trackers(LogOptions(log_with="wandb"))
    assert (error.value.code, error.value.fix) == ("tracker-package-missing", "pip install wandb")


@pytest.mark.full
def test_the_real_wandb_offline_stores_neither_command_line_nor_paths(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["/canary-home/train.py", "--wandb_api_key", "canary-key"])
    options = LogOptions.model_validate(
        {"log_with": "wandb", "wandb_api_key": "canary-key" * 4, "log_config": True, "wandb_run_name": "store-this"}
    )
    output = tmp_path / "runs"
    trackers = make_trackers(options, output, "x", 0, {"vae": "/canary-home/v.pt", "learning_rate": "0.125"})
    assert [type(tracker) for tracker in trackers] == [JsonLines, Wandb]
    trackers[1].log(1, {"loss/current": 0.5})
    for tracker in trackers:
        tracker.close()
    content = b"".join(path.read_bytes() for path in output.rglob("*") if path.is_file())
    assert b"loss/current" in content
    assert b"store-this" in content
    assert b"canary" not in content
