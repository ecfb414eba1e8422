"""`sfumato compare` on sfumato-tiny: of a run it takes what has learned, not what has barely begun or forgotten all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sfumato.config import load_config
from sfumato.demo import demo
from sfumato.demo.base import tiny_base
from sfumato.demo.demo import OTHER_SUBJECTS, SUBJECT, SUBJECTS
from sfumato.demo.judge import ClassifierEncoder
from sfumato.tools.compare.compare import compare_run
from sfumato.tools.compare.setup import Wanted, plan_comparison
from sfumato.train import train

pytestmark = pytest.mark.full
UNDER, GOOD, OVER = f"{SUBJECT}-step00000010", SUBJECT, f"{SUBJECT}-step00000400"
QUICK = {"train_batch_size": "4", "console_log_level": "WARNING", "validation_split": "0.2", "sample_batch_size": "8"}


def learn(output: Path, seed: int, *, forget: bool = False, **options: str) -> list[str]:
    """Train as the demo does, but shorter; to forget, without images of what the model knows. Gives the options."""
    line = demo.make_command_line(tiny_base(), output, {"seed": str(seed), **QUICK, **options})
    line = [option for option in line if not (forget and option.startswith("--reg_data_dir"))]
    train(load_config(line))
    return line


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_good_checkpoint_is_taken(tmp_path: Path, seed: int) -> None:
    output, spoiled = tmp_path / "run", tmp_path / "spoiled"
    line = learn(output, seed, max_train_steps="150", save_at_steps="10")
    learn(spoiled, seed, forget=True, max_train_steps="120", learning_rate="5e-3", lr_scheduler="constant_with_warmup")
    shutil.copy(spoiled / f"{SUBJECT}.safetensors", output / f"{OVER}.safetensors")
    (tmp_path / "prompts.txt").write_text("\n".join(SUBJECTS))
    (tmp_path / "neutral.txt").write_text("\n".join([*OTHER_SUBJECTS, "a tree on a white background"]))
    wanted = Wanted(
        prompts=tmp_path / "prompts.txt", neutral_prompts=tmp_path / "neutral.txt", steps=10, scale=tiny_base().scale
    )
    comparison = compare_run(plan_comparison(load_config(line), output, SUBJECT, wanted), ClassifierEncoder())
    under, good, over = comparison.checkpoints
    assert [each.checkpoint.path.stem for each in comparison.checkpoints] == [UNDER, GOOD, OVER]
    assert comparison.chosen is good
    assert good.judged.value > max(under.judged.value, over.judged.value) + 0.1, "it is no matter of chance"
    learned = [float(each.judged.gains.mean()) for each in comparison.checkpoints]
    assert learned[0] < 0.3 < min(learned[1:])
    assert good.judged.drift < 0.3 < over.judged.drift
