"""sd-scripts' tools for images and their texts, run as `sfumato dataset ...`."""

from __future__ import annotations

from sfumato.cli.dataset_canny import CannyOptions, run_canny
from sfumato.cli.dataset_caption import CaptioningOptions, run_captioning
from sfumato.cli.dataset_clean import CleanOptions, run_cleaning
from sfumato.cli.dataset_face_crop import FaceCropOptions, run_face_crop
from sfumato.cli.dataset_merge import CaptionMergeOptions, TagMergeOptions, run_merge_of_texts
from sfumato.cli.dataset_resize import ImageResizeOptions, run_resizing
from sfumato.cli.dataset_tag import CAPTION_ALIASES, TagOptions, run_tagging
from sfumato.cli.dataset_upscale import LatentUpscaleOptions, run_latent_upscale
from sfumato.compat.file_tool import FileTool
from sfumato.config.base import Options, option
from sfumato.config.values import Extension, FilePath
from sfumato.errors import UserError

BLIP_WEIGHTS = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_large_caption.pth"
BLIP_MODEL = "Salesforce/blip-image-captioning-large"  # the same weights, as transformers reads them
BLIP_PROMPT = "a picture of"  # that BLIP was trained to go on from


class BlipOptions(Options):
    """Writes captions by BLIP beside images."""

    train_data_dir: FilePath = option(None, "the folder of images", positional=True, required=True)
    caption_weights: str = option(
        BLIP_WEIGHTS, f"the model; by default {BLIP_MODEL}, which has the weights of that file"
    )
    caption_extension: Extension = option(".caption", "extension of the files that are written")
    batch_size: int = option(1, "images at once", ge=1)
    max_data_loader_n_workers: int | None = option(None, "threads that decode images; 4 by default", ge=0)
    beam_search: bool = option(False, "search the best caption; by default words are chosen by chance")
    num_beams: int = option(1, "beams of that search", ge=1)
    top_p: float = option(0.9, "probability of the words that are chosen among", gt=0, le=1)
    max_length: int = option(75, "tokens of a caption at most", ge=1)
    min_length: int = option(5, "tokens of a caption at least", ge=0)
    seed: int = option(42, "seed of the choice")
    recursive: bool = option(False, "caption the images of subfolders, too")
    debug: bool = option(False, "print each caption")


class GitOptions(Options):
    """Writes captions by GIT beside images."""

    train_data_dir: FilePath = option(None, "the folder of images", positional=True, required=True)
    model_id: str = option("microsoft/git-large-textcaps", "the model: a folder, or OWNER/NAME on the hub")
    caption_extension: Extension = option(".caption", "extension of the files that are written")
    batch_size: int = option(1, "images at once", ge=1)
    max_data_loader_n_workers: int | None = option(None, "threads that decode images; 4 by default", ge=0)
    max_length: int = option(50, "tokens of a caption at most", ge=1)
    remove_words: bool = option(False, "remove phrases about words that are read in the image")
    recursive: bool = option(False, "caption the images of subfolders, too")
    debug: bool = option(False, "print each caption")


def caption_by_blip(options: BlipOptions) -> int:
    given = options.model_dump(exclude={"caption_weights", "beam_search", "num_beams", "top_p"})
    by_chance = not options.beam_search
    return run_captioning(
        CaptioningOptions.model_construct(
            **given,
            model=find_blip(options.caption_weights),
            prompt=BLIP_PROMPT,
            num_beams=1 if by_chance else options.num_beams,
            top_p=options.top_p if by_chance else None,
        ),
        named_by="caption_weights",
    )


def find_blip(weights: str) -> str:
    """The model that transformers opens. UserError for another file in BLIP's own format, which it does not."""
    if weights == BLIP_WEIGHTS:
        return BLIP_MODEL
    if weights.endswith(".pth"):
        raise UserError(
            f"--caption_weights: {weights} is in a format that transformers does not open",
            code="blip-weights-unreadable",
            fix=f"give the folder of such a model, or its name on the hub, e.g. {BLIP_MODEL}",
        )
    return weights


def caption_by_git(options: GitOptions) -> int:
    given = options.model_dump(exclude={"model_id"})
    return run_captioning(CaptioningOptions.model_construct(**given, model=options.model_id), named_by="model_id")


CAPTION_TOOLS = (
    FileTool(name="finetune/clean_captions_and_tags", options=CleanOptions, run=run_cleaning),
    FileTool(
        name="finetune/merge_captions_to_metadata",
        options=CaptionMergeOptions,
        run=run_merge_of_texts,
        aliases=CAPTION_ALIASES,
    ),
    FileTool(name="finetune/merge_dd_tags_to_metadata", options=TagMergeOptions, run=run_merge_of_texts),
    FileTool(name="tools/resize_images_to_resolution", options=ImageResizeOptions, run=run_resizing),
    FileTool(name="tools/detect_face_rotate", options=FaceCropOptions, run=run_face_crop),
    FileTool(name="tools/latent_upscaler", options=LatentUpscaleOptions, run=run_latent_upscale),
    FileTool(name="tools/canny", options=CannyOptions, run=run_canny),
    FileTool(name="finetune/make_captions", options=BlipOptions, run=caption_by_blip, aliases=CAPTION_ALIASES),
    FileTool(name="finetune/make_captions_by_git", options=GitOptions, run=caption_by_git),
    FileTool(name="finetune/tag_images_by_wd14_tagger", options=TagOptions, run=run_tagging, aliases=CAPTION_ALIASES),
)
