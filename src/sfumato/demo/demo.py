"""`sfumato demo`: teach a small model a subject it has never seen, and show its images before and after."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sfumato.common import files
from sfumato.common.text import plural
from sfumato.config import load_config
from sfumato.demo.base import ASSETS, Base, tiny_base
from sfumato.demo.plot import draw_loss_plot
from sfumato.demo.sheet import SheetRow, draw_sheet

if TYPE_CHECKING:
    from sfumato.demo.classifier import Classifier

SUBJECT = "robot"
LESSON_FOLDER = ASSETS / "lesson" / "new"  # ten images of it
REG_FOLDER = (
    ASSETS / "lesson" / "known"
)  # one image of each thing that the model knows, so that it does not forget them
SEED = 42
PROMPTS = (  # the training images show it neither on green nor on purple
    "a robot on a green background",
    "a robot on a purple background",
    "blue background, robot",
)
SUBJECTS: dict[str, str] = dict.fromkeys(PROMPTS, SUBJECT)  # prompt -> what its images should show
OTHER_SUBJECTS = {"a cat on a pink background": "cat", "yellow background with a house": "house"}
SEEDS = (1, 2, 3)
MIN_ACCURACY, MAX_ACCURACY_BEFORE = 0.7, 0.2  # of the subject, after and before
MIN_OTHERS_KEPT = 0.6  # share of the other subjects' accuracy that training must keep


@dataclass(frozen=True, kw_only=True)
class DemoImages:
    """One state of the model: its images of each prompt, and what the classifier sees in each."""

    images: Mapping[str, Sequence[Image.Image]]
    predictions: Mapping[str, Sequence[str]]

    def accuracy(self, subjects: Mapping[str, str]) -> float:
        """The share of the images that show the subject of their prompt, 0 to 1."""
        hits, total = 0, 0
        for prompt, subject in subjects.items():
            hits += self.predictions[prompt].count(subject)
            total += len(self.predictions[prompt])
        return hits / total


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The files of the demo, and how often the classifier recognizes the subjects."""

    lora: Path
    plot: Path
    sheet: Path
    before: float  # share of the images in which the subject is recognized
    after: float
    others_before: float  # share of the images of other subjects in which these are recognized
    others_after: float

    @property
    def learned(self) -> bool:
        kept = self.others_after >= MIN_OTHERS_KEPT * self.others_before
        return self.after >= MIN_ACCURACY and self.before <= MAX_ACCURACY_BEFORE and kept


def run_demo(output: Path, *, options: Mapping[str, str] | None = None, base: Base | None = None) -> DemoResult:
    """Train as a user would, make images before and after, classify them. `options` take precedence over the base's."""
    from sfumato.demo.classifier import load_classifier
    from sfumato.train import train

    base = base or tiny_base()
    line = make_command_line(base, output, options or {})
    count = count_lesson_images()
    print(
        f"Teaching {base.title} what a {SUBJECT} is, from {plural(count, 'image')} in {LESSON_FOLDER}. The command:\n"
    )
    print(f"sfumato train {shlex.join(line)}\n", flush=True)
    train(load_config(line))

    print("\nMaking images without and with the LoRA.", flush=True)
    lora = output / f"{SUBJECT}.safetensors"
    classifier = load_classifier()
    before, after = make_images(base, None, classifier), make_images(base, lora, classifier)
    losses = read_losses(output / f"{SUBJECT}.run.jsonl")
    result = DemoResult(
        lora=lora,
        plot=output / "loss.png",
        sheet=output / "before_and_after.png",
        before=before.accuracy(SUBJECTS),
        after=after.accuracy(SUBJECTS),
        others_before=before.accuracy(OTHER_SUBJECTS),
        others_after=after.accuracy(OTHER_SUBJECTS),
    )
    facts = f"{base.title}, LoRA, {len(losses)} steps on {plural(count, 'image')} of a {SUBJECT}"
    save_png(result.plot, draw_loss_plot(losses, title="Training loss", subtitle=facts))
    rows = [make_sheet_row(prompt, subject, before, after) for prompt, subject in (SUBJECTS | OTHER_SUBJECTS).items()]
    subtitle = f"{facts}; seeds {', '.join(map(str, SEEDS))}"
    save_png(result.sheet, draw_sheet(rows, ["before", "after"], title="Before and after", subtitle=subtitle))
    return result


def make_command_line(base: Base, output: Path, options: Mapping[str, str]) -> list[str]:
    """The options of `sfumato train` that a user would give."""
    values = {
        **base.model,
        "train_data_dir": str(LESSON_FOLDER),
        "reg_data_dir": str(REG_FOLDER),
        "caption_extension": ".txt",
        "resolution": str(base.size),
        "network_module": "networks.lora",
        **base.training,
        "seed": str(SEED),
        "output_dir": str(output),
        "output_name": SUBJECT,
        "cache_latents": True,
        **options,
    }
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]


def make_images(base: Base, lora: Path | None, classifier: Classifier) -> DemoImages:
    """Every prompt with every seed, from a freshly loaded model."""
    from sfumato.demo.pipeline import load_pipeline

    pipeline = load_pipeline(base, adapter=lora)
    images: dict[str, list[Image.Image]] = {}
    predictions: dict[str, list[str]] = {}
    for prompt in (*SUBJECTS, *OTHER_SUBJECTS):
        images[prompt] = [pipeline.generate(prompt, seed) for seed in SEEDS]
        predictions[prompt] = [prediction.name for prediction in classifier(images[prompt])]
    return DemoImages(images=images, predictions=predictions)


def make_sheet_row(prompt: str, subject: str, before: DemoImages, after: DemoImages) -> SheetRow:
    """A prompt's images before and after, and in how many of them the subject is recognized."""
    count, count_after = (state.predictions[prompt].count(subject) for state in (before, after))
    note = f"{subject} recognized: {count} of {len(SEEDS)} before, {count_after} after"
    return SheetRow(prompt=prompt, note=note, states=[before.images[prompt], after.images[prompt]])


def count_lesson_images() -> int:
    return len(list(LESSON_FOLDER.rglob("*.png")))


def read_losses(path: Path) -> list[float]:
    """The loss of every step."""
    return [json.loads(line)["loss/current"] for line in path.read_text(encoding="utf-8").splitlines()]


def save_png(path: Path, image: Image.Image) -> None:
    with files.write_atomically(path) as temporary:
        image.save(temporary, "PNG", optimize=True)
