"""Writes the model and the classifier as they are shipped: float16, one file each, with the facts that no shape gives.

python recipes/tiny/finish.py WORK CHECKPOINT [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import autoencoder
import start
import torch

from sfumato.families import _vae
from sfumato.formats.checkpoint import open_checkpoint
from sfumato.formats.checkpoint_writer import write_safetensors

SHIPPED = Path(__file__).parents[2] / "src" / "sfumato" / "demo" / "assets"
ABOUT = {
    "format": "pt",
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.title": "sfumato-tiny",
    "modelspec.prediction_type": "v",
    "modelspec.resolution": "64x64",
    "modelspec.license": "Apache-2.0",
    "modelspec.description": "Draws 20 things on 10 colors. Trained from scratch on scenes composed of Fluent Emoji "
    "(MIT, Microsoft); its autoencoder on Noto Emoji (Apache-2.0, Google), too.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--folder", type=Path, default=SHIPPED)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    write_model(asked.work, asked.checkpoint, asked.folder / "sfumato-tiny.safetensors")
    shutil.copyfile(asked.work / "classifier.safetensors", asked.folder / "classifier.safetensors")


def write_model(work: Path, checkpoint: Path, path: Path) -> None:
    """The trained networks, with the decoder that was trained further where there is one."""
    file = open_checkpoint(checkpoint)
    tensors = {name: file.read(name, dtype=torch.float32) for name in file.header.tensors}
    file.close()
    if (work / "decoder-state.pt").is_file():
        tensors |= read_decoder(work)
    write_safetensors(
        path, tensors, {**ABOUT, "sfumato.config": file.header.metadata["sfumato.config"]}, dtype=torch.float16
    )


def read_decoder(work: Path) -> dict[str, torch.Tensor]:
    """The decoder that was trained further, whitened as at the start, under the checkpoint's keys."""
    vae = autoencoder.load_autoencoder(work / "decoder-state.pt")
    start.whiten(vae, work)
    state = _vae.key_map(len(vae.config.block_out_channels)).to_original(vae.state_dict())
    return {
        _vae.VAE_PREFIX + name: tensor for name, tensor in state.items() if name.startswith(("decoder.", "post_quant"))
    }


if __name__ == "__main__":
    main()
