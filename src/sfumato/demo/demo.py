"""`sfumato demo`: teach a small model a thing it has never seen, and show it before and after."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sfumato.common import files
from sfumato.config import load_config
from sfumato.demo.base import ASSETS, Base, tiny_base
from sfumato.demo.plot import loss_plot
from sfumato.demo.sheet import Row, sheet

if TYPE_CHECKING:
    from sfumato.demo.judge import Judge

SUBJECT = "robot"
LESSON = ASSETS / "lesson" / "new"  # ten pictures of it
KNOWN = ASSETS / "lesson" / "known"  # a picture of each thing that the model knows, so that it does not forget them
SEED = 42
PROMPTS = (  # no lesson shows it on green or purple
    "a robot on a green background",
    "a robot on a purple background",
    "blue background, robot",
)
OTHERS = {"a cat on a pink background": "cat", "yellow background with a house": "house"}  # prompt -> what it shows
SEEDS = (1, 2, 3)
LEARNED, SEEN_BEFORE, KEPT = 0.7, 0.2, 0.6  # shares of the pictures: at least, at most, at least


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """One state of the model: what it makes of each prompt, and what the judge sees in that."""

    drawn: Mapping[str, Sequence[Image.Image]]
    seen: Mapping[str, Sequence[str]]

    def share(self, wanted: Mapping[str, str]) -> float:
        """How many of the pictures show what their prompt asks for, 0 to 1."""
        hits = [name == what for prompt, what in wanted.items() for name in self.seen[prompt]]
        return sum(hits) / len(hits)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Where the demo's files are, and how the judge finds the subject."""

    lora: Path
    plot: Path
    sheet: Path
    before: float  # share of the pictures in which the subject is recognised
    after: float
    others_before: float  # share of the other pictures that show what they should
    others_after: float

    @property
    def learned(self) -> bool:
        kept = self.others_after >= KEPT * self.others_before
        return self.after >= LEARNED and self.before <= SEEN_BEFORE and kept


def main(argv: Sequence[str]) -> int:
    """Exit code 1 where the judge does not find that the subject was learned."""
    parser = argparse.ArgumentParser(
        prog="sfumato demo",
        description="Teaches a small model a thing it has never seen by a LoRA, and shows before and after.",
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("demo"), help="where everything goes [default: demo]")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the training [default: {SEED}]")
    asked = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)  # a network this small is slower with more, and many times slower on a busy machine
    result = demo(asked.output_dir, options={"seed": str(asked.seed)})
    shares = f"{result.before:.0%} of its pictures before, {result.after:.0%} after"
    print(f"\nA small classifier sees a {SUBJECT} in {shares}.")
    shares = f"{result.others_before:.0%} show what they should before, {result.others_after:.0%} after"
    print(f"Of the other pictures {shares}.")
    print(f"  the LoRA          {result.lora}")
    print(f"  its loss          {result.plot}")
    print(f"  before and after  {result.sheet}")
    return 0 if result.learned else 1


def demo(output: Path, *, options: Mapping[str, str] | None = None, base: Base | None = None) -> Result:
    """Train on the lesson as a user would, draw, judge. `options` go before the base's own."""
    from sfumato.demo.judge import load_judge
    from sfumato.train import train

    base = base or tiny_base()
    line = command_line(base, output, options or {})
    print(f"Teaching {base.title} what a {SUBJECT} is, from {lessons()} pictures in {LESSON}; by hand:\n")
    print(f"sfumato train {shlex.join(line)}\n", flush=True)
    train(load_config(line))

    print("\nMaking pictures without and with the LoRA.", flush=True)
    lora = output / f"{SUBJECT}.safetensors"
    judge = load_judge()
    before, after = pictures(base, None, judge), pictures(base, lora, judge)
    losses = read_losses(output / f"{SUBJECT}.run.jsonl")
    subjects: dict[str, str] = dict.fromkeys(PROMPTS, SUBJECT)
    result = Result(
        lora=lora,
        plot=output / "loss.png",
        sheet=output / "before_and_after.png",
        before=before.share(subjects),
        after=after.share(subjects),
        others_before=before.share(OTHERS),
        others_after=after.share(OTHERS),
    )
    facts = f"{base.title}, LoRA, {len(losses)} steps on {lessons()} pictures of a {SUBJECT}"
    save(result.plot, loss_plot(losses, title="Training loss", subtitle=facts))
    rows = [row(prompt, what, before, after) for prompt, what in (subjects | OTHERS).items()]
    seeds = f"seeds {', '.join(map(str, SEEDS))}"
    save(result.sheet, sheet(rows, ["before", "after"], title="Before and after", subtitle=f"{facts}; {seeds}"))
    return result


def command_line(base: Base, output: Path, options: Mapping[str, str]) -> list[str]:
    """What a user would give to `sfumato train`."""
    values = {
        **base.model,
        "train_data_dir": str(LESSON),
        "reg_data_dir": str(KNOWN),
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


def pictures(base: Base, lora: Path | None, judge: Judge) -> Pictures:
    """Every prompt with every seed, from a freshly loaded model."""
    from sfumato.demo.artist import hire

    artist = hire(base, adapter=lora)
    drawn = {prompt: [artist.draw(prompt, seed) for seed in SEEDS] for prompt in (*PROMPTS, *OTHERS)}
    seen = {prompt: [verdict.name for verdict in judge(made)] for prompt, made in drawn.items()}
    return Pictures(drawn=drawn, seen=seen)


def row(prompt: str, what: str, before: Pictures, after: Pictures) -> Row:
    counts = [sum(name == what for name in each.seen[prompt]) for each in (before, after)]
    note = f"{what} recognised: {counts[0]} of {len(SEEDS)} before, {counts[1]} after"
    return Row(prompt=prompt, note=note, states=[before.drawn[prompt], after.drawn[prompt]])


def lessons() -> int:
    return len(list(LESSON.rglob("*.png")))


def read_losses(path: Path) -> list[float]:
    """The loss of every step."""
    return [json.loads(line)["loss/current"] for line in path.read_text(encoding="utf-8").splitlines()]


def save(path: Path, picture: Image.Image) -> None:
    with files.atomic(path) as temporary:
        picture.save(temporary, "PNG", optimize=True)
