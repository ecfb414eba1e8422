"""How often each timestep is trained and how much its loss counts, from what training calls, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sfumato.data.buckets import Size
from sfumato.diffusion.objective import LatentSpec, Objective
from sfumato.diffusion.recipe import Recipe
from sfumato.track.drawing import ACCENT, FINE, GREY, HAIRLINE, INK, PALE, PAPER, curve, text, ticks

SAMPLES, BINS = 20_000, 50
LAST = 1000  # timesteps
WIDTH, HEIGHT = 960, 640
LEFT, RIGHT = 86, 48  # margins
PANELS = ((128, 336), (400, 568))  # top and bottom of each
TITLE, SUBTITLE, LABEL = 24, 15, 15  # sizes of type


@dataclass(frozen=True, kw_only=True)
class Course:
    """Over BINS equal spans of the time from 0 (clean) to 1000 (noise)."""

    often: Sequence[float]  # share of samples; 1 where all timesteps are alike
    counts: Sequence[float]  # factor on a squared error of what the network gives out


def course(recipe: Recipe, objective: Objective, latents: LatentSpec, buckets: Mapping[Size, int]) -> Course:
    """From the very functions that training calls; `buckets`: samples per size (width, height) of pictures."""
    total = sum(buckets.values())
    u = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    often = torch.zeros(BINS)
    for (width, height), samples in buckets.items():
        t = recipe.timestep(u, (latents.channels, height // latents.downscale, width // latents.downscale), latents)
        often += torch.histc(t, BINS, 0, LAST) * (BINS / SAMPLES * samples / total)
    middles = (torch.arange(BINS) + 0.5) * (LAST / BINS)
    return Course(often=often.tolist(), counts=weights(recipe, objective, middles).tolist())


def weights(recipe: Recipe, objective: Objective, t: Tensor) -> Tensor:
    """(B,) the weight of the loss at times t, times the square of how far the prediction moves what is compared."""
    level = objective.level(t)
    one = torch.ones(len(t), 1, 1, 1, dtype=torch.float64)
    slope = objective.estimate(one, 0 * one, level) - objective.estimate(0 * one, 0 * one, level)
    return recipe.weighting(level, objective) * slope.flatten() ** 2


def timestep_plot(found: Course, *, subtitle: str = "") -> Image.Image:
    """Bars of how often, and below them the curve of how much."""
    picture = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), PAPER)
    draw = ImageDraw.Draw(picture)
    text(draw, LEFT, 44, "Timesteps in training", TITLE, INK, anchor="ls")
    text(draw, LEFT, 70, subtitle, SUBTITLE, GREY, anchor="ls")
    upper, lower = (Panel(edges=PANELS[i], top=ceiling(values)) for i, values in enumerate((found.often, found.counts)))
    upper.scale(draw, "how often each is drawn, where 1 is as often as any")
    for i, value in enumerate(found.often):
        place = (upper.x(i) + FINE, upper.y(value), upper.x(i + 1) - FINE, upper.y(0))
        draw.rectangle(place, fill=PALE)
        draw.rectangle((*place[:3], place[1] + 2 * FINE), fill=ACCENT)
    highest = max(found.counts)
    beyond = f"; it goes on to {highest:.3g}" if highest > lower.top else ""
    lower.scale(draw, f"how much a squared error of the prediction counts there{beyond}")
    curve(draw, [(lower.x(i + 0.5), lower.y(value)) for i, value in enumerate(found.counts)], ACCENT, width=3)
    for t in range(0, LAST + 1, 100):
        x = LEFT + t / LAST * (WIDTH - LEFT - RIGHT)
        text(draw, x, PANELS[1][1] + 12, str(t), LABEL, GREY, anchor="mt")
    text(draw, LEFT, HEIGHT - 18, "clean", LABEL, INK, anchor="ls")
    text(draw, WIDTH - RIGHT, HEIGHT - 18, "noise", LABEL, INK, anchor="rs")
    text(draw, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 18, "timestep", LABEL, INK, anchor="ms")
    return picture.reduce(FINE)


def ceiling(values: Sequence[float]) -> float:
    """Top of a scale: above all values but the few that leave the others without any height."""
    ordered = sorted(values)
    usual = ordered[round(0.9 * (len(ordered) - 1))]
    return (ordered[-1] if ordered[-1] <= 4 * usual else 2 * usual) * 1.08 or 1.0


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A part of the picture with a scale of its own, from 0 up to `top`."""

    edges: tuple[int, int]  # top and bottom in the reduced picture
    top: float

    def x(self, place: float) -> float:
        """Of a place counted in bins."""
        return FINE * (LEFT + place / BINS * (WIDTH - LEFT - RIGHT))

    def y(self, value: float) -> float:
        high, low = self.edges
        return FINE * (low - min(value / self.top, 1.0) * (low - high))

    def scale(self, draw: ImageDraw.ImageDraw, name: str) -> None:
        text(draw, LEFT, self.edges[0] - 16, name, LABEL, INK, anchor="ls")
        for value in ticks(self.top, most=6):
            line = (self.x(0), self.y(value), self.x(BINS), self.y(value))
            draw.line(line, fill=HAIRLINE if value else GREY, width=FINE)
            text(draw, LEFT - 12, self.y(value) / FINE, f"{value:.3g}", LABEL, GREY, anchor="rm")
