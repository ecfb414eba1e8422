"""Every family's losses and gradients in float64 against those of diffusers' own modules."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_losses import DiffusersModel
from every_family import Toys, each_case, find_toys
from families.loading import NoMethod, load_model
from families.toys import ToyShelf
from sfumato.config import Config, FullOptions, LossOptions, NetworkOptions, NoiseOptions, OptimOptions, RunOptions
from sfumato.config.run import LoopOptions
from sfumato.data.batch import Batch, Extras, Sizes
from sfumato.data.batch_sampler import ValidationSampler
from sfumato.data.plans import DataPlan
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.recipe import make_recipe
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenTextEncoders
from sfumato.loss import LossContext, training_loss
from sfumato.methods import make_method
from sfumato.parallel.single import Single
from sfumato.training.validation import measure_validation_loss


def make_noise_options(toys: Toys) -> NoiseOptions:
    return toys.noise.model_copy(update={"model_prediction_type": "raw", "timestep_sampling": "sigmoid"})


def load_in_float64(toys: Toys) -> Family:
    return load_model(toys.unmasked, torch.float64, make_noise_options(toys))


def make_context(model: Family, method: Any, toys: Toys) -> LossContext:
    recipe = make_recipe(make_noise_options(toys), LossOptions(), model.objective, 2.5)
    return LossContext(
        model=model, method=method, recipe=recipe, randomness=Randomness(3), text=FrozenTextEncoders(model),
        device=torch.device("cpu"),
    )  # fmt: skip


def fixed_batch(model: Family, captions: list[str]) -> Batch:
    count = len(captions)
    generator = torch.Generator().manual_seed(1)
    return Batch(
        ids=torch.arange(10, 10 + count),
        latents=torch.randn(count, model.latents.channels, 12, 8, generator=generator, dtype=torch.float64),
        pixels=None, captions=captions, text={}, text_dropped={}, sizes=Sizes.from_size(count, 96, 64), extras=Extras(),
        weight=torch.tensor([1.0, 0.5]), entry_seeds=torch.zeros(count, dtype=torch.int64),
    )  # fmt: skip


def latents(batch: Batch) -> Tensor:
    assert batch.latents is not None
    return batch.latents


@each_case
def test_loss_and_gradients_equal_those_of_diffusers_parts(case: str, toy_shelf: ToyShelf) -> None:
    """Every adapter's gradient, text encoders included, against weights W + scale * up @ down in diffusers' modules."""
    toys = find_toys(toy_shelf, case)
    model = load_in_float64(toys)
    every_encoder = {part.spec.opt_in: True for part in model.parts.values() if part.spec.opt_in}
    config = Config(
        network=NetworkOptions(network_dim=3, network_alpha=2.0, network_args=every_encoder),
        optim=OptimOptions(learning_rate=1.0), loop=LoopOptions(seed=1),
    )  # fmt: skip
    method: Any = make_method(config)
    method.plan(model.blueprint)
    method.prepare(model)
    method.modules.double()
    for parameter in method.modules.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    context = make_context(model, method, toys)
    batch = fixed_batch(model, ["a cat", "a red dog on a table"])
    ours = training_loss(context, batch, latents(batch), 2)
    ours.backward()

    theirs = DiffusersModel(toys, model)
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
            product = group.take_rows(up, i).flatten(1) @ down.flatten(1)
            changed[group.part][key] = weight + 2 / 3 * product.reshape(weight.shape)

    loss = theirs.loss(context, batch, changed)
    loss.backward()
    assert abs(ours.item() - loss.item()) < 1e-9
    for adapter in method.engine:
        for mine, other in zip((adapter.lora_down, adapter.lora_up), leaves[adapter.group.name], strict=True):
            if other.grad is None:  # layers behind the one that is read
                assert mine.grad is None, adapter.group.name
                continue
            torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-9)


@each_case
def test_full_training_has_the_gradients_of_diffusers_own_modules(case: str, toy_shelf: ToyShelf) -> None:
    """Every weight's, those of text encoders included where they lie in the model's own file."""
    toys = find_toys(toy_shelf, case)
    model = load_in_float64(toys)
    texts = all(model.blueprint.in_file(part) for part in model.text_parts)
    method: Any = make_method(
        Config(
            run=RunOptions(method="full"), full=FullOptions(train_text_encoder=texts),
            optim=OptimOptions(learning_rate=1.0), loop=LoopOptions(seed=1),
        )
    )  # fmt: skip
    method.plan(model.blueprint)
    method.prepare(model)
    context = make_context(model, method, toys)
    batch = fixed_batch(model, ["a cat", "a red dog on a table"])
    ours = training_loss(context, batch, latents(batch), 2)
    ours.backward()

    theirs = DiffusersModel(toys, model)
    loss = theirs.loss(
        context, batch, {part: dict(module.named_parameters()) for part, module in theirs.modules.items()}
    )
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


@each_case
def test_validation_has_the_loss_of_diffusers_own_modules(case: str, toy_shelf: ToyShelf) -> None:
    """At two timesteps, with noise by the images' ids; padding samples do not count."""
    toys = find_toys(toy_shelf, case)
    model = load_in_float64(toys)
    method: Any = NoMethod()
    context = make_context(model, method, toys)
    batch = replace(fixed_batch(model, ["a cat", "a red dog on a table"]), weight=torch.tensor([1.0, 0.0]))
    plan = DataPlan(datasets=(), validation=(), processes=1, prior_loss_weight=1.0, from_file=True, notes=())
    sampler = ValidationSampler(plan, seed=5)
    sampler.num_ids, sampler.num_samples = 12, 1
    run: Any = SimpleNamespace(
        forward=lambda compute: compute(),
        model=model, context=context, device=context.device, autocast=nullcontext,
        parallel=Single(context.device), given_up=set(),
        validation_loader=SimpleNamespace(sampler=sampler, steps=lambda: [SimpleNamespace(batches=(batch,))]),
    )  # fmt: skip
    losses = measure_validation_loss(run, [200, 800])

    theirs = DiffusersModel(toys, model)
    calls = {name: theirs.modules[ours] for ours, name in theirs.names.items()}
    x0 = latents(batch)
    for column, t in enumerate((200, 800)):
        generator = Randomness(5).generator(f"validation noise {column}", 10)
        noise = torch.randn(x0.shape[1:], generator=generator).double()[None]
        with torch.no_grad():
            loss = theirs.loss_of(
                theirs.pipe, calls[theirs.name], calls, x0[:1], noise, torch.tensor([float(t)]), ["a cat"]
            )
        assert losses[column] == pytest.approx(loss.mean().item(), rel=1e-6)


def plain_names(module: torch.nn.Module) -> dict[str, Tensor]:
    """Its weights; only some versions of the libraries have the level."""
    return {name.removeprefix("text_model."): weight for name, weight in module.named_parameters()}
