"""`sfumato compare`: the checkpoints of a run side by side, with scores. Imports torch once the options are read."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.compare_options import find_run_options
from sfumato.cli.exits import run_guarded
from sfumato.cli.help import asks_for_help, command_help
from sfumato.config.base import Options, option
from sfumato.config.command import NO_TRIALS, read_command
from sfumato.config.load import load_command_config
from sfumato.config.prompt_options import MAX_STEPS
from sfumato.config.run_record import find_run_record
from sfumato.config.values import FilePath

COMPARISON_SKIPS = (  # rules
    "data-missing", "output-missing", "sample-prompts-unused", "sample-prompts-missing", "control-net-options-unused",
)  # fmt: skip
COMPARE_HIGHLIGHTS = (
    "config_file", "pretrained_model_name_or_path", "train_data_dir", "dataset_config", "sample_sampler",
    "sample_batch_size", "mixed_precision",
)  # fmt: skip


class CompareOptions(Options):
    """Makes the same images with every saved checkpoint of a run and with the model before training, side by side in
    one page, NAME.compare.html. With --image_encoder it measures how much each has learned, forgotten and memorized,
    and names the one to take. The options of the run are known on the machine that trained it; any of them may be
    given again.
    """

    run_folder: FilePath = option(None, "the run's --output_dir", positional=True, required=True)
    name: str | None = option(None, "the run's --output_name, where the folder holds several runs")
    image_encoder: str | None = option(None, "CLIP or DINOv2: a folder of transformers, or a name on the hub")
    prompts: FilePath | None = option(None, "file of prompts; default: those of the run's samples, else its captions")
    neutral_prompts: FilePath | None = option(
        None, "file of prompts that have nothing to do with the images; default: the captions of regularization images"
    )
    images_per_prompt: int = option(2, "images of each prompt, with a seed each", ge=1, le=1000)
    first_seed: int = option(1, "seed of the first of them", ge=0, lt=2**32)
    steps: int | None = option(None, "sampling steps, of prompts that do not say them", ge=1, le=MAX_STEPS)
    scale: float | None = option(None, "classifier-free guidance, the same")
    held_out: FilePath | None = option(None, "folder of further images of the concept, which were not trained on")
    max_checkpoints: int = option(12, "at most so many, evenly over the steps", ge=1)


def main(argv: Sequence[str]) -> int:
    """Run `sfumato compare`."""
    if asks_for_help(argv):
        print(command_help("sfumato compare", CompareOptions, highlights=COMPARE_HIGHLIGHTS), end="")
        return 0
    line = read_command(argv, CompareOptions, absent=NO_TRIALS)
    if line.problems.found:
        line.raise_faults()
    options = line.options(CompareOptions)
    from sfumato.data.find.index import get_default_cache_dir
    from sfumato.track.report import find_run_name

    folder = options.run_folder
    name = find_run_name(folder, options.name)
    defaults, notes = find_run_options(line, find_run_record(get_default_cache_dir(), folder, name), folder, name)
    config = load_command_config(line, defaults=defaults, skip_rules=COMPARISON_SKIPS)

    def run() -> None:
        import torch

        from sfumato.tools.compare.compare import compare_run
        from sfumato.tools.compare.encoder import load_image_encoder
        from sfumato.tools.compare.setup import Wanted, plan_comparison

        values = {field: vars(options)[field] for field in Wanted.__dataclass_fields__ if field in vars(options)}
        request = plan_comparison(config, folder, name, Wanted(**values, notes=notes))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder = load_image_encoder(options.image_encoder, device) if options.image_encoder else None
        comparison = compare_run(request, encoder)
        print("\n".join([*comparison.format_lines(), f"{request.page}"]))

    return run_guarded(run, debug=config.log.debug)
