"""Settings of accelerate's launcher that reach a run through the environment; those without effect are named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from sfumato.config.schema import Config

OFF = ("", "no", "none", "false", "0")
REASONS = {  # variable -> why it has no effect
    "ACCELERATE_DYNAMO_BACKEND": "--compile and --compile_backend say what is compiled",
    "DYNAMO_BACKEND": "--compile and --compile_backend say what is compiled",
    "ACCELERATE_USE_MEGATRON_LM": "--fsdp and --deepspeed share a model among processes",
}
OPTIONS = {  # variable -> the option that counts instead
    "ACCELERATE_MIXED_PRECISION": "mixed_precision",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "max_grad_norm",
}


class Launch(NamedTuple):
    """This process's place among those that accelerate's launcher or torchrun started."""

    rank: int
    processes: int


def read_launch() -> Launch:
    """From the environment, without joining the others."""
    return Launch(rank=int(os.environ.get("RANK", "0")), processes=int(os.environ.get("WORLD_SIZE", "1")))


def describe_environment(config: Config) -> Iterator[str]:
    """A line for each variable that accelerate's launcher has set and that this run does not heed."""
    for name, reason in REASONS.items():
        value = os.environ.get(name, "")
        if value.lower() not in OFF:
            yield f"{name}={value} in the environment has no effect: {reason}"
    for name, option in OPTIONS.items():
        value, own = os.environ.get(name, ""), config.value(option)
        if value and value.lower() != str(own):
            yield f"{name}={value} in the environment has no effect: --{option} counts, which is {own}"
