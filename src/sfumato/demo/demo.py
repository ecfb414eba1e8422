"""`sfumato demo`: from nothing to a trained LoRA, its loss as a curve, and pictures before and after."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sfumato import files
from sfumato.config import Config, load_config
from sfumato.demo.photos import example_photos
from sfumato.demo.plot import loss_plot
from sfumato.demo.sheet import Row, sheet

if TYPE_CHECKING:
    from sfumato.demo.base import Base

NAME = "chelsea"  # of the LoRA
SEED = 42
PROMPTS = (
    "a photo of chelsea cat, tabby, close-up of the face, green eyes, whiskers",
    "a photo of chelsea cat, tabby, pink nose, whiskers, portrait",
    "a photo of chelsea cat, green eyes, facing left",  # not a caption of any photo
)
WANTED = [(prompt, seed) for prompt in PROMPTS for seed in (1, 2)]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Where the demo's files are."""

    lora: Path
    plot: Path
    sheet: Path


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sfumato demo",
        description="Trains a LoRA on a small model, from nothing, and shows what it learned.",
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("demo"), help="where everything goes [default: demo]")
    output = parser.parse_args(argv).output_dir
    import torch

    torch.set_num_threads(1)  # a network this small is slower with more, and many times slower on a busy machine
    result = demo(output)
    print("\nDone:")
    print(f"  the LoRA          {result.lora}")
    print(f"  its loss          {result.plot}")
    print(f"  before and after  {result.sheet}")
    return 0


def demo(output: Path, *, options: Mapping[str, str] | None = None) -> Result:
    """Make the base model, train on the example photos as a user would, draw. `options` go before the base's own."""
    from sfumato.demo.base import make_base
    from sfumato.train import train

    print(f"Writing a toy base model into {output / 'base'}.")
    base = make_base(output / "base")
    line = command_line(base, output, options or {})
    print(f"Training on {example_photos()}; by hand:\n\nsfumato train {shlex.join(line)}\n", flush=True)
    config = load_config(line)
    train(config)

    print("\nMaking pictures without and with the LoRA.", flush=True)
    lora = output / f"{NAME}.safetensors"
    before = pictures(config, base)  # a new adapter changes nothing
    after = pictures(load_config([*line, f"--network_weights={lora}", "--dim_from_weights"]), base)
    losses = read_losses(output / f"{NAME}.run.jsonl")
    facts = f"{base.title}, LoRA of rank {config.network.network_dim}, {len(losses)} steps on {photos()} photos"
    result = Result(lora=lora, plot=output / "loss.png", sheet=output / "before_and_after.png")
    save(result.plot, loss_plot(losses, title="Training loss", subtitle=facts))
    asked = zip(WANTED, before, after, strict=True)
    rows = [Row(prompt=prompt, seed=seed, pictures=pair) for (prompt, seed), *pair in asked]
    save(result.sheet, sheet(rows, ["before", "after"], title="Before and after", subtitle=facts))
    return result


def command_line(base: Base, output: Path, options: Mapping[str, str]) -> list[str]:
    """What a user would give to `sfumato train`."""
    values = {
        **{name: str(path) for name, path in base.model.items()},
        "train_data_dir": str(example_photos()),
        "caption_extension": ".txt",
        "resolution": str(base.size),
        "network_module": "networks.lora",
        **base.training,
        "seed": str(SEED),
        "output_dir": str(output),
        "output_name": NAME,
        **options,
    }
    return [*(f"--{name}={value}" for name, value in values.items()), "--cache_latents"]


def pictures(config: Config, base: Base) -> list[Image.Image]:
    """Everything that is WANTED, from a freshly loaded model with the adapter that `config` asks for."""
    import torch

    from sfumato import plan
    from sfumato.sample import Picture, generate

    outlook = plan.look(config, processes=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = outlook.family.load(outlook.blueprint, config.model, dtype=torch.float32, device=device)
    outlook.method.prepare(model)
    outlook.method.modules.eval()

    def picture(prompt: str, seed: int) -> Image.Image:
        recipe = Picture(
            prompt=prompt,
            negative_prompt="",
            width=base.size,
            height=base.size,
            seed=seed,
            steps=base.steps,
            scale=base.scale,
            guidance=None,
            sampler=base.sampler,
        )
        pixels = (generate(model, outlook.method, recipe) + 1) * 127.5
        return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())

    return [picture(prompt, seed) for prompt, seed in WANTED]


def photos() -> int:
    return len(list(example_photos().rglob("*.jpg")))


def read_losses(path: Path) -> list[float]:
    """The loss of every step."""
    return [json.loads(line)["loss/current"] for line in path.read_text(encoding="utf-8").splitlines()]


def save(path: Path, picture: Image.Image) -> None:
    with files.atomic(path) as temporary:
        picture.save(temporary, "PNG", optimize=True)
