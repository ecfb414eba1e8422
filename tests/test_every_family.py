"""The contract: what holds for each family at toy size, against diffusers' own pipelines where it has one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.config import (
    Config,
    FullOptions,
    LossOptions,
    ModelOptions,
    NetworkOptions,
    OptimOptions,
    RunOptions,
)
from sfumato.config.loop import LoopOptions
from sfumato.config.noise import NoiseOptions
from sfumato.config.prompts import Prompt
from sfumato.data.batch import Batch, Extras, Sizes
from sfumato.data.order import HeldOut
from sfumato.data.plans import DataPlan
from sfumato.demo.toy import write_toy
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.recipe import make_recipe
from sfumato.families import register_all
from sfumato.families.base import Family, find_family
from sfumato.families.encoding import FrozenText, live_text
from sfumato.families.source import open_source
from sfumato.methods import make_method
from sfumato.sample import conditioning, denoise, fill_in, make_scheduler
from sfumato.train import sample_losses, training_loss
from sfumato.training.validation import measure

register_all()
CASES = {
    "sd": {},
    "sd2": {"v2": True},
    "sd2_v": {"v_parameterization": True},
    "sd2_v_zero": {"v_parameterization": True},
    "sdxl": {},
    "flux": {"apply_t5_attn_mask": True},
    "chroma": {"apply_t5_attn_mask": True},
    "lumina": {},
    "sd3": {},
    "sd35": {"apply_t5_attn_mask": True, "apply_lg_attn_mask": True},
}
ALWAYS_MASKED = {"chroma"}
VARIANTS = {  # case -> family and variant of its toy
    "sd2": ("sd", "2"),
    "sd2_v": ("sd", "2-v"),
    "sd2_v_zero": ("sd", "2-v"),
    "sd35": ("sd3", "3.5-medium"),
}
NOISE = {"sd2_v_zero": NoiseOptions(zero_terminal_snr=True)}
UNMASKED = {"apply_t5_attn_mask": False, "apply_lg_attn_mask": False}  # diffusers' pipelines have no masks


@dataclass(frozen=True)
class Toys:
    """Where one family's toy lies, in both layouts."""

    original: ModelOptions
    diffusers: ModelOptions
    folder: Path
    noise: NoiseOptions


