"""Models of transformers that take images, opened from a folder or from the hub."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from sfumato.common.library_call import read_first_line
from sfumato.config.paths import looks_like_path, suggest_path
from sfumato.errors import UserError


def open_image_model(
    name: str,
    model_class: Any,
    processor_class: Any,
    *,
    option: str,
    purpose: str,
    examples: str,
    dtype: torch.dtype | None = None,
) -> tuple[Any, Any]:
    """A model of transformers in main memory, and its processor.

    name: a folder, or OWNER/NAME on the hub. option: that gave it. purpose: what the model has to do, e.g. "describes
    images", and examples of such. dtype: None is that of its files. Of a pickled file only tensors are read, and no
    code that comes with a model is run. UserError where there is none.
    """
    path = Path(name)
    if looks_like_path(name) and not path.is_dir():
        raise UserError(
            f"--{option}: {name} is no folder",
            code="image-model-missing",
            fix=suggest_path(path) or f"give a folder of transformers with {examples}, or OWNER/NAME on the hub",
        )
    try:
        processor = processor_class.from_pretrained(name, trust_remote_code=False)
        model = model_class.from_pretrained(name, dtype=dtype, weights_only=True, trust_remote_code=False)
    # Not found, no such model, a package is missing, a pickle of more than tensors.
    except (OSError, ValueError, KeyError, ImportError, UnpicklingError) as error:
        raise UserError(
            f"--{option}: transformers cannot open {name} as a model that {purpose} ({read_first_line(error)})",
            code="image-model-unavailable",
            fix=f"give a folder or a name on the hub with {examples}, which needs no code of its own",
        ) from error
    return model.eval(), processor
