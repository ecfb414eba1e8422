"""The choices of --mixed_precision as dtypes."""

from __future__ import annotations

import torch

MIXED_PRECISION = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
