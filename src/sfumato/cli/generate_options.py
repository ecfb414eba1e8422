"""The options of `sfumato generate`, with the names of sd-scripts' gen_img where it has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from sfumato.config.base import Metavar, Options, option
from sfumato.config.prompt_options import CLIP_VISION_MODEL, MAX_IMAGE_SIDE, MAX_STEPS, check_unsharp
from sfumato.config.values import FilePath, FilePaths, Floats, ModelPaths, Shares, to_tuple

UnsharpNumbers = Annotated[str, AfterValidator(check_unsharp), Metavar("N,X,X[,0]")]
Names = Annotated[tuple[str, ...], BeforeValidator(to_tuple), Metavar("NAME ...")]


class GenerateOptions(Options):
    """Makes images of prompts, with adapter files or without, each with its recipe and this command in its metadata. A
    prompt takes the options of a file's line: "a cat --n a dog --w 512 --h 768 --s 30 --d 1 --l 7 --ss euler_a". The
    options beside it are defaults. Of the options of `sfumato train`, those of the base model and the precision count,
    too.
    """

    prompt: str | None = option(None, "what to show, written like a line of a prompt file")
    plain_prompt: bool = option(False, "take --prompt as it stands, without options and variants in it")
    negative_prompt: str | None = option(None, "what not to show")
    network_weights: FilePaths = option((), "adapter files, or folders of PEFT or diffusers")
    network_mul: Floats = option((), "their multipliers, in their order; 1 where missing")
    textual_inversion_embeddings: Names = option(
        (), "files of textual inversion, each perhaps with its word: FILE=WORD; default: the file's own, or its name"
    )
    network_merge: bool = option(False, "add the adapters to the model's weights, instead of computing them beside it")
    network_merge_n_models: int | None = option(None, "the same for the first N of them", ge=1)
    network_pre_calc: bool = option(
        False, "add the other adapters to the weights before each batch, at its strengths; faster than beside them"
    )
    network_show_meta: bool = option(False, "show the metadata of the adapter files")
    outdir: FilePath = option(Path("outputs"), "folder for the images")
    W: int | None = option(None, "width", ge=1, le=MAX_IMAGE_SIDE)
    H: int | None = option(None, "height", ge=1, le=MAX_IMAGE_SIDE)
    steps: int | None = option(None, "sampling steps", ge=1, le=MAX_STEPS)
    scale: float | None = option(None, "classifier-free guidance; 1 for none")
    negative_scale: float | None = option(
        None, "strength of the negative prompt alone; both prompts are then compared with the empty one"
    )
    guidance: float | None = option(None, "embedded guidance, of models that have it")
    cfg_trunc_ratio: float | None = option(None, "classifier-free guidance only in this first share of the steps")
    renorm_cfg: float | None = option(
        None, "longest that a guided prediction may be, in lengths of the one for the prompt"
    )
    flow_shift: float | None = option(None, "shift of a flow model's timesteps towards noise", gt=0)
    prompt_2: str | None = option(None, "what the second text encoder reads instead of the prompt")
    clip_prompt: str | None = option(None, "what the pooled vector of the text is made of, instead of the prompt")
    reference_image: FilePath | None = option(None, "image that a model for edits starts from")
    vae_tile_size: int | None = option(
        None, "encode and decode images in overlapping tiles of so many pixels a side, in less memory", ge=64
    )
    float32_parts: Names = option((), "networks kept in float32, e.g. those that were trained as a whole")


class StartOptions(Options):
    """Images from images"""

    image_path: FilePath | None = option(
        None, "image to start from, or a folder of them, which are taken in the order of their names", path="any"
    )
    mask_path: FilePath | None = option(
        None, "mask, white where the image may change, or a folder with one for each image", path="any"
    )
    strength: float | None = option(None, "share of the steps that are made from there; default: 0.8", gt=0, le=1)
    clip_vision_strength: float | None = option(
        None, "replace the pooled vector of the prompt by that of the image to start from, times this; in SDXL"
    )
    clip_vision_model: Annotated[str, Metavar("FOLDER_OR_HUB")] | None = option(
        None, f"the CLIP that makes it; default: {CLIP_VISION_MODEL}"
    )
    network_regional_mask_max_color_codes: int | None = option(
        None,
        "of prompts in parts, separated by AND: for how many parts the mask has a color each, instead of a channel",
        ge=1,
        le=7,
    )
    highres_fix_scale: float | None = option(
        None, "make a smaller image first, of this share of the width and height, and the image from it", gt=0, le=1
    )
    highres_fix_steps: int | None = option(None, "steps of the smaller image; default: 28", ge=1, le=MAX_STEPS)
    highres_fix_strength: float | None = option(
        None, "--strength for the smaller image, where it starts from an image; default: the same", gt=0, le=1
    )
    highres_fix_save_1st: bool = option(False, "save the smaller image, too")
    highres_fix_latents_upscaling: bool = option(False, "enlarge the latents, not the image")
    highres_fix_upscaler: Annotated[str, Metavar("FILE")] | None = option(
        None, "weights of sd-scripts' latent upscaler, which sharpens the enlarged image's latents"
    )


class ControlOptions(Options):
    """Control images"""

    control_net_models: ModelPaths = option(
        (),
        "ControlNets, after that of --controlnet_model_name_or_path: files, folders of diffusers or names on the hub",
    )
    control_net_lllite_models: FilePaths = option((), "files of ControlNet-LLLite")
    control_net_image: FilePaths = option(
        (),
        "control images of prompts without --cn, or a folder of them: one for each ControlNet or LLLite, then those of "
        "the next image, in turn",
    )
    control_net_multipliers: Floats = option((), "strength of each ControlNet or LLLite; 1 where missing")
    control_net_ratios: Shares = option((), "share of the steps up to which each acts; 1 where missing")
    control_net_starts: Shares = option((), "share of the steps from which each acts; 0 where missing")
    control_net_preps: Names = option(
        (), "what each reads of its file: canny_63_191 for edges with these limits, none for the image itself"
    )
    highres_fix_disable_control_net: bool = option(False, "control images steer the smaller image alone")


class FirstNoiseOptions(Options):
    """The noise that images start from"""

    noise_offset_prob: float | None = option(
        None, "probability that an image's noise has an offset for each channel", ge=0, le=1
    )
    noise_offset_range: Floats = option((), "smallest and largest offset; default: 0.02 0.1")
    pyramid_noise_prob: float | None = option(
        None, "probability that an image's noise has coarser layers of noise, too", ge=0, le=1
    )
    pyramid_noise_discount_range: Floats = option((), "smallest and largest weight of each layer; default: 0.6 0.8")
    noise_offset: float | None = option(None, "offset of the noise of every image, in its place")
    pyramid_noise_discount: float | None = option(None, "weight of coarser layers in every image's, in its place")
    force_scheduler_zero_steps_offset: bool = option(False, "time grid of schedulers whose steps_offset is 0")


class LargeImageOptions(Options):
    """Sizes beyond those that a model was trained with"""

    original_width: int | None = option(None, "width that the model gets; default: that of the image", ge=1)
    original_height: int | None = option(None, "height that the model gets", ge=1)
    original_width_negative: int | None = option(None, "width that it gets for the negative prompt", ge=1)
    original_height_negative: int | None = option(None, "height that it gets for the negative prompt", ge=1)
    crop_top: int | None = option(None, "top of the crop that it gets; default: 0", ge=0)
    crop_left: int | None = option(None, "left of the crop that it gets; default: 0", ge=0)
    ds_depth_1: int | None = option(None, "Deep Shrink: the input block before which features become smaller", ge=0)
    ds_timesteps_1: int | None = option(None, "the timestep, of 1000 to 0, down to which they do; default: 650", ge=0)
    ds_depth_2: int | None = option(None, "the block after that timestep; default: none", ge=0)
    ds_timesteps_2: int | None = option(None, "the timestep down to which it does; default: 650", ge=0)
    ds_ratio: float | None = option(None, "size of the smaller features; default: 0.5", gt=0, le=1)
    gradual_latent_timesteps: int | None = option(
        None, "Gradual Latent, with euler_a: the timestep at which a small image begins to grow; default: 650", ge=0
    )
    gradual_latent_ratio: float | None = option(None, "its first size; default: 0.5", gt=0, le=1)
    gradual_latent_ratio_step: float | None = option(None, "by how much it grows at a time; default: 0.125", gt=0)
    gradual_latent_every_n_steps: int | None = option(None, "after how many steps it grows again; default: 3", ge=1)
    gradual_latent_s_noise: float | None = option(None, "factor of the noise in those steps; default: 1", ge=0)
    gradual_latent_unsharp_params: UnsharpNumbers | None = option(
        None, "sharpens what has grown: kernel size, sigma, strength and, for directions instead of latents, 0"
    )


class SeriesOptions(Options):
    """How many images"""

    n_iter: int = option(1, "how often all prompts are gone through", ge=1)
    images_per_prompt: int = option(1, "images of each prompt, with a seed of their own each", ge=1)
    iter_same_seed: bool = option(False, "one seed for all images that each run through the prompts makes")
    shuffle_prompts: bool = option(False, "go through the prompts in an order drawn by the seed")
    interactive: bool = option(False, "read prompts from the terminal, a line each, until its end (Ctrl-D)")
    from_module: FilePath | None = option(
        None, "Python file whose get_prompter(args, pipe, networks) gives the prompts", path="file"
    )
    prompter_module_args: str | None = option(None, "text that the function finds in args.prompter_module_args")
    grid: bool = option(False, "write a contact sheet of all images, too")
    xy: Names = option(
        (),
        'a sheet of all combinations of the values of one option or two: "network_mul=0,0.5,1" "steps=10,20"',
    )
    progress_file: FilePath | None = option(
        None, "write the image as far as it is, small and in approximate colors, to this file after each step"
    )
    sequential_file_name: bool = option(False, "name images im_000001.png and so on")
    use_original_file_name: bool = option(False, "name images like those that they start from")


PROMPT_THEMES = (GenerateOptions, StartOptions, LargeImageOptions, ControlOptions, FirstNoiseOptions)
PROMPT_FIELDS = {  # option -> field of a prompt where that has another name
    "W": "width", "H": "height", "steps": "sample_steps", "guidance": "guidance_scale", "image_path": "init_image",
    "mask_path": "mask_image",
}  # fmt: skip
NO_PROMPT_FIELDS = (
    "prompt", "plain_prompt", "network_weights", "network_mul", "network_merge", "network_merge_n_models", "outdir",
    "network_pre_calc", "network_show_meta",
    "textual_inversion_embeddings", "float32_parts", "vae_tile_size", "image_path", "mask_path", "control_net_models",
    "control_net_lllite_models", "control_net_image", "noise_offset_prob", "noise_offset_range", "pyramid_noise_prob",
    "pyramid_noise_discount_range",
)  # fmt: skip


def list_defaults(*themes: Options) -> dict[str, Any]:
    """Field of a prompt -> what the options say where the prompt does not."""
    values: dict[str, Any] = {}
    for theme in themes:
        for name, value in vars(theme).items():
            if name not in NO_PROMPT_FIELDS and value is not None and value is not False and value != ():
                values[PROMPT_FIELDS.get(name, name)] = str(value) if isinstance(value, Path) else value
    return values
