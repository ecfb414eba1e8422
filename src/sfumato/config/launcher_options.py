"""Options that accelerate's launcher gives in the environment: how processes share a model by FSDP or DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfumato.common.text_files import read_text_file
from sfumato.config.dataset_toml import parse_json
from sfumato.config.option_source import OptionSource
from sfumato.errors import Problems

NOT_GIVEN = ("", "none", "null", "auto")
DEEPSPEED, FSDP = "ACCELERATE_DEEPSPEED_", "FSDP_"
SWITCHES = {"ACCELERATE_USE_FSDP": ("fsdp", FSDP), "ACCELERATE_USE_DEEPSPEED": ("deepspeed", DEEPSPEED)}
VARIABLES = {  # variable -> the option that it gives
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offload_optimizer_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": "offload_optimizer_nvme_path",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_param_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "offload_param_nvme_path",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "zero3_save_16bit_model",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "gradient_checkpointing",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "cpu_offload_checkpointing",
}
DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
FILE_KEYS = {  # of DeepSpeed's own configuration -> option
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer.device": "offload_optimizer_device",
    "zero_optimization.offload_optimizer.nvme_path": "offload_optimizer_nvme_path",
    "zero_optimization.offload_param.device": "offload_param_device",
    "zero_optimization.offload_param.nvme_path": "offload_param_nvme_path",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "zero3_save_16bit_model",
    "fp16.fp16_master_weights_and_grads": "fp16_master_weights_and_gradients",
}
# What shards more or less than each block whole, and the strategies that do as --fsdp does.
WHOLE_SHARDING = ("full_shard", "1", "true")
PARTIAL_SHARDING = {"FSDP_SHARDING_STRATEGY", "FSDP_RESHARD_AFTER_FORWARD"}


def read_launcher_options(problems: Problems) -> OptionSource:
    """What the environment says, as texts; an option given elsewhere may only say the same."""
    source = OptionSource(source="environment", typed=False)
    for switch, (option, prefix) in SWITCHES.items():
        if is_on(os.environ.get(switch, "")):
            add_option(source, option, "true", switch)
            read_variables(source, prefix, problems)
    if source.values.get("deepspeed") and os.environ.get(DEEPSPEED_FILE, "none").lower() not in NOT_GIVEN:
        read_deepspeed_file(source, Path(os.environ[DEEPSPEED_FILE]), problems)
    return source


def is_on(value: str) -> bool:
    return value.lower() in ("true", "1", "yes", "y", "on")


def read_variables(source: OptionSource, prefix: str, problems: Problems) -> None:
    """The variables of one engine. Those that change nothing here are named in one line."""
    idle: list[str] = []
    for name, value in sorted(os.environ.items()):
        if not name.startswith(prefix) or value.lower() in NOT_GIVEN or name == DEEPSPEED_FILE:
            continue
        if name in PARTIAL_SHARDING:
            check_sharding(name, value, problems)
        elif name in VARIABLES:
            add_option(source, VARIABLES[name], value, name)
        else:
            idle.append(name)
    if idle:
        source.notes.append(f"no effect, in the environment: {', '.join(idle)}")


def check_sharding(name: str, value: str, problems: Problems) -> None:
    """Add a problem for a strategy that is not that of --fsdp, where each block is whole only while it computes."""
    if value.lower() not in WHOLE_SHARDING:
        problems.add(
            f"{name}={value} in the environment: --fsdp shards weights, gradients and the optimizer's state fully",
            code="environment-shards-partly",
            fix="let accelerate's configuration say FULL_SHARD, or fsdp_version 2 and fsdp_reshard_after_forward true",
        )


def add_option(source: OptionSource, option: str, value: str, place: str) -> None:
    source.values[option] = value
    source.places[option] = f"{place} in the environment"


def read_deepspeed_file(source: OptionSource, path: Path, problems: Problems) -> None:
    """DeepSpeed's own configuration: the keys that are options here count, and the others are named in one line."""
    found: dict[str, Any] = {}
    try:
        with problems.catch():
            found = parse_json(path, read_text_file(path))
    except OSError as error:
        problems.add(f"{DEEPSPEED_FILE}: {path} cannot be read ({error.strerror})", code="deepspeed-file-unreadable")
    idle: list[str] = []
    for key, value in list_leaves(found):
        if str(value).lower() in NOT_GIVEN:
            continue
        if key in FILE_KEYS:
            add_option(source, FILE_KEYS[key], str(value), f"{key} of {path}")
        elif key.removesuffix(".enabled") not in ("bf16", "fp16"):  # --mixed_precision says that
            idle.append(key)
    if idle:
        source.notes.append(f"{path.name}: no effect: {', '.join(idle)}")


def list_leaves(found: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path with dots, value) of everything that is no table."""
    if isinstance(found, Mapping):
        for name, value in found.items():
            yield from list_leaves(value, f"{prefix}.{name}".removeprefix("."))
    else:
        yield prefix, found


def check_contradictions(
    environment: Mapping[str, Any], source: OptionSource, given: Mapping[str, Any], problems: Problems
) -> None:
    """Add a problem for each option that is given with another value than the environment has."""
    for name in sorted(name for name, value in environment.items() if name in given and given[name] != value):
        problems.add(
            f"{source.place(name)} says {name} = {environment[name]}, and --{name} is {given[name]}",
            code="environment-contradicts",
            fix="let both say the same, or start without accelerate's configuration, by torchrun",
        )
