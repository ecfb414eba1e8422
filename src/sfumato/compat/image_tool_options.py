"""The options of sd-scripts' image scripts that `sfumato generate` calls otherwise, and what they are there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from sfumato.config.base import Metavar, Options, option
from sfumato.config.command import CommandLine
from sfumato.config.model import Precision
from sfumato.config.values import FilePath, to_tuple
from sfumato.errors import UserError

Texts = Annotated[tuple[str, ...], BeforeValidator(to_tuple), Metavar("TEXT ...")]
MIXED_PRECISIONS = {"float16": "fp16", "bfloat16": "bf16", "float32": "no"}
UPSCALER_MODULES = ("tools.latent_upscaler", "latent_upscaler")
CHUNK_TOKENS, MOST_CHUNKS = 75, 3
MIN_TILE = 64  # pixels a side
OLDER = "sd-scripts' own gen_img.py has it no more, only its older gen_img_diffusers.py had"
ABSENT_IN_GEN_IMG = {
    **dict.fromkeys(("clip_guidance_scale", "clip_image_guidance_scale"), OLDER),
    **dict.fromkeys(("vgg16_guidance_scale", "vgg16_guidance_layer", "XTI_embeddings"), OLDER),
}


class GenImgOptions(Options):
    """Makes images of prompts with any model of Stable Diffusion, and with any other that is trained here."""

    sdxl: bool = option(False, "make images of 1024 pixels a side, the size of Stable Diffusion XL")
    v1: bool = option(False, "the model is Stable Diffusion 1")
    fp16: bool = option(False, "compute in float16")
    bf16: bool = option(False, "compute in bfloat16")
    max_embeddings_multiples: int | None = option(None, "longest prompt, in times of 75 tokens", ge=1, le=MOST_CHUNKS)
    network_module: Texts = option((), "modules of the adapters")
    network_args: Texts = option((), "arguments of the adapters")
    no_preview: bool = option(False, "show no images in a window")
    opt_channels_last: bool = option(False, "order memory by channels last")
    highres_fix_upscaler_args: Texts = option((), "weights=FILE, with --highres_fix_upscaler tools.latent_upscaler")
    vae_slices: int | None = option(None, "decode images in so many parts along their longer side", ge=1)
    vae_batch_size: float | None = option(
        None, "images that are decoded at a time; below 1: this share of --batch_size", gt=0
    )


class GenImgAbsentOptions(Options):
    """Options of gen_img that are refused, with the reason."""

    clip_guidance_scale: Texts = option((), "refused")
    clip_image_guidance_scale: Texts = option((), "refused")
    vgg16_guidance_scale: Texts = option((), "refused")
    vgg16_guidance_layer: Texts = option((), "refused")
    XTI_embeddings: Texts = option((), "refused")


class SdxlGenImgOptions(GenImgOptions):
    """Makes images of prompts with Stable Diffusion XL."""

    sdxl: bool = option(True, "make images of 1024 pixels a side; --no_sdxl for 512")


class MinimalOptions(Options):
    """Makes images of prompts, with the options of sd-scripts' short script."""

    lora_weights: Texts = option((), "adapter files, each perhaps with its multiplier: FILE;0.8")
    output_dir: FilePath = option(Path(), "folder for the images")


class SdxlInferenceOptions(MinimalOptions):
    """Makes an image with Stable Diffusion XL."""


class SizedOptions(MinimalOptions):
    """What the scripts of larger models add."""

    merge_lora_weights: bool = option(False, "add the adapters to the model's weights")
    width: int = option(1024, "width", ge=1)
    height: int = option(1024, "height", ge=1)
    offload: bool = option(False, "keep networks in main memory while they rest")


class Sd3InferenceOptions(SizedOptions):
    """Makes an image with Stable Diffusion 3 or 3.5."""

    fp16: bool = option(False, "compute in float16")
    bf16: bool = option(False, "compute in bfloat16")


