"""What a run wrote and a later one, or `sfumato report`, reads: description, metrics, states."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path

import torch

from fuzz.target import Setup, target
from sfumato.formats.state import find_newest_state, load_state, save_state
from sfumato.track.report import rebuild_report
from sfumato.track.report_facts import EMPTY_DESCRIPTION
from sfumato.track.trackers import JsonLines

JSON_TOKENS = (
    b"null", b"[]", b"{}", b"-1", b"1e999", b"NaN", b'"a"', b'"\\ud800"', b'"step": ', b"true", b"1e300",
    b"[[1,2],[3]]", b"9" * 30, b"<script>",
)  # fmt: skip
DESCRIPTION = {
    **EMPTY_DESCRIPTION,
    "name": "run",
    "model": "toy",
    "trained_parts": [["unet", 3, 1000, 1e-4]],
    "total": 10,
    "steps_per_epoch": 5,
    "seed": 3,
    "clip": 1.0,
    "options": [["seed", "3", "command line"]],
    "data": [
        {
            "resolution": "64×64",
            "batch_size": 1,
            "subsets": [{"folder": "a", "images": 3, "repeats": 1, "samples": 3, "is_reg": False}],
            "buckets": [[64, 64, 3], [64, 96, 1]],
        }
    ],
    "notes": ["a note"],
    "versions": {"torch": "2"},
    "sessions": [
        {"start": 0, "step": 10, "started": 1e9, "updated": 1e9, "seconds_per_step": 0.5, "state": "finished"}
    ],
    "warnings": [{"step": 1, "text": "a warning", "times": 2}],
}
METRICS = [
    {
        "step": step,
        "loss/current": 1 / step,
        "loss/average": 0.5,
        "lr/unet": 1e-4,
        "timesteps": [5.0],
        "loss/samples": [0.1],
    }
    for step in range(1, 11)
]


def write_run(folder: Path) -> None:
    (folder / "run.report.json").write_text(json.dumps(DESCRIPTION), encoding="utf-8")
    (folder / "run.run.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS), encoding="utf-8")


@target(*JSON_TOKENS)
def run_description(folder: Path) -> Setup:
    write_run(folder)
    path = folder / "run.report.json"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return rebuild_report(folder, "run")

    return Setup(seeds=[path.read_bytes()], read=read)


@target(*JSON_TOKENS, b"\n{")
def run_metrics(folder: Path) -> Setup:
    """The report of a run, and a resumed run, which keeps the lines up to its first step."""
    write_run(folder)
    path = folder / "run.run.jsonl"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        page = rebuild_report(folder, "run")
        JsonLines(path, start=5).close()
        return page

    return Setup(seeds=[path.read_bytes()], read=read)


def make_state(folder: Path, file: str) -> Setup:
    """One file of a state damaged; the other state in the folder is whole."""
    logging.getLogger("sfumato").setLevel(logging.ERROR)
    content = {"counters": {"step": 3}, "weights": {"a": torch.ones(3), 1: [None, True, (1.5, "x")]}}
    damaged = folder / "run-step00000003-state"
    save_state(damaged, content, {"options": {"seed": "3"}})
    seed = (damaged / file).read_bytes()
    time.sleep(0.01)
    good = folder / "older" / "run-step00000001-state"
    save_state(good, content, {"options": {}})
    shutil.copytree(good, folder / good.name)

    def read(data: bytes) -> object:
        (damaged / file).write_bytes(data)
        state = find_newest_state(folder)
        assert state.parent == folder
        return load_state(state), load_state(damaged)

    return Setup(seeds=[seed], read=read)


@target(*JSON_TOKENS, share=0.5)
def state_tree(folder: Path) -> Setup:
    return make_state(folder, "state.json")


@target(b'"dtype":"F32"', share=0.3)
def state_tensors(folder: Path) -> Setup:
    return make_state(folder, "state.safetensors")
