"""The base model of the demo: sfumato-tiny, a small Stable Diffusion of our own that was trained from scratch.

`recipes/tiny` trains it. It knows twenty things, each large and in the middle of an image of 64 x 64 pixels, on ten
background colors: "a cat on a blue background".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sfumato.errors import UserError

ASSETS = Path(__file__).parent / "assets"
CHECKPOINT = ASSETS / "sfumato-tiny.safetensors"  # its tokenizer is in the folder beside it


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model, the options to train it with, and how to sample from it."""

    title: str
    model: dict[str, str | bool]  # options that say what it is; True for switches
    size: int  # pixels of a side
    sampler: str
    steps: int
    scale: float  # classifier-free guidance
    training: dict[str, str] = field(default_factory=dict)  # options that suit it


def tiny_base(checkpoint: Path = CHECKPOINT) -> Base:
    """The shipped model, or another checkpoint of it; raises UserError where the file is missing."""
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} is missing", code="demo-model-missing", fix="install sfumato again")
    return Base(
        title="sfumato-tiny",
        model={
            "pretrained_model_name_or_path": str(checkpoint),
            "v_parameterization": True,
            "zero_terminal_snr": True,
        },
        size=64,
        sampler="ddim",
        steps=20,
        scale=2.0,
        training={
            "train_batch_size": "8",
            "network_dim": "16",
            "network_alpha": "16",
            "learning_rate": "1e-3",
            "optimizer_args": "betas=0.9,0.99",
            "lr_scheduler": "cosine",
            "lr_warmup_steps": "10",
            "max_train_steps": "350",
        },
    )
