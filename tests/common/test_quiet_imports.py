"""A run writes nothing but its own lines, and imports no optional package that it does not use."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from families.toys import ToyShelf
from sfumato.common.quiet_imports import BITSANDBYTES_LOGGER, silence_bitsandbytes, without_bitsandbytes
from toy_runs import make_arguments, make_images

PROGRAM = """
import sys
from sfumato.cli.main import main
status = main(sys.argv[1:])
sys.exit("bitsandbytes was imported" if {unused} and "bitsandbytes" in sys.modules else status)
"""


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit"])
def test_training_writes_nothing_of_libraries(toy_shelf: ToyShelf, tmp_path: Path, optimizer: str) -> None:
    pytest.importorskip("bitsandbytes")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n")
    words = make_arguments(
        toy_shelf.paths("sd"), make_images(tmp_path / "images"), tmp_path / "out", max_train_steps=1,
        optimizer_type=optimizer, sample_prompts=prompts, sample_every_n_steps=1, network_train_unet_only=True,
        console_log_level="ERROR",
    )  # fmt: skip
    program = PROGRAM.format(unused=optimizer == "AdamW")
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", program, "train", *words],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out" / "lora.safetensors").is_file()


def test_it_is_only_hidden_within(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    before = importlib.util.find_spec("bitsandbytes")
    with without_bitsandbytes():
        assert importlib.util.find_spec("bitsandbytes") is None
    assert (importlib.util.find_spec("bitsandbytes") is None) == (before is None)


def test_only_the_line_about_kernels_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    silence_bitsandbytes()
    logger = logging.getLogger(BITSANDBYTES_LOGGER)
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "reason")
    logger.warning("something else")
    assert caplog.messages == ["something else"]
