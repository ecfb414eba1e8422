"""What FLUX.1 and the models made from it share: files, packed latents, the time grid, T5 and the autoencoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.diffusion.objective import Grid, RectifiedFlow
from sfumato.diffusion.timesteps import resolution_mu
from sfumato.errors import UserError
from sfumato.families import _t5, _tokenizers, _vae
from sfumato.families._file_kinds import LATENT, WIDTH, check_width, told_of
from sfumato.families.base import Network, PartSpec
from sfumato.families.source import Source, Weights, find_path
from sfumato.formats.keymap import KeyMap, identity

PREFIX = "model.diffusion_model."  # in files of some programs
FIXED = {"scaling_factor": 0.3611, "shift_factor": 0.1159}  # of the autoencoder, whose file does not say so
OPTIONS = frozenset(  # of those that only some families read
    {"t5xxl", "ae", "no_half_vae", "model_type", "t5xxl_max_token_length", "apply_t5_attn_mask", "guidance_scale"}
    | {"timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "model_prediction_type"}
    | {"weighting_scheme", "logit_mean", "logit_std", "mode_scale"}
    | {"weighted_captions", "prompt_weighting"}
)


# ---------------------------------------------------------------- files


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """One transformer of the line, and how its files are told from others."""

    kind: str  # its class in diffusers
    marks: tuple[str, ...]  # original keys that together no other model has
    keys: KeyMap
    rows: Callable[[str, Sequence[int]], Sequence[int]]
    spec: Callable[[str], PartSpec]  # from the prefix of its keys
    config: Callable[[Mapping[str, Sequence[int]]], dict[str, Any]]  # from original keys' shapes

    def is_in(self, source: Source) -> bool:
        """Whether a file in either layout, or a folder as diffusers writes it, holds this transformer."""
        if source.is_folder:
            return source.config(_folder(source)).get("_class_name") == self.kind if _folder(source) else False
        inside = _without_prefix(source)
        return all(mark in inside for mark in self.marks) or self._is_renamed(inside)

    def network(self, source: Source) -> Network:
        """The transformer of a source that `is_in` has told."""
        if source.is_folder:
            folder = _folder(source)
            config = {name: value for name, value in source.config(folder).items() if not name.startswith("_")}
            return self._with_our_names(source.weights(folder), config)
        inside = _without_prefix(source)
        if self._is_renamed(inside):
            original = {self.keys.locate(name).original: shape for name, shape in inside.items()}
            return self._with_our_names(source.file, self.config(original))
        prefix = PREFIX if len(inside) < len(source.shapes) or _prefixed(source) else ""
        weights = Weights(file=source.file, key_map=self.keys, prefix=prefix, rows=self.rows)
        return Network(spec=self.spec(prefix), config=self.config(inside), weights=weights)

    def _is_renamed(self, inside: Mapping[str, Sequence[int]]) -> bool:
        """Whether a lone file has diffusers' names."""
        places = [self.keys.ours(mark) for mark in self.marks]
        return all(place is not None and place[0][0] in inside for place in places)

    def _with_our_names(self, file: Any, config: dict[str, Any]) -> Network:
        return Network(spec=self.spec(""), config=config, weights=Weights(file=file, key_map=identity()))


def _folder(source: Source) -> str:
    """The folder of the transformer inside a whole model, or the source itself where it is the transformer's."""
    return next((name for name in ("transformer", ".") if source.has(name)), "")


def _prefixed(source: Source) -> bool:
    return any(key.startswith(PREFIX) for key in source.shapes)


def _without_prefix(source: Source) -> dict[str, Sequence[int]]:
    """Key -> shape of the transformer alone, where the file puts a prefix before its keys."""
    prefix = PREFIX if _prefixed(source) else ""
    return {key[len(prefix) :]: shape for key, shape in source.shapes.items() if key.startswith(prefix)}


def component(source: Source, option: str, given: str | None, folder: str) -> Path:
    """What the option names, else the folder inside a diffusers model."""
    if given:
        with told_of(option):
            return find_path(given)
    if source.has(folder):
        return source.path / folder
    raise UserError(f"--{option} is missing: {source.path} holds the transformer alone", fix=f"--{option} FILE")


def read_t5(path: Path, denoiser: Network) -> Network:
    """Raises UserError for a file of another kind, and for an encoder of another width than the model reads."""
    source = Source(path)
    with told_of("t5xxl"):
        weights = Weights(file=source.component(), key_map=_t5.key_map(), tied=_t5.TIED)
        config = _t5.read_config(source, weights)
    check_width("t5xxl", path, WIDTH, config["d_model"], denoiser.config["joint_attention_dim"])
    return Network(spec=t5_spec(), config=config, weights=weights, option="t5xxl")


