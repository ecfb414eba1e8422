"""Compares the checkpoints of a run: makes the images, measures them, chooses, and writes the page."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.common import files
from sfumato.config import Config
from sfumato.config.prompts import Prompt
from sfumato.tools.compare.checkpoints import SavedCheckpoint
from sfumato.tools.compare.choice import Judged, choose_checkpoint
from sfumato.tools.compare.data import RunData, load_folder, load_items
from sfumato.tools.compare.encoder import ImageEncoder
from sfumato.tools.compare.images import ComparedImages, ComparedPrompts
from sfumato.tools.compare.models import CheckpointModels
from sfumato.tools.compare.page import ClosestPair, ComparedCheckpoint, RunComparison, render_compare_page
from sfumato.tools.compare.scores import References, Scores, measure_pixel_change, measure_scores
from sfumato.tools.compare.validation import ValidationLosses
from sfumato.track.progress_task import ProgressTask

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """What is compared with what."""

    config: Config
    folder: Path  # of the run
    name: str  # of the run
    model: str  # what the base model is, for the page
    checkpoints: Sequence[SavedCheckpoint]
    data: RunData
    concept: Sequence[Prompt]
    neutral: Sequence[Prompt]
    seeds: Sequence[int]
    held_out: Path | None = None  # a folder of further images that were not trained on
    notes: Sequence[str] = ()

    @property
    def prompts(self) -> ComparedPrompts:
        samples = self.config.samples
        return ComparedPrompts(
            concept=self.concept,
            neutral=self.neutral,
            seeds=self.seeds,
            sampler=samples.sample_sampler,
            weighted=samples.prompt_weighting,
        )

    @property
    def image_folder(self) -> Path:
        return self.folder / f"{self.name}.compare"

    @property
    def page(self) -> Path:
        return self.folder / f"{self.name}.compare.html"


def compare_run(request: CompareRequest, encoder: ImageEncoder | None) -> RunComparison:
    """Make what is missing, measure, choose; writes NAME.compare.html and NAME.compare.json beside the images."""
    models = CheckpointModels(request.config, [dataset.settings.resolution for dataset in request.data.plan.datasets])
    base, *others = make_all_images(request, models)
    validation = ValidationLosses(request.config, request.folder, request.name, request.data.plan)
    losses = validation.measure(request.checkpoints, models)
    real = RealImages.load(request, encoder)
    measures = Measures(request, real, base, encoder)
    compared = [
        measures.measure_checkpoint(checkpoint, images, loss)
        for checkpoint, images, loss in zip(request.checkpoints, others, losses, strict=True)
    ]
    comparison = RunComparison(
        name=request.name,
        model=request.model,
        encoder=encoder.name if encoder else "",
        prompts=request.prompts,
        base=base,
        checkpoints=compared,
        choice=choose_checkpoint([each.judged for each in compared]),
        notes=[*request.notes, *real.notes],
        image_folder=request.image_folder.name,
        counts={"training": len(real.training), "held out": len(real.held_out)},
    )
    files.write_text(request.page, render_compare_page(comparison))
    files.write_text(request.page.with_suffix(".json"), json.dumps(to_plain(comparison), indent=1))
    return comparison


class Measures:
    """What images of checkpoints are measured against. base: those of the model before training."""

    def __init__(
        self, request: CompareRequest, real: RealImages, base: Sequence[Image.Image], encoder: ImageEncoder | None
    ) -> None:
        self.request, self.real, self.base, self.encoder = request, real, base, encoder
        self.references = None if encoder is None else real.make_references(encoder, request, base)

    def measure_checkpoint(
        self, checkpoint: SavedCheckpoint, images: Sequence[Image.Image], loss: float
    ) -> ComparedCheckpoint:
        """loss: on held-out images, where it is known."""
        scores = closest = None
        if self.encoder is not None and self.references is not None:
            concept, neutral = split_vectors(self.encoder.encode(images), self.request)
            scores = measure_scores(concept, neutral, self.references)
            closest = self.real.find_closest_pair(scores, images)
        return ComparedCheckpoint(
            checkpoint=checkpoint,
            judged=Judged(name=checkpoint.path.name, step=checkpoint.step, scores=scores, validation_loss=loss),
            images=images,
            change=self.measure_change(images),
            closest=closest,
        )

    def measure_change(self, images: Sequence[Image.Image]) -> float:
        """The mean change of pixels in the images of neutral prompts; nan where there are none."""
        first = len(self.request.concept) * len(self.request.seeds)
        pairs = zip(images[first:], self.base[first:], strict=True)
        changes = [measure_pixel_change(*map(make_pixel_tensor, pair)) for pair in pairs]
        return sum(changes) / len(changes) if changes else math.nan


def make_all_images(request: CompareRequest, models: CheckpointModels) -> list[list[Image.Image]]:
    """Those of the model before training, then those of each checkpoint."""
    wanted = [
        (None, "base"),
        *((each.path, each.path.name.removesuffix(each.path.suffix)) for each in request.checkpoints),
    ]
    request.image_folder.mkdir(parents=True, exist_ok=True)
    each = len(request.prompts.list_seeded())
    with ProgressTask("comparing", "images", plain=request.config.log.console_log_simple) as progress:
        maker = ComparedImages(models, request.prompts, request.image_folder, progress, each * len(wanted))
        return [maker.make(path, name) for path, name in wanted]


def split_vectors(vectors: Tensor, request: CompareRequest) -> tuple[Tensor, Tensor]:
    """(N, D) in the order of the images -> (P, S, D) of the prompts about the concept, the same of the neutral ones."""
    seeds, width = len(request.seeds), vectors.shape[1]
    count = len(request.concept) * seeds
    return vectors[:count].reshape(-1, seeds, width), vectors[count:].reshape(-1, seeds, width)


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """The images that were trained on, and those that were not."""

    training: Sequence[Image.Image]
    names: Sequence[str]  # of the training images' files
    held_out: Sequence[Image.Image]
    notes: Sequence[str]

    @classmethod
    def load(cls, request: CompareRequest, encoder: ImageEncoder | None) -> RealImages:
        """Without an encoder none are read."""
        if encoder is None:
            missing = "No --image_encoder: likeness to the images, copies and drift were not measured. "
            advice = "--image_encoder facebook/dinov2-base downloads one; a folder with CLIP or DINOv2 does without."
            return cls(training=(), names=(), held_out=(), notes=[missing + advice])
        training, names = load_items(request.data.training)
        held_out, _ = load_items(request.data.held_out)
        held_out += load_folder(request.held_out) if request.held_out else []
        notes: list[str] = []
        if not training:
            notes.append("There are no training images: likeness to them and copies were not measured.")
        elif not held_out:
            missing = "No image was held out (--validation_split, or --held_out FOLDER): "
            notes.append(f"{missing}likeness is that to the training images.")
        return cls(training=training, names=names, held_out=held_out, notes=notes)

    def make_references(
        self, encoder: ImageEncoder, request: CompareRequest, base: Sequence[Image.Image]
    ) -> References:
        concept, neutral = split_vectors(encoder.encode(base), request)
        nothing = concept.new_zeros(0, concept.shape[-1])
        return References(
            training=encoder.encode(self.training) if self.training else nothing,
            held_out=encoder.encode(self.held_out) if self.held_out else nothing,
            base=concept,
            base_neutral=neutral,
        )

    def find_closest_pair(self, scores: Scores, images: Sequence[Image.Image]) -> ClosestPair | None:
        """The image that is nearest to a training image, with that one."""
        if not self.training:
            return None
        index = int(scores.nearest.argmin())
        nearest = int(scores.nearest_index[index])
        return ClosestPair(
            made=images[index],
            training=self.training[nearest],
            file=self.names[nearest],
            distance=float(scores.nearest[index]),
        )


def make_pixel_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def to_plain(comparison: RunComparison) -> dict[str, Any]:
    """The numbers of the page, and the choice."""
    taken = comparison.chosen
    return {
        "name": comparison.name,
        "encoder": comparison.encoder,
        "take": None if taken is None else taken.checkpoint.path.name,
        "why": list(comparison.choice.reasons),
        "checkpoints": [
            {"file": each.checkpoint.path.name, "step": each.checkpoint.step, **each.list_numbers()}
            for each in comparison.checkpoints
        ],
        "notes": list(comparison.notes),
    }
