"""Rules between the options of several processes."""

from __future__ import annotations

from sfumato.config.option_rule import OptionRule
from sfumato.config.schema import Config

FSDP2, _, _, ZERO_3 = ENGINES = ("FSDP2", "ZeRO 1", "ZeRO 2", "ZeRO 3")  # what shares out a model, as tables name it
ZERO_OPTIONS = (
    "zero_stage",
    "offload_optimizer_device",
    "offload_optimizer_nvme_path",
    "offload_param_device",
    "offload_param_nvme_path",
    "fp16_master_weights_and_gradients",
)


def name_engine(config: Config) -> str | None:
    """Of ENGINES the one that the options ask for."""
    if config.processes.deepspeed:
        return f"ZeRO {config.processes.zero_stage}"
    return FSDP2 if config.processes.fsdp else None


def name_engine_option(engine: str) -> str:
    """The option that asks for one of ENGINES."""
    return "--fsdp" if engine == FSDP2 else "--deepspeed"


def lacks_nvme_path(config: Config) -> bool:
    processes = config.processes
    return (processes.offload_optimizer_device == "nvme" and processes.offload_optimizer_nvme_path is None) or (
        processes.offload_param_device == "nvme" and processes.offload_param_nvme_path is None
    )


def lacks_what_half_masters_need(config: Config) -> bool:
    """DeepSpeed has them for its own Adam of the CPU alone."""
    processes, optimizer = config.processes, config.optim.optimizer.lower()
    return processes.fp16_master_weights_and_gradients and (
        config.memory.mixed_precision != "fp16"
        or processes.zero_stage == 3
        or processes.offload_optimizer_device != "cpu"
        or not optimizer.endswith("deepspeedcpuadam")
    )


PROCESS_RULES = (
    OptionRule(
        code="fsdp-with-deepspeed",
        severity="conflict",
        options=("fsdp", "deepspeed"),
        is_broken=lambda c: c.processes.fsdp and c.processes.deepspeed,
        what="--fsdp and --deepspeed are two ways of sharing a model",
        fix="give one of them",
    ),
    OptionRule(
        code="fsdp-offload-without-fsdp",
        severity="no effect",
        options=("fsdp_offload_params", "fsdp"),
        is_broken=lambda c: c.processes.fsdp_offload_params and not c.processes.fsdp,
        what="--fsdp_offload_params",
        reason="without --fsdp each process has the whole model",
        fix="add --fsdp",
    ),
    OptionRule(
        code="zero-options-without-deepspeed",
        severity="no effect",
        options=("deepspeed", *ZERO_OPTIONS),
        is_broken=lambda c: not c.processes.deepspeed and c.is_changed(*ZERO_OPTIONS),
        what="--zero_stage, the --offload_... options and --fp16_master_weights_and_gradients",
        reason="without --deepspeed there is no ZeRO",
        fix="add --deepspeed",
    ),
    OptionRule(
        code="zero-stage-shares-nothing",
        severity="conflict",
        options=("deepspeed", "zero_stage"),
        is_broken=lambda c: c.processes.deepspeed and c.processes.zero_stage == 0,
        what="--zero_stage 0 shares out nothing",
        fix="give --zero_stage 1, 2 or 3, or remove --deepspeed",
    ),
    OptionRule(
        code="param-offload-below-stage-3",
        severity="conflict",
        options=("deepspeed", "zero_stage", "offload_param_device"),
        is_broken=lambda c: (
            c.processes.deepspeed and c.processes.offload_param_device is not None and c.processes.zero_stage < 3
        ),
        what="--offload_param_device is for weights that are shared out",
        fix="give --zero_stage 3",
    ),
    OptionRule(
        code="nvme-path-missing",
        severity="conflict",
        options=ZERO_OPTIONS,
        is_broken=lambda c: c.processes.deepspeed and lacks_nvme_path(c),
        what="no folder for what is offloaded to NVMe",
        fix="give --offload_optimizer_nvme_path, or --offload_param_nvme_path",
    ),
    OptionRule(
        code="half-masters-need-cpu-adam",
        severity="conflict",
        options=("deepspeed", *ZERO_OPTIONS, "mixed_precision", "optimizer_type"),
        is_broken=lambda c: c.processes.deepspeed and lacks_what_half_masters_need(c),
        what="--fp16_master_weights_and_gradients needs DeepSpeed's own Adam of the CPU, in float16",
        fix="--mixed_precision fp16 --zero_stage 2 --offload_optimizer_device cpu "
        "--optimizer_type deepspeed.ops.adam.DeepSpeedCPUAdam",
    ),
)