def read_vae(path: Path, denoiser: Network) -> Network:
    """Raises UserError for a file of another kind, and for latents of another kind than the model knows."""
    found = _vae.replacement(path, FIXED, option="ae")
    check_width("ae", path, LATENT, found.config["latent_channels"], denoiser.config["in_channels"] // 4)
    return found


def t5_spec() -> PartSpec:
    return PartSpec(
        name="t5",
        key_map=_t5.key_map(),
        key_prefix="",
        adapter_map=_t5.key_map(),
        adapter_prefix="lora_te3",
        targets=_t5.TARGETS,
        blocks=_t5.BLOCKS,
        opt_in="train_t5xxl",
    )


def tokenizer_folder(source: Source, given: str | None, name: str) -> Path | None:
    """What --tokenizer says, else the folder of that name in the diffusers model or beside the checkpoint."""
    if given:
        return Path(given)
    beside = source.path if source.is_folder else source.path.parent
    return beside / name if (beside / name).is_dir() else None


def t5_tokenizer(source: Source, given: str | None, name: str) -> Any:
    """From `tokenizer_folder`, else from the hub's cache."""
    return _tokenizers.t5_tokenizer(tokenizer_folder(source, given, name) or _tokenizers.t5_in_hub_cache())


# ---------------------------------------------------------------- time


def objective(noise: NoiseOptions, *, shifted: bool) -> RectifiedFlow:
    """shifted: whether pictures with more tokens are walked with more steps in the noise."""
    return RectifiedFlow(
        space=noise.model_prediction_type or "sigma_scaled",
        grid=time_grid(resolution_shift if shifted else lambda tokens: 1.0),
        grid_at=lambda shift: time_grid(lambda tokens: shift),
    )


def resolution_shift(tokens: int) -> float:
    """More for larger pictures (Esser et al. 2024, sec. 5.3.2)."""
    return math.exp(resolution_mu(tokens))


def time_grid(shift_of: Callable[[int], float]) -> Grid:
    """Even steps, moved towards noise by a shift that may depend on the number of tokens.

    Rounded as in diffusers: the embedding of time tells a level from the next float.
    """

    def set_timesteps(scheduler: Any, steps: int, tokens: int) -> None:
        sigmas, shift = np.linspace(1, 1 / steps, steps).astype(np.float32), shift_of(tokens)
        if shift != 1:
            sigmas = shift / (shift + (1 / sigmas - 1))
        scheduler.set_timesteps(sigmas=sigmas.tolist())

    return set_timesteps


def keep_time_exact(network: nn.Module) -> None:
    """Have the time embedding see the time itself: diffusers rounds it to the dtype of the activations before.

    In bfloat16 the 1000 levels would fall together into 506.
    """
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "timestep" in kwargs:
            seen["time"] = kwargs["timestep"]

    def restore(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        """Guidance is embedded by the same module, after the time."""
        time = seen.pop("time", None)
        return None if time is None or args[0].dtype.itemsize >= 4 else (time.float() * 1000,)

    network.register_forward_pre_hook(note, with_kwargs=True)
    network.get_submodule("time_text_embed.time_proj").register_forward_pre_hook(restore)


def metadata(model_type: str, model: ModelOptions, noise: NoiseOptions, guidance: float) -> dict[str, Any]:
    """The ss_ keys that only adapter files of this line have."""
    return {
        "ss_model_type": model_type,
        "ss_apply_t5_attn_mask": model.apply_t5_attn_mask,
        "ss_weighting_scheme": noise.weighting_scheme,
        "ss_logit_mean": noise.logit_mean,
        "ss_logit_std": noise.logit_std,
        "ss_mode_scale": noise.mode_scale,
        "ss_guidance_scale": guidance if model.guidance_scale is None else model.guidance_scale,
        "ss_timestep_sampling": noise.timestep_sampling or "sigma",
        "ss_sigmoid_scale": noise.sigmoid_scale,
        "ss_model_prediction_type": noise.model_prediction_type or "sigma_scaled",
        "ss_discrete_flow_shift": noise.discrete_flow_shift or 3.0,
    }


# ---------------------------------------------------------------- packed latents


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4 C): one token for each 2x2 patch."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack`."""
    batch, channels, height, width = shape
    patches = tokens.view(batch, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def image_ids(like: Tensor) -> Tensor:
    """(tokens, 3) positions (0, y, x) of the patches of latents (B, C, h, w)."""
    height, width = like.shape[-2] // 2, like.shape[-1] // 2
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).to(like)


def whole_mask(text: Tensor, noisy: Tensor) -> Tensor:
    """(B, text + image tokens) bool from the text's (B, text): every image token counts."""
    tokens = noisy.shape[-2] * noisy.shape[-1] // 4
    return torch.cat([text, text.new_ones(len(text), tokens)], dim=1)
