"""The requests of generated images, and the command that makes each of them alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from sfumato.common.text import plural
from sfumato.config.prompts import Prompt
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.sampling.request import ImageRequest, list_ignored, make_request
from sfumato.tools.generate_setup import GenerateRequest
from sfumato.training.comfyui_workflow import make_workflow
from sfumato.training.image_metadata import generate_command, image_metadata

log = logging.getLogger(__name__)


def make_image_requests(request: GenerateRequest, model: Family, prompts: Sequence[Prompt]) -> Iterator[ImageRequest]:
    """One per prompt, whose seed is set; what is ignored of it is reported."""
    samples = request.config.samples
    for prompt in prompts:
        assert prompt.seed is not None
        steps = None if model.sampling.is_distilled else request.default_steps
        image = make_request(
            prompt.apply_defaults({"sample_steps": steps}),
            model,
            sampler=samples.sample_sampler,
            seed=prompt.seed,
            weighted=samples.prompt_weighting,
        )
        image = limit_adapters(request, image)
        for line in (*prompt.notes, *list_ignored(prompt, image, model), *list_ignored_strengths(request, prompt)):
            log.warning("%s", line)
        yield image


def list_ignored_strengths(request: GenerateRequest, prompt: Prompt) -> Iterator[str]:
    """The prompt's multipliers that no adapter has, because there is none or because it is in the weights already."""
    count, given = len(request.networks) - request.merged, len(prompt.network_mul)
    if not given or given <= count:
        return
    why = (
        f"{request.merged} are merged with theirs"
        if request.merged
        else f"there are {plural(len(request.networks), 'adapter')}"
    )
    what = "--am has no effect" if count <= 0 else f"--am has {plural(given, 'value')} and {count} count"
    yield f"the prompt {prompt.prompt[:40]!r}: {what}, {why}"


def limit_adapters(request: GenerateRequest, image: ImageRequest) -> ImageRequest:
    """With the strengths of the adapters where each acts in its part alone; UserError where that cannot be."""
    attached = request.networks[request.merged :]
    if image.regions is None or not request.networks:
        return image
    if request.calculates_weights or request.merged or len(attached) > len(image.regions.parts):
        raise UserError(
            f"the prompt {image.prompt[:40]!r} has {plural(len(image.regions.parts), 'part')}, and "
            f"{len(request.networks)} "
            "adapters cannot act in one of them each",
            code="regional-adapters",
            fix="give at most one adapter for each part, without --network_merge and --network_pre_calc",
        )
    strengths = image.multipliers or tuple(strength for _, strength in attached)
    columns = [strengths[min(i, len(strengths) - 1)] for i in range(len(attached))]
    return replace(image, multipliers=tuple(columns))


def list_strengths(request: GenerateRequest, image: ImageRequest) -> list[float]:
    """Of every adapter, as it acts on this image: those that are merged keep theirs, whatever the prompt says."""
    merged, attached = request.networks[: request.merged], request.networks[request.merged :]
    own = image.multipliers
    strengths = [own[min(i, len(own) - 1)] if own else strength for i, (_, strength) in enumerate(attached)]
    return [*(strength for _, strength in merged), *strengths]


def make_texts(request: GenerateRequest, model: Family, image: ImageRequest) -> dict[str, str]:
    """The text in an image's file: its recipe, the command that makes it again, and ComfyUI's nearest workflow."""
    strengths = list_strengths(request, image)
    adapters = [(str(path), strength) for (path, _), strength in zip(request.networks, strengths, strict=True)]
    workflow = make_workflow(
        image, checkpoint=model.blueprint.source.name, adapters=adapters, channels=model.latents.channels
    )
    return {**image_metadata(image), "command": make_command(request, model, image), "workflow": workflow}


def make_command(request: GenerateRequest, model: Family, image: ImageRequest) -> str:
    """The command that makes one image alone."""
    options: dict[str, object] = {}
    if request.networks:
        options["network_weights"] = [path for path, _ in request.networks]
        multipliers = list_strengths(request, image)
        options["network_mul"] = multipliers if set(multipliers) != {1.0} else None
    if request.embeddings:
        options["textual_inversion_embeddings"] = [
            f"{path}={word}" if word else path for path, word in request.embeddings
        ]
    if request.merged:
        options["network_merge_n_models"] = request.merged
    options["network_pre_calc"] = request.calculates_weights or None
    if request.control_nets:
        options["control_net_models"] = list(request.control_nets)
    if request.lllite:
        options["control_net_lllite_models"] = list(request.lllite)
    options["vae_tile_size"] = request.vae_tile_size or None
    if request.float32_parts:
        options["float32_parts"] = list(request.float32_parts)
    return generate_command(request.config, replace(image, multipliers=()), model.sampling, options)
