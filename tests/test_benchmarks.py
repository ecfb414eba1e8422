"""The benchmark beside another program: what it takes for a step is what the program burns in one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gpu.device_runs import load_benchmark

BURNER = """
import sys, time
steps = int(sys.argv[sys.argv.index("--max_train_steps") + 1])
until = {start} + {step} * steps
while time.process_time() < until:
    pass
"""


@pytest.mark.full
def test_a_step_and_the_start_by_the_difference_of_two_runs(tmp_path: Path) -> None:
    benchmark = load_benchmark("training")
    script = tmp_path / "train_network.py"
    script.write_text(BURNER.format(start=0.4, step=0.1))
    speed = benchmark.time_steps([sys.executable, str(script)], 6)
    assert speed.step_s == pytest.approx(0.1, rel=0.2)
    assert speed.start_s == pytest.approx(0.4, abs=0.1)
    assert speed.peak_gb > 0.001  # a child begins with what the process that started it had
    script.write_text("raise SystemExit('no such model')")
    with pytest.raises(benchmark.subprocess.CalledProcessError):
        benchmark.time_steps([sys.executable, str(script)], 1)


def test_ratios_are_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load_benchmark("training")
    speeds = [
        benchmark.Speed(step_s=s, start_s=1.0, peak_gb=g) for s, g in ((1, 2), (2, 2), (3, 1), (4, 2), (2, 1), (2, 1))
    ]
    monkeypatch.setattr(benchmark, "time_steps", lambda *_: speeds.pop(0))
    result = benchmark.compare(["python", "theirs.py"], ["--seed", "1"], 4, repeat=3)
    assert result["ratios"]["step_s"] == {"median": 0.75, "smallest": 0.5, "largest": 1.0}
    assert result["ratios"]["peak_gb"] == {"median": 1.0, "smallest": 0.5, "largest": 1.0}
    assert "0.75 (0.50 to 1.00)" in benchmark.format_comparison({"help_s": 1.0, "fp32": result})
