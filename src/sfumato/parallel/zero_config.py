"""DeepSpeed's configuration from the options of a run."""

from __future__ import annotations

from typing import Any

import torch

from sfumato.config import ProcessOptions

PRECISION_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
BUCKET = 50_000_000  # numbers that are summed or fetched at once: 0.1 GB in half precision
NEVER = 1 << 60


def make_engine_config(
    options: ProcessOptions, *, computed: torch.dtype | None, accumulation: int, max_grad_norm: float
) -> dict[str, Any]:
    """computed: half precision of the engine's weights, or None. max_grad_norm: 0 for no clipping."""
    zero: dict[str, Any] = {
        "stage": options.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_live_parameters": 10 * BUCKET,
        "stage3_max_reuse_distance": 10 * BUCKET,
    }
    for name, device, path in (
        ("offload_optimizer", options.offload_optimizer_device, options.offload_optimizer_nvme_path),
        ("offload_param", options.offload_param_device, options.offload_param_nvme_path),
    ):
        if device is not None:
            zero[name] = {"device": device, "pin_memory": True} | ({"nvme_path": str(path)} if path else {})
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # it divides by nothing: losses are divided already
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
    }
    if computed is not None:
        config[PRECISION_NAMES[computed]] = {"enabled": True}
    if computed == torch.float16 and options.fp16_master_weights_and_gradients:
        config["fp16"]["fp16_master_weights_and_grads"] = True
    return config