@pytest.fixture(scope="session", params=sorted(CASES))
def toys(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toys:
    folder = tmp_path_factory.mktemp(request.param)
    family, variant = VARIANTS.get(request.param, (request.param, ""))
    paths = write_toy(family, folder / "original", variant=variant)
    write_toy(family, folder / "diffusers", variant=variant, layout="diffusers")
    components = {name: str(path) for name, path in paths.items() if not name.startswith("tokenizer")}
    options = CASES[request.param]
    return Toys(
        original=ModelOptions(**components, **options),
        diffusers=ModelOptions(pretrained_model_name_or_path=str(folder / "diffusers"), **options),
        folder=folder,
        noise=NOISE.get(request.param, NoiseOptions()),
    )


def load(model: ModelOptions, dtype: torch.dtype = torch.float32, noise: NoiseOptions | None = None) -> Family:
    source = open_source(model)
    family = find_family(None, source)
    blueprint = family.read(source, model, noise or NoiseOptions())
    loaded = family.load(blueprint, model, dtype=dtype, device=torch.device("cpu"))
    loaded.freeze()
    return loaded


def inputs_of(model: Family, captions: list[str], size: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(0)
    batch = len(captions)
    x = torch.randn(batch, model.latents.channels, size // 8, size // 8, generator=generator).to(dtype)
    features = {part: live_text(model, part, captions) for part in model.text_parts}
    return x, model.condition(features, Sizes.plain(batch, size, size), None)


def predict(model: Family, captions: list[str], t: float = 600.0) -> Tensor:
    x, conditioning = inputs_of(model, captions)
    with torch.no_grad():
        return model.predict(x, torch.full((len(captions),), t), conditioning)


def test_a_caption_has_room_for_as_many_tokens_as_are_read(toys: Toys) -> None:
    """What lies beyond changes nothing of any encoder's features, and the last token that has room does."""
    model = load(toys.original, noise=toys.noise)
    for part in model.text_parts:
        room = model.room(part, ["cat", "a red cat"])
        assert room is not None
        assert room.lengths[0] < room.lengths[1]
        words = room.limit // room.lengths[0]
        assert words * room.lengths[0] == room.limit
        shorter, full, longer = (live_text(model, part, [" ".join(["cat"] * (words + i))]) for i in (-1, 0, 1))
        assert all(torch.equal(full[name], longer[name]) for name in full)
        assert any(not torch.equal(full[name], shorter[name]) for name in full)


def test_both_layouts_give_the_same_model(toys: Toys) -> None:
    torch.testing.assert_close(
        predict(load(toys.original), ["a cat"]), predict(load(toys.diffusers), ["a cat"]), rtol=0, atol=1e-6
    )


def test_a_loaded_single_file_is_saved_again_bit_for_bit(toys: Toys, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from sfumato.families.saving import averages, save_single_file

    model = load(toys.original)
    inside = {name: part.module for name, part in model.parts.items() if model.blueprint.in_file(name)}
    every = {name: module.state_dict().keys() for name, module in inside.items()}
    save_single_file(model, tmp_path / "again.safetensors", {}, changed=every)
    before, after = (
        load_file(str(toys.original.pretrained_model_name_or_path)),
        load_file(tmp_path / "again.safetensors"),
    )
    assert set(before) - set(after) == set(averages(model.blueprint.source))  # of the weights before training
    assert set(after) <= set(before)
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


def test_samples_do_not_see_their_neighbours(toys: Toys) -> None:
    model = load(toys.original)
    together = predict(model, ["a cat", "a red cup of coffee on a wooden table"])
    alone = predict(model, ["a cat"])
    assert together.shape == (2, model.latents.channels, 8, 8)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


def test_header_names_the_groups_that_the_loaded_model_has(toys: Toys) -> None:
    model = load(toys.original)
    for name, part in model.parts.items():
        planned, real = model.blueprint.networks[name].groups(), part.groups()
        assert [group.name for group in planned] == [group.name for group in real]
        assert [group.rows for group in planned] == [group.rows for group in real]


# ---------------------------------------------------------------- sampling


@dataclass
class Plain:
    """No method at all: the model as it is."""

    live_text: frozenset[str] = frozenset()

    def caption(self, text: str) -> str:
        return text

    def begin(self, model: Family, extras: Extras) -> None: ...

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Any, extras: Extras) -> Tensor:
        return model.predict(noisy, t, conditioning)


def sd_pipeline(folder: Path, model: Any, picture: Any, x: Tensor) -> Tensor:
    """Serves Stable Diffusion XL, too, whose sizes are by default those of the picture that is made."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = make_scheduler(picture.sampler, model.objective)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt=picture.prompt, negative_prompt=picture.negative_prompt, height=picture.height, width=picture.width,
        num_inference_steps=picture.steps, guidance_scale=picture.scale, latents=x, output_type="latent",
        generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip


def flux_pipeline(folder: Path, model: Any, picture: Any, x: Tensor) -> Tensor:
    from diffusers import FluxPipeline

    from sfumato.families._flux_parts import pack, unpack

    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def embeds(text: str) -> tuple[Tensor, Tensor]:
        pooled, hidden = (model.encode_text(part, [text])[0] for part in ("clip_l", "t5"))
        return pooled["pooled"][None], hidden["hidden"][None]

    (pooled, hidden), (no_pooled, no_hidden) = embeds(picture.prompt), embeds(picture.negative_prompt)
    found = pipe(
        prompt_embeds=hidden, pooled_prompt_embeds=pooled, negative_prompt_embeds=no_hidden,
        negative_pooled_prompt_embeds=no_pooled, true_cfg_scale=picture.scale, guidance_scale=picture.guidance,
        height=picture.height, width=picture.width, num_inference_steps=picture.steps, latents=pack(x),
        output_type="latent", max_sequence_length=512,
    ).images  # fmt: skip
    return unpack(found, x.shape)


def lumina_pipeline(folder: Path, model: Any, picture: Any, x: Tensor) -> Tensor:
    from diffusers import Lumina2Pipeline

    pipe = Lumina2Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    hidden, mask = pipe._get_gemma_prompt_embeds(picture.prompt)  # the pipeline always adds a system prompt
    no_hidden, no_mask = pipe._get_gemma_prompt_embeds(picture.negative_prompt)
    return pipe(
        prompt_embeds=hidden, prompt_attention_mask=mask, negative_prompt_embeds=no_hidden,
        negative_prompt_attention_mask=no_mask, guidance_scale=picture.scale, height=picture.height,
        width=picture.width, num_inference_steps=picture.steps, latents=x, output_type="latent",
        cfg_normalization=False,
    ).images  # fmt: skip


def sd3_pipeline(folder: Path, model: Any, picture: Any, x: Tensor) -> Tensor:
    from diffusers import StableDiffusion3Pipeline

    pipe: Any = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt=picture.prompt, negative_prompt=picture.negative_prompt, height=picture.height, width=picture.width,
        num_inference_steps=picture.steps, guidance_scale=picture.scale, latents=x, output_type="latent",
    ).images  # fmt: skip


def chroma_pipeline(folder: Path, model: Any, picture: Any, x: Tensor) -> Tensor:
    """The texts cut to what counts: the pipeline adds its mask to the scores, which hides next to nothing."""
    from diffusers import ChromaPipeline

    from sfumato.families._flux_parts import pack, unpack

    pipe = ChromaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    texts = [model.encode_text("t5", [text])[0] for text in (picture.prompt, picture.negative_prompt)]
    (hidden, no_hidden), (mask, no_mask) = ([text[name][None] for text in texts] for name in ("hidden", "mask"))
    found = pipe(
        prompt_embeds=hidden, prompt_attention_mask=mask, negative_prompt_embeds=no_hidden,
        negative_prompt_attention_mask=no_mask, guidance_scale=picture.scale, height=picture.height,
        width=picture.width, num_inference_steps=picture.steps, latents=pack(x), output_type="latent",
    ).images  # fmt: skip
    return unpack(found, x.shape)


PIPELINES: dict[str, Callable[..., Tensor]] = {
    "sd": sd_pipeline,
    "sdxl": sd_pipeline,
    "flux": flux_pipeline,
    "chroma": chroma_pipeline,
    "sd3": sd3_pipeline,
    "lumina": lumina_pipeline,
}


def plain_text(toys: Toys) -> ModelOptions:
    """As diffusers' pipelines see text: without a mask where a family can do without."""
    masked = toys.folder.name.rstrip("0123456789") in ALWAYS_MASKED
    return toys.diffusers.model_copy(update={**UNMASKED, "apply_t5_attn_mask": masked})


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_denoising_equals_the_diffusers_pipeline(toys: Toys, scale: float) -> None:
    model = load(plain_text(toys), noise=toys.noise)
    picture = fill_in(
        Prompt(prompt="a cat", negative_prompt="a red dog", width=64, height=96, sample_steps=4, scale=scale),
        model, sampler="ddim", seed=3,
    )  # fmt: skip
    spec = model.latents
    x = torch.randn(1, spec.channels, 12, 8, generator=torch.Generator().manual_seed(picture.seed))
    sizes = Sizes.plain(1, 96, 64)
    method: Any = Plain()
    negative = conditioning(model, [picture.negative_prompt], sizes, picture.guidance) if picture.guided else None
    ours = denoise(
        model, method, make_scheduler(picture.sampler, model.objective), x,
        conditioning(model, [picture.prompt], sizes, picture.guidance), negative, steps=picture.steps,
        scale=scale, extras=Extras(), generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    theirs = PIPELINES[model.name](toys.folder / "diffusers", model, picture, x)
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- loss and gradients in float64


def bare_run(model: Family, method: Any, noise: NoiseOptions) -> Any:
    """What training_loss asks of a run, without files and data."""
    return SimpleNamespace(
        model=model, method=method, randomness=Randomness(3), device=torch.device("cpu"), frozen_text=FrozenText(model),
        recipe=make_recipe(noise, LossOptions(), model.objective, 2.5),
        latents=lambda batch, source=None: batch.latents,
    )  # fmt: skip


def fixed_batch(model: Family, captions: list[str]) -> Batch:
    count = len(captions)
    generator = torch.Generator().manual_seed(1)
    return Batch(
        ids=torch.arange(10, 10 + count),
        latents=torch.randn(count, model.latents.channels, 12, 8, generator=generator, dtype=torch.float64),
        pixels=None, captions=captions, text={}, text_dropped={}, sizes=Sizes.plain(count, 96, 64), extras=Extras(),
        weight=torch.tensor([1.0, 0.5]), entry_seeds=torch.zeros(count, dtype=torch.int64),
    )  # fmt: skip


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
    """For the model time runs from noise to picture, and so does its prediction.

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


def plain_noise(toys: Toys) -> NoiseOptions:
    return toys.noise.model_copy(update={"model_prediction_type": "raw", "timestep_sampling": "sigmoid"})


def unmasked(toys: Toys) -> Family:
    """In float64."""
    return load(plain_text(toys), torch.float64, plain_noise(toys))


class Theirs:
    """diffusers' own modules of one family, and the loss that they give."""

    def __init__(self, toys: Toys, model: Family) -> None:
        from diffusers import DiffusionPipeline

        self.pipe = DiffusionPipeline.from_pretrained(toys.folder / "diffusers").to(torch.float64)
        if toys.noise.zero_terminal_snr:
            config = self.pipe.scheduler.config
            self.pipe.scheduler = self.pipe.scheduler.from_config(config, rescale_betas_zero_snr=True)
        self.name, self.loss_of, self.names = LOSSES[model.name]
        self.modules = {ours: getattr(self.pipe, theirs) for ours, theirs in self.names.items()}

    def loss(self, run: Any, batch: Batch, weights: dict[str, dict[str, Tensor]]) -> Tensor:
        """The batch's loss with these weights in place of the modules' own."""

        def call(part: str) -> Any:
            return lambda *args, **kwargs: torch.func.functional_call(self.modules[part], weights[part], args, kwargs)

        x0, draw = batch.latents, run.randomness
        assert x0 is not None
        t = run.recipe.timesteps(draw, batch.ids, (1, 12, 8), run.model.latents)
        noise = draw.per_sample("noise", batch.ids, lambda g, _: torch.randn(x0.shape[1:], generator=g)).double()
        calls = {theirs: call(ours) for ours, theirs in self.names.items()}
        elementwise = self.loss_of(self.pipe, calls[self.name], calls, x0, noise, t, list(batch.captions))
        return (elementwise.flatten(1).mean(1) * batch.weight).sum() / 2


def test_loss_and_gradients_equal_those_of_diffusers_parts(toys: Toys) -> None:
    """Every adapter's gradient, text encoders included, against weights W + scale * up @ down in diffusers' modules."""
    model = unmasked(toys)
    every_encoder = {part.spec.opt_in: True for part in model.parts.values() if part.spec.opt_in}
    config = Config(
        network=NetworkOptions(network_dim=3, network_alpha=2.0, network_args=every_encoder),
        optim=OptimOptions(learning_rate=1.0), loop=LoopOptions(seed=1),
    )  # fmt: skip
    method: Any = make_method(config)
    method.prepare(model)
    method.modules.double()
    for parameter in method.modules.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    run = bare_run(model, method, plain_noise(toys))
    batch = fixed_batch(model, ["a cat", "a red dog on a table"])
    ours = training_loss(run, batch, 2)
    ours.backward()

    theirs = Theirs(toys, model)
    leaves: dict[str, tuple[Tensor, Tensor]] = {}
    changed = {part: dict[str, Tensor](module.named_parameters()) for part, module in theirs.modules.items()}
    for adapter in method.engine:
        group = adapter.group
        down, up = (p.detach().clone().requires_grad_() for p in (adapter.lora_down, adapter.lora_up))
        leaves[group.name] = (down, up)
        for i, path in enumerate(group.paths):
            key = f"{path}.weight"
            key = key if key in changed[group.part] else f"text_model.{key}"
            weight = changed[group.part][key]
            product = group.take(up, i).flatten(1) @ down.flatten(1)
            changed[group.part][key] = weight + 2 / 3 * product.reshape(weight.shape)

    loss = theirs.loss(run, batch, changed)
    loss.backward()
    assert abs(ours.item() - loss.item()) < 1e-9
    for adapter in method.engine:
        for mine, other in zip((adapter.lora_down, adapter.lora_up), leaves[adapter.group.name], strict=True):
            if other.grad is None:  # layers behind the one that is read
                assert mine.grad is None, adapter.group.name
                continue
            torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-9)


def test_full_training_has_the_gradients_of_diffusers_own_modules(toys: Toys) -> None:
    """Every weight's, those of text encoders included where they lie in the model's own file."""
    model = unmasked(toys)
    texts = all(model.blueprint.in_file(part) for part in model.text_parts)
    method: Any = make_method(
        Config(
            run=RunOptions(method="full"), full=FullOptions(train_text_encoder=texts),
            optim=OptimOptions(learning_rate=1.0), loop=LoopOptions(seed=1),
        )
    )  # fmt: skip
    method.prepare(model)
    run = bare_run(model, method, plain_noise(toys))
    batch = fixed_batch(model, ["a cat", "a red dog on a table"])
    ours = training_loss(run, batch, 2)
    ours.backward()

    theirs = Theirs(toys, model)
    loss = theirs.loss(run, batch, {part: dict(module.named_parameters()) for part, module in theirs.modules.items()})
    loss.backward()
    assert abs(ours.item() - loss.item()) < 1e-9
    trained = {"denoiser", *(model.text_parts if texts else ())}
    assert set(method.modules) == trained
    for part in model.parts.keys() - trained:
        assert all(weight.grad is None for weight in model.parts[part].module.parameters())
    for part in trained:
        mine, others = plain_names(model.parts[part].module), plain_names(theirs.modules[part])
        assert set(mine) == set(others)
        for name, weight in mine.items():
            if others[name].grad is None:  # behind the layer that is read
                assert weight.grad is None, (part, name)
            else:
                torch.testing.assert_close(weight.grad, others[name].grad, rtol=0, atol=1e-9)


def test_validation_has_the_loss_of_diffusers_own_modules(toys: Toys) -> None:
    """At two times, with noise by the images' places; what only fills up a batch does not count."""
    model = unmasked(toys)
    method: Any = Plain()
    run = bare_run(model, method, plain_noise(toys))
    batch = replace(fixed_batch(model, ["a cat", "a red dog on a table"]), weight=torch.tensor([1.0, 0.0]))
    order = HeldOut(
        DataPlan(datasets=(), validation=(), processes=1, prior_loss_weight=1.0, from_file=True, notes=()), seed=5
    )
    order.ids, order.samples = 12, 1
    run.held_out = SimpleNamespace(order=order, steps=lambda: [SimpleNamespace(batches=(batch,))])
    run.latents = lambda batch, loader: batch.latents
    run.processes, run.autocast = SimpleNamespace(num_processes=1), nullcontext
    found = measure(run, [200, 800], sample_losses)

    theirs = Theirs(toys, model)
    calls = {name: theirs.modules[ours] for ours, name in theirs.names.items()}
    x0 = batch.latents
    assert x0 is not None
    for column, t in enumerate((200, 800)):
        generator = Randomness(5).generator(f"validation noise {column}", 10)
        noise = torch.randn(x0.shape[1:], generator=generator).double()[None]
        with torch.no_grad():
            loss = theirs.loss_of(
                theirs.pipe, calls[theirs.name], calls, x0[:1], noise, torch.tensor([float(t)]), ["a cat"]
            )
        assert found[column] == pytest.approx(loss.mean().item(), rel=1e-6)


def plain_names(module: torch.nn.Module) -> dict[str, Tensor]:
    """Its weights; only some versions of the libraries have the level."""
    return {name.removeprefix("text_model."): weight for name, weight in module.named_parameters()}