class FluxInferenceOptions(SizedOptions):
    """Makes an image with FLUX.1, or with --model_type chroma with Chroma."""

    width: int = option(1360, "width", ge=1)
    height: int = option(768, "height", ge=1)
    dtype: Precision = option("bfloat16", "precision of all networks")
    clip_l_dtype: str | None = option(None, "precision of CLIP-L")
    ae_dtype: str | None = option(None, "precision of the autoencoder")
    flux_dtype: str | None = option(None, "precision of the transformer")


class InpaintingInferenceOptions(MinimalOptions):
    """Paints within a mask with a model for inpainting of Stable Diffusion 1 or 2, or with --sdxl of XL."""

    sdxl: bool = option(False, "the model is Stable Diffusion XL")
    image: FilePath | None = option(None, "image to paint in", path="file")
    mask: FilePath | None = option(None, "mask, white where the model paints", path="file")
    width: int = option(512, "width", ge=1)
    height: int = option(512, "height", ge=1)
    guidance_scale: float = option(7.5, "classifier-free guidance; 1 for none")
    fp16: bool = option(False, "compute in float16")
    bf16: bool = option(False, "compute in bfloat16")


class LuminaInferenceOptions(MinimalOptions):
    """Makes an image with Lumina-Image 2.0."""

    output_dir: FilePath = option(Path("outputs"), "folder for the images")
    merge_lora_weights: bool = option(False, "add the adapters to the model's weights")
    image_width: int = option(1024, "width", ge=1)
    image_height: int = option(1024, "height", ge=1)
    guidance_scale: float = option(3.5, "classifier-free guidance; 1 for none")
    discrete_flow_shift: float = option(6.0, "shift of the timesteps towards noise", gt=0)
    dtype: Precision = option("bfloat16", "precision of all networks")
    gemma2_dtype: str | None = option(None, "precision of Gemma 2")
    ae_dtype: str | None = option(None, "precision of the autoencoder")
    device: str | None = option(None, "device that computes")
    offload: bool = option(False, "keep networks in main memory while they rest")


MINIMAL_PROMPTS = {  # script's options -> what they make without being told, and defaults of prompts
    SdxlInferenceOptions: ("A photo of a cat", {"sample_steps": 50, "scale": 7.5, "width": 1024, "height": 1024}),
    Sd3InferenceOptions: ("A photo of a cat", {"sample_steps": 50, "scale": 5.0}),
    FluxInferenceOptions: ("A photo of a cat", {"sample_steps": 50, "scale": 1.0, "guidance_scale": 3.5}),
    InpaintingInferenceOptions: ("A photo of a cat", {"sample_steps": 30}),
    LuminaInferenceOptions: (
        "A beautiful sunset over the mountains",
        {"sample_steps": 36, "cfg_trunc_ratio": 0.25, "renorm_cfg": 1.0},
    ),
}


def take_gen_img(options: GenImgOptions, line: CommandLine) -> tuple[dict[str, Any], dict[str, Any]]:
    """Precision and prompt length are options of the model here; the size is that of an image to start from, if any."""
    if options.fp16 and options.bf16:
        line.problems.add("--fp16 and --bf16 are two precisions", code="gen-img-two-precisions", fix="give one of them")
    for name in ("fp16", "bf16"):
        if vars(options)[name]:
            line.set_option("mixed_precision", name, place=f"--{name}")
    if (options.max_embeddings_multiples or 1) > 1:
        tokens = CHUNK_TOKENS * (options.max_embeddings_multiples or 1)
        line.set_option("max_token_length", tokens, place="--max_embeddings_multiples")
    size = 1024 if options.sdxl else 512
    own = {**take_upscaler(options, line), **take_vae(options, line, size)}
    defaults: dict[str, Any] = {"sample_steps": 50, "scale": 7.5}
    return own, defaults if line.own.get("image_path") else {**defaults, "width": size, "height": size}


