"""`sfumato dataset caption`: captions of images by a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from sfumato.cli.dataset_tag import CAPTION_ALIASES
from sfumato.cli.options_command import run_with_options
from sfumato.common.text import plural
from sfumato.config.base import Options, option
from sfumato.config.values import Extension, FilePath, MachineShard, ModelPath

if TYPE_CHECKING:
    from sfumato.tools.captioner import Wording


class CaptioningOptions(Options):
    """Writes a caption beside each image, by any model of transformers that describes images (BLIP, GIT, Florence-2,
    Qwen-VL, LLaVA and JoyCaption among them), which is downloaded once.
    """

    train_data_dir: FilePath = option(None, "the folder of images", positional=True, required=True)
    model: ModelPath = option(None, "the model: a folder, or OWNER/NAME on the hub", required=True)
    prompt: str = option(
        "", "what the model is asked; {caption}, {folder} and {name} stand for what the image has already"
    )
    caption_extension: Extension = option(".txt", "extension of the files that are written")
    output_path: FilePath | None = option(None, "one .json or .jsonl file for all captions, instead of one per image")
    skip_existing: bool = option(False, "leave images alone that have a caption, so that an interrupted run goes on")
    recursive: bool = option(False, "caption the images of subfolders, too")
    shard: MachineShard | None = option(
        None, "caption the I-th of N parts of the images, for several machines; the names say which"
    )
    batch_size: int = option(1, "images at once", ge=1)
    max_data_loader_n_workers: int | None = option(None, "threads that decode images; 4 by default", ge=0)
    precision: Literal["fp32", "fp16", "bf16"] | None = option(
        None, "in which the model computes; bf16 on a GPU, fp32 without one by default"
    )
    max_length: int = option(300, "tokens of a caption at most", ge=1)
    min_length: int = option(0, "tokens of a caption at least", ge=0)
    num_beams: int = option(1, "search the best caption with so many beams", ge=1)
    top_p: float | None = option(None, "choose words by chance among the likeliest of this probability", gt=0, le=1)
    seed: int = option(42, "seed of that choice")
    remove_words: bool = option(False, "remove phrases about words that are read in the image")
    debug: bool = option(False, "print each caption")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato dataset caption`."""
    return run_with_options("sfumato dataset caption", argv, CaptioningOptions, run_captioning, aliases=CAPTION_ALIASES)


def run_captioning(options: CaptioningOptions, *, named_by: str = "model") -> int:
    """Caption the images; gives the exit code. named_by: the option that gave the model."""
    import torch

    from sfumato.parallel.start import choose_device
    from sfumato.tools.caption_images import CaptionRun
    from sfumato.tools.caption_output import DEFAULT_WORKERS, FilesBeside, MetadataFile
    from sfumato.tools.captioner import load_captioner
    from sfumato.tools.image_batches import list_image_paths

    images = list_image_paths(options.train_data_dir, recursive=options.recursive, shard=options.shard)
    device = choose_device()
    precision = options.precision or ("fp32" if device.type == "cpu" else "bf16")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    beside = FilesBeside(extension=options.caption_extension)
    run = CaptionRun(
        captioner=load_captioner(options.model, make_wording(options), named_by, dtype=dtype, device=device),
        output=MetadataFile(path=options.output_path, name="caption") if options.output_path else beside,
        prompt=options.prompt,
        remove_words=options.remove_words,
        skip_existing=options.skip_existing,
        verbose=options.debug,
    )
    workers = options.max_data_loader_n_workers or DEFAULT_WORKERS
    bad = run.caption(images, batch_size=options.batch_size, workers=workers)
    skipped = f", {bad:,} could not be read" if bad else ""
    sys.stdout.write(f"{len(images) - bad:,} of {plural(len(images), 'image has', 'images have')} a caption{skipped}\n")
    return 0


def make_wording(options: CaptioningOptions) -> Wording:
    from sfumato.tools.captioner import Wording

    return Wording(
        max_tokens=options.max_length,
        min_tokens=options.min_length,
        num_beams=options.num_beams,
        top_p=options.top_p,
        seed=options.seed,
    )
