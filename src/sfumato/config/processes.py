"""Options of training on several devices."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from sfumato.config.base import Options, option
from sfumato.config.values import FilePath, as_whole_choice

Stage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(as_whole_choice)]

NOT_WRAPPED = "gradients are added up after backward, without torch's wrapper"


class ProcessOptions(Options):
    """Several devices"""

    ddp_timeout: int | None = option(None, "minutes that a process waits for the others", ge=1)
    ddp_gradient_as_bucket_view: bool = option(
        False, "gradients share the memory of what is exchanged", no_effect=NOT_WRAPPED
    )
    ddp_static_graph: bool = option(False, "the same parameters are used at every step", no_effect=NOT_WRAPPED)
    deepspeed: bool = option(False, "train with DeepSpeed", planned="DeepSpeed")
    zero_stage: Stage = option(2, "what DeepSpeed spreads over the devices", planned="DeepSpeed")
    offload_optimizer_device: Literal["cpu", "nvme"] | None = option(
        None, "where the optimizer's state is kept", planned="DeepSpeed"
    )
    offload_optimizer_nvme_path: FilePath | None = option(None, "folder for it on the disk", planned="DeepSpeed")
    offload_param_device: Literal["cpu", "nvme"] | None = option(
        None, "where the parameters are kept", planned="DeepSpeed"
    )
    offload_param_nvme_path: FilePath | None = option(None, "folder for them on the disk", planned="DeepSpeed")
    zero3_init_flag: bool = option(False, "spread the model already while it is built", planned="DeepSpeed")
    zero3_save_16bit_model: bool = option(False, "save a spread model in 16 bits", planned="DeepSpeed")
    fp16_master_weights_and_gradients: bool = option(
        False, "keep main weights and gradients in float16", planned="DeepSpeed"
    )
