"""`sfumato generate`: make images. Imports torch only once everything that was given is understood."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from sfumato.cli.exits import run_guarded
from sfumato.cli.help import asks_for_help, command_help
from sfumato.config.base import Metavar, Options, option
from sfumato.config.command import NO_TRIALS, read_command
from sfumato.config.load import load_command_config
from sfumato.config.prompts import MAX_IMAGE_SIDE, MAX_STEPS, Prompt, parse_line, read_prompts
from sfumato.config.values import FilePath, FilePaths, Floats, to_tuple
from sfumato.data.find.prompt_images import check_prompt_images
from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.config import Config

GENERATION_SKIPS = (  # rules
    "data-missing", "output-missing", "sample-prompts-unused", "sample-prompts-missing", "control-net-options-unused",
)  # fmt: skip
ALIASES = {"ckpt": "pretrained_model_name_or_path", "from_file": "sample_prompts", "sampler": "sample_sampler"}
HIGHLIGHTS = (
    "pretrained_model_name_or_path", "sample_prompts", "seed", "sample_sampler", "sample_batch_size", "mixed_precision",
)  # fmt: skip
EMBEDDING_SUFFIXES = (".safetensors", ".pt", ".bin")
Names = Annotated[tuple[str, ...], BeforeValidator(to_tuple), Metavar("NAME ...")]


class GenerateOptions(Options):
    """Makes images of prompts, with adapter files or without, each with its recipe and this command in its metadata. A
    prompt takes the options of a file's line: "a cat --n a dog --w 512 --h 768 --s 30 --d 1 --l 7 --ss euler_a". The
    options beside it are defaults. Of the options of `sfumato train`, those of the base model and the precision count,
    too.
    """

    prompt: str | None = option(None, "what to show, written like a line of a prompt file")
    plain_prompt: bool = option(False, "take --prompt as it stands, without options in it")
    negative_prompt: str | None = option(None, "what not to show")
    network_weights: FilePaths = option((), "adapter files, or folders of PEFT or diffusers")
    network_mul: Floats = option((), "their multipliers, in their order; 1 where missing")
    textual_inversion_embeddings: Names = option(
        (), "files of textual inversion, each perhaps with its word: FILE=WORD; default: the file's own, or its name"
    )
    outdir: FilePath = option(Path("outputs"), "folder for the images")
    W: int | None = option(None, "width", ge=1, le=MAX_IMAGE_SIDE)
    H: int | None = option(None, "height", ge=1, le=MAX_IMAGE_SIDE)
    steps: int | None = option(None, "sampling steps", ge=1, le=MAX_STEPS)
    scale: float | None = option(None, "classifier-free guidance; 1 for none")
    guidance: float | None = option(None, "embedded guidance, of models that have it")
    cfg_trunc_ratio: float | None = option(None, "classifier-free guidance only in this first share of the steps")
    renorm_cfg: float | None = option(
        None, "longest that a guided prediction may be, in lengths of the one for the prompt"
    )
    flow_shift: float | None = option(None, "shift of a flow model's timesteps towards noise", gt=0)
    reference_image: FilePath | None = option(None, "image that a model for edits starts from")
    float32_parts: Names = option((), "networks kept in float32, e.g. those that were trained as a whole")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato generate`."""
    if asks_for_help(argv):
        print(command_help("sfumato generate", GenerateOptions, highlights=HIGHLIGHTS, aliases=ALIASES), end="")
        return 0
    line = read_command(argv, GenerateOptions, aliases=ALIASES, absent=NO_TRIALS)
    config = load_command_config(line, skip_rules=GENERATION_SKIPS)
    options = line.options(GenerateOptions)
    prompts = make_prompts(options, config)
    networks = list_networks(options, config)
    from sfumato.tools.generate import generate_images
    from sfumato.tools.generate_setup import GenerateRequest

    request = GenerateRequest(
        config=config,
        prompts=prompts,
        networks=networks,
        embeddings=list_embeddings(options),
        outdir=options.outdir,
        float32_parts=options.float32_parts,
    )

    def run() -> None:
        generate_images(request)

    return run_guarded(run, debug=config.log.debug)


def make_prompts(options: GenerateOptions, config: Config) -> list[Prompt]:
    """The prompts; what one does not say the options beside it give."""
    text, path = options.prompt, config.samples.sample_prompts
    if text is not None and path is not None:
        raise UserError("--prompt and --from_file both give prompts", code="prompt-given-twice", fix="give one of them")
    if options.plain_prompt and text is None:
        raise UserError(
            "--plain_prompt is about --prompt, which is not given", code="plain-prompt-without-prompt", fix="remove it"
        )
    if text is not None:
        prompts = [Prompt(prompt=text) if options.plain_prompt else parse_line(text, where="--prompt")]
    else:
        prompts = read_prompts(path) if path else []
    if not prompts:
        raise UserError(
            "there is no prompt", code="prompt-missing", fix='give --prompt "a cat", or --from_file prompts.txt'
        )
    defaults = list_defaults(options)
    prompts = [prompt.apply_defaults(defaults) for prompt in prompts]
    check_prompt_images(prompts)
    return prompts


def list_defaults(options: GenerateOptions) -> dict[str, Any]:
    """Field of a prompt -> what the options say where the prompt does not."""
    values = {
        "negative_prompt": options.negative_prompt,
        "width": options.W,
        "height": options.H,
        "sample_steps": options.steps,
        "scale": options.scale,
        "guidance_scale": options.guidance,
        "cfg_trunc_ratio": options.cfg_trunc_ratio,
        "renorm_cfg": options.renorm_cfg,
        "flow_shift": options.flow_shift,
        "reference_image": options.reference_image and str(options.reference_image),
    }
    return {name: value for name, value in values.items() if value is not None}


def list_networks(options: GenerateOptions, config: Config) -> list[tuple[Path, float]]:
    """Adapter files with their multipliers; the configuration file may name one."""
    paths, multipliers = options.network_weights, options.network_mul
    if not paths and config.network.network_weights:
        paths = (config.network.network_weights,)
    if len(multipliers) > len(paths):
        raise UserError(
            f"--network_mul has {len(multipliers)} values for {len(paths)} files of --network_weights",
            code="network-multiplier-count",
            fix="give one value for each file, or fewer; missing ones are 1",
        )
    for path in paths:
        if not path.exists():
            raise UserError(f"--network_weights: {path} does not exist", code="network-weights-missing")
    return list(zip(paths, (*multipliers, *[1.0] * len(paths)), strict=False))


def list_embeddings(options: GenerateOptions) -> list[tuple[Path, str]]:
    """Files of textual inversion, each with its word or ""; a folder stands for the files in it."""
    found: list[tuple[Path, str]] = []
    for given in options.textual_inversion_embeddings:
        path, word = Path(given), ""
        if not path.exists():
            name, _, word = given.rpartition("=")
            path = Path(name)
        if not path.exists() or (path.is_dir() and word):
            raise UserError(
                f"--textual_inversion_embeddings: {given} is no file",
                code="embedding-file-missing",
                fix="give FILE or FILE=WORD",
            )
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found += [(file, word) for file in files if file.suffix in EMBEDDING_SUFFIXES or not path.is_dir()]
    return found
