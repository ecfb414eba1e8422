"""What `sfumato generate` is asked for, and the model and adapters that it makes images with."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sfumato.config import Config
from sfumato.errors import Problems
from sfumato.families.base import Family
from sfumato.families.control_net_files import add_control_net
from sfumato.families.detection import describe_model
from sfumato.families.model_options import check_sampler
from sfumato.formats.header import read_header
from sfumato.memory.low_precision import choose_formats
from sfumato.memory.precision import MIXED_PRECISION
from sfumato.methods.inference_adapters import InferenceAdapters

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """With what images are made, and where they go."""

    config: Config
    networks: Sequence[tuple[Path, float]]  # adapter files and their multipliers
    outdir: Path
    embeddings: Sequence[tuple[Path, str]] = ()  # files of textual inversion, and the word of each where it was given
    control_nets: Sequence[str] = ()  # ControlNets beside that of the base model's options
    lllite: Sequence[Path] = ()  # files of ControlNet-LLLite
    merged: int = 0  # how many of the first of them are added to the model's weights
    calculates_weights: bool = False  # whether the others are, too, before each batch
    shows_metadata: bool = False  # of the adapter files
    notes: Sequence[str] = ()  # options without effect
    float32_parts: Sequence[str] = ()  # kept in float32 whatever --mixed_precision says, as in training
    default_steps: int | None = None  # of prompts without, on models that are not distilled; None: the family's
    vae_tile_size: int = 0  # pixels a side of tiles of the autoencoder; 0: whole images
    has_sheet: bool = False  # a contact sheet of all images is written
    progress_file: Path | None = None  # where an image is written while it is made
    sequential_names: bool = False  # im_000001.png and so on
    original_names: bool = False  # the names of the images that they start from


def load_requested_model(request: GenerateRequest) -> Family:
    """The model, in the dtypes of training."""
    config, problems = request.config, Problems()
    family, blueprint = describe_model(config)
    given = config.model.controlnet_model_name_or_path
    for number, path in enumerate((*([given] if given else []), *request.control_nets)):
        options = config.model.model_copy(update={"controlnet_model_name_or_path": path})
        blueprint = add_control_net(family, blueprint, options, seed=0, number=number)
    check_sampler(config, blueprint.objective)
    for note in (*blueprint.notes, *blueprint.declared):
        log.info("note: %s", note)
    for name in (name for name in request.float32_parts if name not in blueprint.networks):
        problems.add(
            f"--float32_parts: this model has no part {name}",
            code="float32-part-unknown",
            fix=f"one of {', '.join(blueprint.networks)}",
        )
    problems.raise_all()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blueprint = blueprint.with_dtype(request.float32_parts, torch.float32)
    dtype = MIXED_PRECISION[config.memory.mixed_precision]
    model = family(blueprint, config.model, dtype=dtype, device=device)
    model.vae_tile_size = request.vae_tile_size
    choose_formats(model, config.memory, trained=request.float32_parts)
    return model


def make_adapters(request: GenerateRequest, model: Family) -> InferenceAdapters:
    """The adapter files of the request on top of those of --base_weights, whose missing multipliers are 1."""
    network = request.config.network
    multipliers = (*network.base_weights_multiplier, *[1.0] * len(network.base_weights))
    base = list(zip(network.base_weights, multipliers, strict=False))
    merged, attached = request.networks[: request.merged], request.networks[request.merged :]
    adapters = InferenceAdapters(
        model,
        attached,
        base=[*base, *merged],
        embeddings=request.embeddings,
        lllite=request.lllite,
        calculated=request.calculates_weights,
    )
    if request.shows_metadata:
        for path, _ in request.networks:
            log.info("%s: %s", path, json.dumps(read_header(path).metadata, indent=2, ensure_ascii=False))
    adapters.live_text |= set(request.float32_parts) & {*model.text_parts}
    return adapters
