"""Options of the pictures: where they lie, how large they are made, what is changed in them."""

from __future__ import annotations

from typing import Literal

from sfumato.config.base import Options, option
from sfumato.config.values import FilePath, Range, Size


class DatasetOptions(Options):
    """Dataset"""

    dataset_config: FilePath | None = option(
        None, "file that describes the datasets; replaces the folder options", path="file"
    )
    train_data_dir: FilePath | None = option(
        None,
        "folder of image folders, named N_text: N repeats, text as spare caption",
        path="folder",
    )
    reg_data_dir: FilePath | None = option(None, "the same for regularisation images", path="folder")
    dataset_repeats: int = option(1, "how often each image appears per epoch where the dataset does not say", ge=1)
    prior_loss_weight: float = option(1.0, "weight of regularisation images in the loss", ge=0)
    preserve_reg_images: bool = option(
        False, "the target of regularisation images is what the model said of them before training"
    )
    on_missing_caption: Literal["error", "empty", "skip"] = option(
        "error", "an image without any caption: stop, train it with an empty one, or leave it out"
    )
    on_bad_image: Literal["error", "skip"] = option(
        "error", "an image that cannot be read: stop, or leave it out, for which each is decoded once"
    )
    in_json: FilePath | None = option(
        None, "metadata file (.json, .jsonl) that names the images in --train_data_dir and their captions", path="file"
    )
    dataset_class: str | None = option(
        None, 'a class of your own whose instances yield {"image": path, "caption": text}, as package.module.Class'
    )
    cache_info: bool = option(
        False, "take images and captions from metadata_cache.json in the image folder, where there is one"
    )
    conditioning_data_dir: FilePath | None = option(
        None, "folder of mask or control images, one of the same name for each image", path="folder"
    )
    debug_dataset: bool = option(False, "show what training would see, and stop; writes a page into --output_dir")


class BucketOptions(Options):
    """Sizes and batches"""

    resolution: Size | None = option(None, "training size in pixels; its area is what every bucket has")
    train_batch_size: int = option(1, "images per step and device", ge=1)
    enable_bucket: bool = option(False, "train each image near its own aspect ratio")
    min_bucket_reso: int = option(256, "shortest side of a bucket", ge=1)
    max_bucket_reso: int = option(1024, "longest side of a bucket", ge=1)
    bucket_reso_steps: int = option(64, "bucket sides are multiples of this", ge=1)
    bucket_no_upscale: bool = option(False, "never enlarge an image; buckets follow the images' sizes")
    skip_image_resolution: Size | None = option(None, "leave out images of at most this many pixels")
    resize_interpolation: (
        Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"] | None
    ) = option(None, "how images are resized; without it area to shrink, lanczos to enlarge")


class ImageOptions(Options):
    """Image changes"""

    flip_aug: bool = option(False, "mirror each image with a chance of one half")
    color_aug: bool = option(False, "vary hue or gamma a little, in a third of all cases")
    random_crop: bool = option(False, "crop at a random place instead of the centre")
    face_crop_aug_range: Range | None = option(
        None, "crop around the face that a file name ends in (name_cx_cy_w_h); the crop's shorter side, in faces"
    )
    masked_loss: bool = option(
        False, "weight the loss by the red channel of the mask images in --conditioning_data_dir"
    )
    alpha_mask: bool = option(False, "weight the loss by the images' alpha channel")
