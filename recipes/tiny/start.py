"""Writes the checkpoint that training starts from: the trained autoencoder, a tokenizer, everything else random.

python recipes/tiny/start.py WORK
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import autoencoder
import numpy as np
import torch
from concepts import WORDS

from sfumato.demo import toy_sd
from sfumato.families import _clip, _tokenizers, _unet
from sfumato.formats.checkpoint_writer import write_safetensors

SEED = 0
WIDTH = 128  # of the text encoder
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 96, 160],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,  # diffusers' name for the number of heads
    "norm_num_groups": 8,
}
TEXT = {
    "hidden_size": WIDTH,
    "projection_dim": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": _clip.CLIP_LENGTH,
    "hidden_act": "quick_gelu",
}
FACTS = {  # that no shape in the file gives
    "unet": {name: UNET[name] for name in ("attention_head_dim", "norm_num_groups")},
    "vae": {"norm_num_groups": autoencoder.CONFIG["norm_num_groups"]},
    "text_encoder": {"num_attention_heads": TEXT["num_attention_heads"]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    vae = autoencoder.load_autoencoder(work / "autoencoder-state.pt")
    whiten(vae, work)
    write(work / "start", vae)


def write(folder: Path, vae: Any) -> Path:
    """The checkpoint in the single-file layout of Stable Diffusion 1.x, its tokenizer in the metadata."""
    vocabulary = _tokenizers.write_toy_clip_tokenizer(folder / "tokenizer", WORDS)
    networks = {"unet": make_unet(), "vae": vae, "text_encoder": make_text_encoder(vocabulary)}
    clip = _clip.key_map().to_original(networks["text_encoder"].state_dict())
    tensors = toy_sd.to_unet_and_vae_keys(networks)
    tensors |= {toy_sd.CLIP_PREFIX + name: tensor for name, tensor in clip.items()}
    tensors |= {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}  # by which other programs know what it predicts
    path = folder / "start.safetensors"
    merges = (folder / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    facts = FACTS | {"tokenizer": {"merges": merges}}
    write_safetensors(path, tensors, {"format": "pt", "sfumato.config": json.dumps(facts)})
    return path


def make_unet() -> Any:
    """Every residual branch starts at zero, and so does the output."""
    torch.manual_seed(SEED)
    unet = _unet.build(UNET)
    for name, layer in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            torch.nn.init.zeros_(layer.weight)
    return unet


def make_text_encoder(vocabulary: int) -> Any:
    torch.manual_seed(SEED)
    return _clip.build(TEXT | {"vocab_size": vocabulary})


@torch.no_grad()
def whiten(vae: Any, work: Path) -> None:
    """Fold into the two 1x1 layers what gives every latent channel mean 0 and, times the scaling factor, variance 1."""
    training, _ = autoencoder.split_drawings(work)
    pixels = autoencoder.make_batch(training, np.random.default_rng(SEED), 256, crop=False)
    before = vae.decode(vae.encode(pixels[:8]).latent_dist.mean).sample
    means = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels.split(64)])
    shift, scale = means.mean((0, 2, 3)), means.std((0, 2, 3)) * autoencoder.CONFIG["scaling_factor"]
    quant, post = vae.quant_conv, vae.post_quant_conv
    count = len(shift)
    post.bias += post.weight[:, :, 0, 0] @ shift
    post.weight *= scale[None, :, None, None]
    quant.weight[:count] /= scale[:, None, None, None]
    quant.bias[:count] = (quant.bias[:count] - shift) / scale
    quant.bias[count:] -= 2 * scale.log()  # the posterior's log variance
    after = vae.decode(vae.encode(pixels[:8]).latent_dist.mean).sample
    assert torch.allclose(before, after, atol=1e-4), "the fold must not change what is decoded"


if __name__ == "__main__":
    main()
