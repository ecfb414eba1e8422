"""Every family's loss from diffusers' own modules, to compare ours with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from every_family import Toys
from sfumato.data.batch import Batch
from sfumato.families.base import Family
from sfumato.loss import LossContext


def sd_loss(pipe: Any, denoise: Any, encode: Any, x0: Tensor, noise: Tensor, t: Tensor, captions: list[str]) -> Tensor:
    from diffusers import DDPMScheduler

    zero = pipe.scheduler.config.get("rescale_betas_zero_snr", False)
    schedule = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero
    )
    noisy = schedule.add_noise(x0, noise, t.long())
    ids = pipe.tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    prediction = denoise(noisy, t.long(), encoder_hidden_states=encode["text_encoder"](ids).last_hidden_state).sample
    says_v = pipe.scheduler.config.prediction_type == "v_prediction"
    return (prediction - (schedule.get_velocity(x0, noise, t.long()) if says_v else noise)) ** 2


def sdxl_loss(
    pipe: Any, denoise: Any, encode: Any, x0: Tensor, noise: Tensor, t: Tensor, captions: list[str]
) -> Tensor:
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    height, width = x0.shape[-2] * 8, x0.shape[-1] * 8
    outputs = []
    for encoder, tokenizer in (("text_encoder", pipe.tokenizer), ("text_encoder_2", pipe.tokenizer_2)):
        ids = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
        outputs.append(encode[encoder](ids, output_hidden_states=True))
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(captions), dtype=torch.float64)
    prediction = denoise(
        schedule.add_noise(x0, noise, t.long()), t.long(),
        encoder_hidden_states=torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
        added_cond_kwargs={"text_embeds": outputs[1].text_embeds, "time_ids": sizes},
    ).sample  # fmt: skip
    return (prediction - noise) ** 2


def flux_loss(
    pipe: Any, denoise: Any, encode: Any, x0: Tensor, noise: Tensor, t: Tensor, captions: list[str]
) -> Tensor:
    sigma = (t.double() / 1000).reshape(-1, 1, 1, 1)
    noisy = (1 - sigma) * x0 + sigma * noise
    batch, channels, height, width = x0.shape
    words = pipe.tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    pooled = encode["text_encoder"](words).pooler_output
    tokens = pipe.tokenizer_2(captions, padding="max_length", max_length=512, return_tensors="pt").input_ids
    hidden = encode["text_encoder_2"](tokens).last_hidden_state
    raw = denoise(
        hidden_states=pipe._pack_latents(noisy, batch, channels, height, width), timestep=t.double() / 1000,
        guidance=torch.full((batch,), 2.5, dtype=torch.float64), pooled_projections=pooled,
        encoder_hidden_states=hidden, txt_ids=torch.zeros(512, 3, dtype=torch.float64),
        img_ids=pipe._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float64),
    ).sample  # fmt: skip
    prediction = pipe._unpack_latents(raw, height * 8, width * 8, pipe.vae_scale_factor)
    return (prediction - (noise - x0)) ** 2


def lumina_loss(
    pipe: Any, denoise: Any, encode: Any, x0: Tensor, noise: Tensor, t: Tensor, captions: list[str]
) -> Tensor:
    """For the model time runs from noise to image, and so does its prediction.

    Padded to the longest as ours is: inside Gemma 2 softmax is float32, and other lengths round otherwise.
    """
    sigma = (t.double() / 1000).reshape(-1, 1, 1, 1)
    tokens = pipe.tokenizer(captions, padding="longest", return_tensors="pt")
    states = encode["text_encoder"](
        tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
    ).hidden_states  # fmt: skip
    prediction = denoise(
        hidden_states=(1 - sigma) * x0 + sigma * noise, timestep=1 - t / 1000, encoder_hidden_states=states[-2],
        encoder_attention_mask=tokens.attention_mask,
    ).sample  # fmt: skip
    return (prediction - (x0 - noise)) ** 2


def sd3_loss(pipe: Any, denoise: Any, encode: Any, x0: Tensor, noise: Tensor, t: Tensor, captions: list[str]) -> Tensor:
    sigma = (t.double() / 1000).reshape(-1, 1, 1, 1)
    towers = []
    for encoder, tokenizer in (("text_encoder", pipe.tokenizer), ("text_encoder_2", pipe.tokenizer_2)):
        ids = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
        towers.append(encode[encoder](ids, output_hidden_states=True))
    tokens = pipe.tokenizer_3(captions, padding="max_length", max_length=256, return_tensors="pt").input_ids
    t5 = encode["text_encoder_3"](tokens).last_hidden_state
    clip = torch.cat([tower.hidden_states[-2] for tower in towers], dim=-1)
    clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    prediction = denoise(
        hidden_states=(1 - sigma) * x0 + sigma * noise, timestep=t.double(),
        encoder_hidden_states=torch.cat([clip, t5], dim=1),
        pooled_projections=torch.cat([tower.text_embeds for tower in towers], dim=-1),
    ).sample  # fmt: skip
    return (prediction - (noise - x0)) ** 2


def chroma_loss(
    pipe: Any, denoise: Any, encode: Any, x0: Tensor, noise: Tensor, t: Tensor, captions: list[str]
) -> Tensor:
    sigma = (t.double() / 1000).reshape(-1, 1, 1, 1)
    batch, channels, height, width = x0.shape
    tokens = pipe.tokenizer(captions, padding="max_length", max_length=512, return_tensors="pt")
    hidden = encode["text_encoder"](tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    seen = torch.arange(512) <= tokens.attention_mask.sum(1, keepdim=True)
    raw = denoise(
        hidden_states=pipe._pack_latents((1 - sigma) * x0 + sigma * noise, batch, channels, height, width),
        timestep=t.double() / 1000, encoder_hidden_states=hidden, txt_ids=torch.zeros(512, 3, dtype=torch.float64),
        img_ids=pipe._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float64),
        attention_mask=torch.cat([seen, seen.new_ones(batch, height * width // 4)], dim=1),
    ).sample  # fmt: skip
    prediction = pipe._unpack_latents(raw, height * 8, width * 8, pipe.vae_scale_factor)
    return (prediction - (noise - x0)) ** 2


LOSSES: dict[str, tuple[str, Callable[..., Tensor], dict[str, str]]] = {
    "sd": ("unet", sd_loss, {"denoiser": "unet", "clip": "text_encoder"}),
    "sdxl": ("unet", sdxl_loss, {"denoiser": "unet", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}),
    "flux": (
        "transformer", flux_loss, {"denoiser": "transformer", "clip_l": "text_encoder", "t5": "text_encoder_2"},
    ),
    "chroma": ("transformer", chroma_loss, {"denoiser": "transformer", "t5": "text_encoder"}),
    "lumina": ("transformer", lumina_loss, {"denoiser": "transformer", "gemma2": "text_encoder"}),
    "sd3": (
        "transformer", sd3_loss,
        {
            "denoiser": "transformer", "clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3",
        },
    ),
}  # fmt: skip


class DiffusersModel:
    """diffusers' own modules of one family, and the loss that they give."""

    def __init__(self, toys: Toys, model: Family) -> None:
        from diffusers import DiffusionPipeline

        self.pipe = DiffusionPipeline.from_pretrained(toys.folder).to(torch.float64)
        if toys.noise.zero_terminal_snr:
            config = self.pipe.scheduler.config
            self.pipe.scheduler = self.pipe.scheduler.from_config(config, rescale_betas_zero_snr=True)
        self.name, self.loss_of, self.names = LOSSES[model.name]
        self.modules = {ours: getattr(self.pipe, theirs) for ours, theirs in self.names.items()}

    def loss(self, context: LossContext, batch: Batch, weights: dict[str, dict[str, Tensor]]) -> Tensor:
        """The batch's loss with these weights in place of the modules' own."""

        def call(part: str) -> Any:
            return lambda *args, **kwargs: torch.func.functional_call(self.modules[part], weights[part], args, kwargs)

        x0, draw = batch.latents, context.randomness
        assert x0 is not None
        t = context.recipe.timesteps(draw, batch.ids, (1, 12, 8), context.model.latents)
        noise = draw.per_sample("noise", batch.ids, lambda g, _: torch.randn(x0.shape[1:], generator=g)).double()
        calls = {theirs: call(ours) for ours, theirs in self.names.items()}
        elementwise = self.loss_of(self.pipe, calls[self.name], calls, x0, noise, t, list(batch.captions))
        return (elementwise.flatten(1).mean(1) * batch.weight).sum() / 2
