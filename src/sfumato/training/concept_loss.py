"""The loss of concept training: LECO (Gandikota et al. 2023, "Erasing Concepts", eq. 7) and sliders, without images.

Noise is denoised by some steps with the adapter, towards the target prompt. There the model before training predicts
for three prompts, and with the adapter the prediction for the target prompt is to become
neutral -+ guidance_scale * (positive - unconditional). It is the same for noise, v and the velocity of flows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.config import LecoOptions
from sfumato.config.concepts import Concept
from sfumato.data.batch import Batch, RandomDraws, Tensors
from sfumato.diffusion.objective import per_sample
from sfumato.loss import LossContext, make_conditioning
from sfumato.sampling.denoise import DenoiseRequest, Guidance, denoise_steps
from sfumato.sampling.schedulers import make_scheduler

SAMPLER = "ddim"  # deterministic: the latents are a function of their noise; flows use Euler steps


@dataclass(frozen=True, kw_only=True)
class ConceptGoal:
    """In the place of noised images."""

    steps: int  # from noise to an image
    guidance_scale: float  # of these steps

    def draw(self, context: LossContext, batch: Batch, x0: Tensor) -> RandomDraws:
        """The noise that each sample starts from, and the time at which it is trained."""
        scheduler = make_scheduler(SAMPLER, context.model.objective)
        context.model.objective.set_timesteps(scheduler, self.steps, context.model.latents, x0.shape)
        numbers = self.draw_numbers(context, batch)
        noise = context.randomness.per_sample("noise", batch.ids, lambda draw, i: context.recipe.noise(draw, x0[i]))
        return RandomDraws(t=scheduler.timesteps.cpu().float()[numbers], noise=noise)

    def draw_numbers(self, context: LossContext, batch: Batch) -> Tensor:
        """(B,) how many steps each sample is denoised by, from 1 to all but one."""
        u = context.recipe.draw_quantiles(context.randomness, batch.ids)
        return 1 + (u * (self.steps - 1)).long().clamp(max=self.steps - 2)

    def measure(
        self, context: LossContext, batch: Batch, x0: Tensor, t: Tensor, noise: Tensor, input_noise: Tensor
    ) -> Tensor:
        """(B,) the loss of each sample before weighting."""
        model, method = context.model, context.method
        method.set_batch(model, batch.extras)
        with torch.no_grad():
            noisy = self.denoise(context, batch, noise)
            wanted = predict_target(context, batch, noisy, t)
        torch.clear_autocast_cache()  # it would give the trained weights, cast above, without their gradients
        prediction = method.predict(model, noisy, t, make_conditioning(context, batch), batch.extras).to(x0.dtype)
        level = model.objective.level(t)
        estimate = model.objective.estimate(prediction, noisy, level)
        loss = context.recipe.loss(estimate, model.objective.estimate(wanted, noisy, level), level)
        return loss.flatten(1).mean(1)

    def denoise(self, context: LossContext, batch: Batch, noise: Tensor) -> Tensor:
        """(B, C, h, w), each sample after its own number of steps."""
        request = DenoiseRequest(
            noise=noise,
            text=make_conditioning(context, batch),
            scheduler=make_scheduler(SAMPLER, context.model.objective),
            steps=self.steps,
            generators=[],
            extras=batch.extras,
        )
        unconditional = condition_on(context, batch, [concept.unconditional for concept in list_concepts(batch)])
        guidance = Guidance(negative=unconditional, scale=self.guidance_scale)
        numbers = self.draw_numbers(context, batch).tolist()
        noisy = noise.clone()
        for number, step in enumerate(denoise_steps(context.model, context.method, request, guidance), 1):
            for i in range(len(numbers)):
                if numbers[i] == number:
                    noisy[i] = step.latents[i]
            if number == max(numbers):
                break
        return noisy


def make_concept_goal(options: LecoOptions) -> ConceptGoal | None:
    """None where the run has images."""
    if options.prompts_file is None:
        return None
    return ConceptGoal(steps=options.max_denoising_steps, guidance_scale=options.leco_denoise_guidance_scale)


def predict_target(context: LossContext, batch: Batch, noisy: Tensor, t: Tensor) -> Tensor:
    """(B, C, h, w) what the prediction for the target prompts is to become; of the model before training."""
    concepts, found = list_concepts(batch), dict[tuple[str, ...], Tensor]()

    def predict(prompts: Sequence[str]) -> Tensor:
        """Equal prompts, e.g. neutral and unconditional ones, are predicted once."""
        key = tuple(prompts)
        if key not in found:
            conditioning = condition_on(context, batch, prompts)
            found[key] = context.method.predict(context.model, noisy, t, conditioning, batch.extras).to(noisy.dtype)
        return found[key]

    with context.method.disabled():
        positive = predict([concept.positive for concept in concepts])
        unconditional = predict([concept.unconditional for concept in concepts])
        neutral = predict([concept.neutral for concept in concepts])
    directions = torch.tensor([concept.direction for concept in concepts])
    return neutral + per_sample(directions, noisy) * (positive - unconditional)


def condition_on(context: LossContext, batch: Batch, prompts: Sequence[str]) -> Tensors:
    """The denoiser's text arguments for other prompts than the batch's captions."""
    return make_conditioning(context, replace(batch, captions=prompts, text={}))


def list_concepts(batch: Batch) -> Sequence[Concept]:
    assert batch.concepts is not None, "the data is not that of concepts"
    return batch.concepts
