"""A state comes back bit for bit, and at any moment of a kill a complete one can be found."""

import json
import logging
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.common import files
from sfumato.errors import InternalError, UserError
from sfumato.formats.checkpoint_writer import DiskFull
from sfumato.formats.state import find_fault, find_newest_state, load_state, save_state


def equal(a, b):
    """Equal in kind, value, order, sign of zero and every bit of a tensor."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    if isinstance(a, dict):
        return equal(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float):
        return repr(a) == repr(b)
    return a == b


@pytest.fixture
def messages():
    """What the module logs, wherever else the program's messages go."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("sfumato.formats.state")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


# ---------------------------------------------------------------- the round trip


def test_a_tree_of_everything_comes_back(tmp_path):
    state = {
        "numbers": [0, -1, 2**80, 0.1, 1e-308, 5e-324, -0.0, math.pi, math.inf, -math.inf, math.nan],
        "words": ["", "größer", "\x00\n\ud800", "tensor", None, True, False],
        "nested": ({"a": (1, [2, (3,)])}, (), [], {}),
        0: {"int key": 1},
        "0": {"text key": 2},
        True: "yes",
        "tensors": {
            "scalar": torch.tensor(1.5),
            "bf16": torch.randn(3, 4).bfloat16(),
            "empty": torch.zeros(0, 7),
            "turned": torch.randn(3, 4).T.contiguous(),
            "f8": torch.randn(5).to(torch.float8_e5m2),
            "odd": torch.tensor([math.nan, math.inf, -0.0, 1e-45]),
            "bool": torch.tensor([True, False]),
            "bytes": torch.arange(256, dtype=torch.uint8),
            "a/b": torch.ones(1),
            "a": {"b": torch.zeros(1)},
            1: torch.ones(2),
            "1": torch.zeros(2),
        },
    }
    save_state(tmp_path / "x-state", state, {"step": 3, "when": [1, 2]})
    loaded, info = load_state(tmp_path / "x-state")
    assert equal(loaded, state)
    assert info == {"step": 3, "when": [1, 2]}


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.integers() | st.text(), inner)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), trees, max_size=4))
def test_any_tree_comes_back(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("any") / "x-state"
    save_state(folder, tree, {})
    assert equal(load_state(folder)[0], tree)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.LBFGS])
def test_optimizers_go_on_as_if_nothing_had_happened(tmp_path, kind):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        return model, kind(model.parameters(), lr=0.1)

    def step(model, optimizer, number):
        def closure():
            optimizer.zero_grad()
            loss = model(torch.full((2, 3), float(number))).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    def steps(model, optimizer, numbers):
        for number in numbers:
            step(model, optimizer, number)

    straight = make()
    steps(*straight, range(6))
    first = make()
    steps(*first, range(3))
    save_state(tmp_path / "s", {"model": first[0].state_dict(), "optimizer": first[1].state_dict()}, {})
    second = make()
    state, _ = load_state(tmp_path / "s")
    second[0].load_state_dict(state["model"])
    second[1].load_state_dict(state["optimizer"])
    steps(*second, range(3, 6))
    assert all(map(torch.equal, straight[0].state_dict().values(), second[0].state_dict().values()))
    assert equal(dict(straight[1].state_dict()), dict(second[1].state_dict()))


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        ({1, 2}, "/a is a set"),
        (torch.float32, "/a is a dtype"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        ({1.5: 1}, r"key 1.5 of /a"),
        ([1, print], "/a/1 is a builtin_function"),
        (torch.zeros(1, dtype=torch.complex128), "/a.*complex128"),
    ],
)
def test_what_cannot_be_saved_is_named_and_no_file_remains(tmp_path, value, detail):
    with pytest.raises(InternalError, match=detail):
        save_state(tmp_path / "x-state", {"a": value}, {})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- complete or not at all


def make(folder, number, monkeypatch=None, at=None):
    if at is not None:
        monkeypatch.setattr(time, "time", lambda: at)
    save_state(folder, {"n": number, "w": torch.full((100,), number)}, {"step": number})
    if at is not None:
        monkeypatch.undo()


def number_in(folder):
    state, info = load_state(folder)
    assert state["w"].tolist() == [state["n"]] * 100
    assert info["step"] == state["n"]
    return state["n"]


def test_a_state_replaces_the_one_before(tmp_path):
    make(tmp_path / "x-state", 1)
    make(tmp_path / "x-state", 2)
    assert number_in(tmp_path / "x-state") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-state"]
    assert sorted(path.name for path in (tmp_path / "x-state").iterdir()) == ["state.json", "state.safetensors"]


def test_every_damage_is_detected(tmp_path):
    make(tmp_path / "x-state", 1)
    for name in ("state.json", "state.safetensors"):
        path = tmp_path / "x-state" / name
        content = path.read_bytes()
        for i in range(0, len(content), 7):
            path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
            assert find_fault(tmp_path / "x-state"), (name, i)
        path.write_bytes(content[:-1])
        assert find_fault(tmp_path / "x-state") == f"{name} is damaged"
        path.unlink()
        assert find_fault(tmp_path / "x-state") == f"{name} is missing"
        with pytest.raises(UserError, match=f"x-state.*{name}") as error:
            load_state(tmp_path / "x-state")
        assert error.value.code == "state-incomplete"
        path.write_bytes(content)
    assert find_fault(tmp_path / "x-state") is None


