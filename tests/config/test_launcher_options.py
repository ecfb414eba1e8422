"""What accelerate's launcher says in the environment counts like options, under those that are given."""

from __future__ import annotations

import json
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import launch as accelerate_launch

from sfumato.config.launcher_options import check_sharding, read_launcher_options
from sfumato.errors import Problems

DEEPSPEED = {
    "zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu", "zero3_init_flag": True,
    "zero3_save_16bit_model": True,
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def read(environment: pytest.MonkeyPatch, given: dict[str, str]) -> tuple[dict[str, Any], list[str], Problems]:
    """Option -> text, notes, problems."""
    for name, value in given.items():
        environment.setenv(name, value)
    problems = Problems()
    source = read_launcher_options(problems)
    return dict(source.values), source.notes, problems


def ask_accelerate(*words: str) -> dict[str, str]:
    """The variables that accelerate's own launcher would set for these words."""
    given = launch_command_parser().parse_args([*words, "script.py"])
    given.mixed_precision, given.dynamo_backend = "no", "no"
    given.num_processes, given.num_machines, given.use_parallelism_config = 2, 1, False
    if given.use_deepspeed:
        given.deepspeed_fields_from_accelerate_config = ""
        return accelerate_launch.prepare_deepspeed_cmd_env(given)[1]
    return accelerate_launch.prepare_multi_gpu_env(given)


def test_deepspeed_as_accelerate_passes_it_on(environment: pytest.MonkeyPatch) -> None:
    words = [f"--{name}={value}" for name, value in DEEPSPEED.items()]
    values, _, problems = read(environment, ask_accelerate("--use_deepspeed", "--gradient_clipping=1.0", *words))
    assert values == {"deepspeed": "true", **{name: str(value).lower() for name, value in DEEPSPEED.items()}}
    assert not problems.found


def test_fsdp_as_accelerate_passes_it_on(environment: pytest.MonkeyPatch) -> None:
    words = ("--use_fsdp", "--fsdp_version=2", "--fsdp_offload_params=true", "--fsdp_activation_checkpointing=true")
    values, notes, problems = read(environment, ask_accelerate(*words))
    assert values.items() >= {"fsdp": "true", "fsdp_offload_params": "true", "gradient_checkpointing": "true"}.items()
    assert not problems.found
    (note,) = notes
    assert "FSDP_MIN_NUM_PARAMS" in note
    assert "FSDP_OFFLOAD_PARAMS" not in note


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("FSDP_SHARDING_STRATEGY", "FULL_SHARD", False),
        ("FSDP_SHARDING_STRATEGY", "HYBRID_SHARD", True),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", True),
    ],
)
def test_other_ways_of_sharding_are_refused(name: str, value: str, refused: bool) -> None:
    problems = Problems()
    check_sharding(name, value, problems)
    assert [problem.code for problem in problems.found] == ["environment-shards-partly"] * refused


def test_deepspeed_s_own_file(environment: pytest.MonkeyPatch, tmp_path: Any) -> None:
    path = tmp_path / "ds.json"
    offload = {"device": "nvme", "nvme_path": "/disk"}
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": offload}, "wall_clock_breakdown": True})
    )
    given = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    values, notes, problems = read(environment, given)
    expected = {"zero_stage": "2", "offload_optimizer_device": "nvme", "offload_optimizer_nvme_path": "/disk"}
    assert values == {"deepspeed": "true", **expected}
    assert notes == ["ds.json: no effect: wall_clock_breakdown"]
    path.unlink()
    assert [problem.code for problem in read(environment, given)[2].found] == ["deepspeed-file-unreadable"]
    assert not problems.found


def test_an_option_may_only_say_the_same(codes_of: Any, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    environment.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert "environment-contradicts" in codes_of("--zero_stage 2")
    assert "environment-contradicts" not in codes_of("--zero_stage 3")
