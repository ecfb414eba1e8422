"""Options of the dataset: images, buckets, captions and augmentation."""

from __future__ import annotations

from typing import Literal

from sfumato.config.base import Options, option
from sfumato.config.values import FilePath, FilePaths, Range, Resolution


class DatasetOptions(Options):
    """Dataset"""

    dataset_config: FilePath | None = option(
        None, "dataset configuration file; replaces the folder options", path="file"
    )
    train_data_dir: FilePath | None = option(
        None,
        "folder of image folders named N_text: N repeats, text is the fallback caption",
        path="folder",
    )
    reg_data_dir: FilePath | None = option(
        None, "folder of regularization image folders, named in the same way", path="folder"
    )
    dataset_repeats: int = option(1, "repeats of each image per epoch where the dataset sets none", ge=1)
    prior_loss_weight: float = option(1.0, "loss weight of regularization images", ge=0)
    preserve_reg_images: bool = option(
        False, "the target of regularization images is the prediction of the untrained model"
    )
    on_missing_caption: Literal["error", "empty", "skip"] = option(
        "error", "image without any caption: stop, train with an empty caption, or skip it"
    )
    on_bad_image: Literal["error", "skip"] = option(
        "error", "image that cannot be read: stop, or skip it; to find them, each image is decoded once"
    )
    in_json: FilePath | None = option(
        None, "metadata file (.json, .jsonl) that lists the images in --train_data_dir and their captions", path="file"
    )
    dataset_class: str | None = option(
        None, 'package.module.Class of your own whose instances yield {"image": path, "caption": text}'
    )
    cache_info: bool = option(
        False, "read images and captions from metadata_cache.json in the image folder, where there is one"
    )
    conditioning_data_dir: FilePath | None = option(
        None, "folder of mask or control images, one with the same name for each image", path="folder"
    )
    reference_data_dirs: FilePaths = option(
        (), "folders of reference images for edit models, in each one with the same name for each image", path="folder"
    )
    reference_dropout_rate: float = option(
        0.0, "probability of training a sample without its reference images", ge=0, le=1
    )
    train_inpainting: bool = option(
        False, "train a model for inpainting, which sees a mask and the masked image; what is masked is drawn at random"
    )
    debug_dataset: bool = option(False, "show what training sees, and exit; writes a page to --output_dir")


class BucketOptions(Options):
    """Buckets and batches"""

    resolution: Resolution | None = option(None, "training resolution in pixels; its area is the area of every bucket")
    train_batch_size: int = option(1, "images per step and device", ge=1)
    enable_bucket: bool = option(False, "enable aspect ratio bucketing")
    min_bucket_reso: int = option(256, "minimum side of a bucket", ge=1)
    max_bucket_reso: int = option(1024, "maximum side of a bucket", ge=1)
    bucket_reso_steps: int = option(64, "bucket sides are multiples of this", ge=1)
    bucket_no_upscale: bool = option(False, "never enlarge an image; bucket sizes follow the image sizes")
    skip_image_resolution: Resolution | None = option(None, "skip images of at most this many pixels")
    resize_interpolation: (
        Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"] | None
    ) = option(None, "interpolation for resizing; default: area to shrink, lanczos to enlarge")


class ImageOptions(Options):
    """Image augmentation"""

    flip_aug: bool = option(False, "flip each image horizontally with probability 0.5")
    color_aug: bool = option(False, "change hue or gamma slightly, with probability 1/3")
    random_crop: bool = option(False, "crop at a random position instead of the center")
    face_crop_aug_range: Range | None = option(
        None, "crop around the face given by the file name (name_cx_cy_w_h): range of the crop's shorter side, in faces"
    )
    masked_loss: bool = option(
        False, "weight the loss by the red channel of the mask images in --conditioning_data_dir (not fully tested)"
    )
    alpha_mask: bool = option(False, "weight the loss by the alpha channel of the images")


class CaptionOptions(Options):
    """Captions"""

    caption_extension: str = option(".caption", "extension of the caption files")
    caption_separator: str = option(",", "separator of the tags of a caption")
    caption_prefix: str | None = option(None, "text before every caption")
    caption_suffix: str | None = option(None, "text after every caption")
    shuffle_caption: bool = option(False, "shuffle the tags at every step")
    keep_tokens: int = option(0, "the first N tags are neither shuffled nor dropped", ge=0)
    keep_tokens_separator: str = option(
        "", "separator after the fixed tags at the start; a second one starts fixed tags at the end"
    )
    secondary_separator: str | None = option(None, "separator of tags that are shuffled and dropped as one")
    enable_wildcard: bool = option(False, "choose one of {a|b|c}, and one line of a caption with several")
    token_warmup_min: int = option(1, "number of tags at the first step of the tag warmup", ge=0)
    token_warmup_step: float = option(0, "step from which all tags are used; below 1 a share of all steps", ge=0)
    caption_dropout_rate: float = option(0.0, "probability of an empty caption", ge=0, le=1)
    caption_dropout_every_n_epochs: int = option(0, "empty captions in every Nth epoch; 0 for never", ge=0)
    caption_tag_dropout_rate: float = option(0.0, "probability of dropping each tag", ge=0, le=1)
    weighted_captions: bool = option(
        False, "enable weighted captions: (words) and [words] are emphasized more and less"
    )
    clip_l_dropout_rate: float = option(0.0, "probability of dropping the text of CLIP-L", ge=0, le=1)
    clip_g_dropout_rate: float = option(0.0, "probability of dropping the text of CLIP-G", ge=0, le=1)
    t5_dropout_rate: float = option(0.0, "probability of dropping the text of T5", ge=0, le=1)

    @property
    def text_dropout(self) -> dict[str, float]:
        """Text encoder -> dropout probability above 0; its option is the encoder's name and _dropout_rate."""
        probabilities = {
            "clip_l": self.clip_l_dropout_rate,
            "clip_g": self.clip_g_dropout_rate,
            "t5": self.t5_dropout_rate,
        }
        return {name: probability for name, probability in probabilities.items() if probability}