def test_a_state_of_another_version_and_of_another_program(tmp_path):
    make(tmp_path / "x-state", 1)
    content = json.loads((tmp_path / "x-state" / "state.json").read_text())
    (tmp_path / "x-state" / "state.json").write_text(json.dumps({**content, "version": 2}))
    assert find_fault(tmp_path / "x-state") == "it has version 2, this program reads 1"
    (tmp_path / "y-state").mkdir()
    (tmp_path / "y-state" / "train_state.json").write_text("{}")
    with pytest.raises(UserError, match=r"y-state.*another program") as error:
        find_newest_state(tmp_path / "y-state")
    assert error.value.code == "state-incomplete"


def test_the_newest_complete_state_is_found_whatever_the_file_times(tmp_path, monkeypatch, messages):
    for number in (3, 1, 2):
        make(tmp_path / f"x-step{number:08d}-state", number, monkeypatch, at=1000 + number)
    os.utime(tmp_path / "x-step00000001-state")  # as after a copy
    assert find_newest_state(tmp_path).name == "x-step00000003-state"
    assert messages == []
    (tmp_path / "x-step00000003-state" / "state.safetensors").write_bytes(b"damaged")
    assert find_newest_state(tmp_path).name == "x-step00000002-state"
    assert [m for m in messages if "x-step00000003-state" in m and "state.safetensors is damaged" in m]
    assert find_newest_state(tmp_path / "x-step00000001-state").name == "x-step00000001-state"


def test_where_nothing_is_complete(tmp_path, messages):
    with pytest.raises(UserError, match="gone") as missing:
        find_newest_state(tmp_path / "gone")
    assert missing.value.code == "state-missing"
    with pytest.raises(UserError) as empty:
        find_newest_state(tmp_path)
    assert empty.value.code == "no-complete-state"
    make(tmp_path / "x-state", 1)
    (tmp_path / "x-state" / "state.safetensors").unlink()
    with pytest.raises(UserError, match=r"x-state.*state\.safetensors") as incomplete:
        find_newest_state(tmp_path / "x-state")
    assert incomplete.value.code == "state-incomplete"
    assert incomplete.value.fix
    with pytest.raises(UserError) as none_complete:
        find_newest_state(tmp_path)
    assert none_complete.value.code == "no-complete-state"
    assert len(messages) == 2
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file") as no_state:
        find_newest_state(tmp_path / "file")
    assert no_state.value.code == "state-incomplete"


@pytest.mark.parametrize("lost", ["new", "old"])
def test_killed_between_the_two_renames(tmp_path, lost):
    """The place itself is empty then; both versions lie beside it."""
    make(tmp_path / "x-state", 1)
    (tmp_path / "x-state").rename(tmp_path / ".x-state.00000000.old")
    make(tmp_path / "x-state", 2)
    assert not (tmp_path / ".x-state.00000000.old").exists()  # a later save cleans up
    make(tmp_path / "y-state", 1)
    (tmp_path / "x-state").rename(tmp_path / ".x-state.00000000.tmp")
    (tmp_path / "y-state").rename(tmp_path / ".x-state.11111111.old")
    if lost == "new":
        (tmp_path / ".x-state.00000000.tmp" / "state.json").unlink()
    else:
        shutil.rmtree(tmp_path / ".x-state.11111111.old")
    for path in (tmp_path, tmp_path / "x-state"):
        assert number_in(find_newest_state(path)) == (1 if lost == "new" else 2)


def test_a_full_disk_leaves_the_earlier_state(tmp_path):
    make(tmp_path / "x-state", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in (1 << 16, 200):  # the tensors do not fit, then not even state.json
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(DiskFull):
                save_state(tmp_path / "x-state", {"w": torch.zeros(1 << 15 if limit > 200 else 0)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert number_in(tmp_path / "x-state") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "x-state"]


# ---------------------------------------------------------------- kill -9

SAVER = """
import os, signal, sys, time, torch
from pathlib import Path
from sfumato.formats.state import save_state

def save_for_ever(folder, number, pipe):
    while True:
        number += 1
        name = "x-state" if number % 2 else f"x-step{number % 6}-state"
        save_state(folder / name, {"n": number, "w": torch.full((100,), number)}, {"step": number})
        os.write(pipe, f"{number}\\n".encode())

for line in sys.stdin:  # what was saved last, seconds until the kill
    number, wait = line.split()
    read, write = os.pipe()
    child = os.fork()  # importing torch once for all
    if child == 0:
        save_for_ever(Path(sys.argv[1]), int(number), write)
    os.close(write)
    with os.fdopen(read) as pipe:
        done = pipe.readline()  # the first save stands
        time.sleep(float(wait))
        os.kill(child, signal.SIGKILL)
        done += pipe.read()
    os.waitpid(child, 0)
    print(max(map(int, done.split())), flush=True)
"""


def kill_while_saving(folder, rng, kills):
    """Let a program save again and again, kill it at a random moment, look, and go on from there."""
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}
    command = [sys.executable, "-c", SAVER, str(folder)]
    number, seen = 0, set()
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as saver:
        assert saver.stdin
        assert saver.stdout
        for _ in range(kills):
            saver.stdin.write(f"{number} {rng.random() * 0.05}\n")
            done = int(saver.stdout.readline())
            seen |= {path.suffix for path in folder.iterdir()}
            number = number_in(find_newest_state(folder))
            assert number in (done, done + 1), "an older state than the last that was announced"
        saver.stdin.close()
    return seen


@pytest.mark.full
def test_a_kill_while_saving(tmp_path):
    kill_while_saving(tmp_path, random.Random(1), kills=5)


@pytest.mark.full
def test_many_kills_while_saving(tmp_path):
    seen = kill_while_saving(tmp_path, random.Random(2), kills=20)
    assert ".tmp" in seen, "no kill fell into a save; the test has lost its point"