def take_upscaler(options: GenImgOptions, line: CommandLine) -> dict[str, Any]:
    """The network that is named by its module and its arguments there is one file of weights here."""
    module = line.own.get("highres_fix_upscaler")
    if module is None or module.removesuffix(".py").replace("/", ".") not in UPSCALER_MODULES:
        return {}
    given = [text.removeprefix("weights=") for text in options.highres_fix_upscaler_args if text.startswith("weights=")]
    if not given:
        line.problems.add(
            f"--highres_fix_upscaler {module} needs its weights",
            code="gen-img-upscaler-without-weights",
            fix="--highres_fix_upscaler_args weights=FILE",
        )
    return {"highres_fix_upscaler": given[0] if given else None}


def take_vae(options: GenImgOptions, line: CommandLine, size: int) -> dict[str, Any]:
    """How the autoencoder saves memory. size: of images without one."""
    own: dict[str, Any] = {}
    if options.vae_batch_size is not None:
        share = options.vae_batch_size * (
            1 if options.vae_batch_size >= 1 else line.values.get("sample_batch_size") or 1
        )
        own["vae_batch_size"] = options.vae_batch_size
        line.set_option("vae_batch_size", max(1, int(share)), place="--vae_batch_size")
    if (options.vae_slices or 1) > 1:
        side = max(line.own.get("W") or size, line.own.get("H") or size)
        own["vae_tile_size"] = max(MIN_TILE, -(-side // (options.vae_slices or 1)))
    return own


def take_minimal(options: Any, line: CommandLine) -> tuple[dict[str, Any], dict[str, Any]]:
    """Adapters with their multipliers, sizes, precision and the prompt that the script makes without one."""
    own: dict[str, Any] = {} if "outdir" in line.own else {"outdir": options.output_dir}
    pairs = [split_multiplier(text) for text in options.lora_weights]
    if pairs:
        own |= {
            "network_weights": tuple(path for path, _ in pairs),
            "network_mul": tuple(number for _, number in pairs),
        }
    prompt, defaults = MINIMAL_PROMPTS[type(options)]
    has_prompt = any(line.own.get(name) for name in ("prompt", "interactive", "from_module"))
    if not has_prompt and "sample_prompts" not in line.values:
        own["prompt"] = prompt
    given = vars(options)
    if given.get("merge_lora_weights"):
        own["network_merge"] = True
    defaults = {**defaults, **take_size(given)}
    for name in ("fp16", "bf16"):
        if given.get(name):
            line.set_option("mixed_precision", name, place=f"--{name}")
    if "dtype" in given:
        line.set_option("mixed_precision", MIXED_PRECISIONS[given["dtype"]], place="--dtype")
    if "guidance_scale" in given:
        defaults |= {"scale": given["guidance_scale"]}
    if "discrete_flow_shift" in given:
        defaults |= {"flow_shift": given["discrete_flow_shift"]}
    if isinstance(options, InpaintingInferenceOptions):
        own |= take_inpainting(options, line)
    return own, defaults


def take_inpainting(options: InpaintingInferenceOptions, line: CommandLine) -> dict[str, Any]:
    """The image to start from and its mask; the family is that of --sdxl."""
    line.set_option("family", "sdxl" if options.sdxl else "sd", place="--sdxl")
    if options.image is None:
        line.problems.add(
            "--image is missing", code="inpainting-image-missing", fix="--image picture.png --mask mask.png"
        )
    return {"image_path": options.image, "mask_path": options.mask}


def take_size(given: dict[str, Any]) -> dict[str, int]:
    """The width and height of images, under the scripts' names."""
    for names in (("width", "height"), ("image_width", "image_height")):
        if names[0] in given:
            return {"width": given[names[0]], "height": given[names[1]]}
    return {}


def split_multiplier(text: str) -> tuple[Path, float]:
    """ "file.safetensors;0.8" -> the file and its multiplier, by default 1."""
    path, found, number = text.rpartition(";")
    try:
        return (Path(path), float(number)) if found else (Path(text), 1.0)
    except ValueError:
        raise UserError(
            f"--lora_weights: {number!r} in {text!r} is no multiplier",
            code="lora-weights-multiplier",
            fix="write FILE;0.8",
        ) from None
