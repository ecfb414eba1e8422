"""Image augmentation: random flips, crops and color changes, as a function of the sample's generators alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from random import Random
from typing import NamedTuple

from sfumato.data.buckets import BucketChoice, Size, crop_box
from sfumato.data.images import ColorChange, Transform, choose_interpolation

COLOR_AUG_CHANCE = 0.33  # probability that color_aug changes an image
MAX_HUE_CHANGE = 8 / 180  # largest change, in turns
MAX_GAMMA_CHANGE = 0.05  # largest change

MakeRandom = Callable[[str], Random]  # purpose -> the sample's own generator for it


def center_transform(rules: ImageRules, size: Size, choice: BucketChoice, *, flip: bool = False) -> Transform:
    """The transform without random augmentation: the center crop, flipped or not."""
    interpolation = choose_interpolation(size, choice.resized, rules.resize_interpolation)
    return Transform(resized=choice.resized, bucket=choice.bucket, interpolation=interpolation, flip=flip)


def draw_transform(
    rules: ImageRules, size: Size, choice: BucketChoice, path: str, make_random: MakeRandom
) -> Transform:
    """A random transform. size: width and height of the image; its file name may give the position of a face."""
    flip = rules.flip_aug and make_random("flip").random() < 0.5
    if not rules.varying_options:
        return center_transform(rules, size, choice, flip=flip)
    resized, offset = choose_window(rules, size, choice, path, make_random)
    return Transform(
        resized=resized,
        bucket=choice.bucket,
        interpolation=choose_interpolation(size, resized, rules.resize_interpolation),
        offset=offset,
        flip=flip,
        color=draw_color_change(make_random("colour")) if rules.color_aug else None,  # the purpose is part of the seed
    )


def choose_window(
    rules: ImageRules, size: Size, choice: BucketChoice, path: str, make_random: MakeRandom
) -> tuple[Size, Size | None]:
    """The size to resize to and (left, top) of the crop.

    Without buckets a random crop is cut from the image at its original size, if that is large enough.
    """
    face = parse_face(path) if rules.crops_around_faces else None
    if face is not None and size != choice.bucket:
        return crop_around_face(rules, size, choice.bucket, face, make_random("crop"))
    if not rules.random_crop:
        return choice.resized, None
    large = size[0] >= choice.bucket[0] and size[1] >= choice.bucket[1]
    resized = size if rules.full_size and large else choice.resized
    rng = make_random("crop")
    left, top = (rng.randint(0, long - short) for long, short in zip(resized, choice.bucket, strict=True))
    return resized, (left, top)


def compute_size_conditioning(size: Size, transform: Transform, *, full_size: bool) -> tuple[Size, Size]:
    """(height, width before resizing), (top, left of the crop) for SDXL's size conditioning, as sd-scripts computes it.

    This is not the real crop: it is the one of `crop_box`, also for a random crop. A crop from an image at its original
    size counts as an image of the size of the crop.
    """
    width, height = transform.bucket
    if full_size and transform.offset is not None:
        return (height, width), (0, 0)
    left, top, right, _ = crop_box(size, transform.bucket)
    return (size[1], size[0]), (int(top), int(width - right if transform.flip else left))


def parse_face(path: str) -> Face | None:
    """The face that a detector wrote at the end of the file name, name_cx_cy_w_h in pixels; None if there is none."""
    numbers = PurePath(path).stem.split("_")[-4:]
    if len(PurePath(path).stem.split("_")) < 5 or not all(number.isdecimal() for number in numbers):
        return None
    face = Face(*map(int, numbers))
    return face if max(face.width, face.height) > 0 else None


def crop_around_face(rules: ImageRules, size: Size, target: Size, face: Face, rng: Random) -> tuple[Size, Size]:
    """A random zoom at which the target's shorter side is face_crop_aug_range times the face, then a crop around it.

    The image is never enlarged more than needed to cover the target. With random_crop the crop is shifted by a
    triangular distribution over the image, otherwise by at most a twentieth of a large face. Returns the resized size
    and (left, top) of the crop.
    """
    assert rules.face_crop_aug_range is not None
    face_side, side = max(face.width, face.height), min(target)
    fit = max(target[0] / size[0], target[1] / size[1])
    zooms = [min(1.0, side / (face_side * times)) if times else 1.0 for times in rules.face_crop_aug_range]
    high, low = (max(fit, zoom) for zoom in zooms)
    scale = rng.uniform(low, high)
    resized = int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)
    near, far = rules.face_crop_aug_range
    jitter = face_side // 20 if near != far and face_side > side // 10 and face_side >= 40 else 0
    corner = []
    for face_center, length, crop_length in zip((face.x, face.y), resized, target, strict=True):
        middle = min(int(face_center * scale + 0.5), length)
        reach = max(length - middle, middle)
        far_shift = rng.randint(0, reach) + rng.randint(0, reach) - reach
        shift = far_shift if rules.random_crop else rng.randint(-jitter, jitter)
        corner.append(max(0, min(middle - crop_length // 2 + shift, length - crop_length)))
    return resized, (corner[0], corner[1])


def draw_color_change(rng: Random) -> ColorChange | None:
    """With probability COLOR_AUG_CHANCE a random hue or a random gamma, each equally likely; otherwise None."""
    if rng.random() >= COLOR_AUG_CHANCE:
        return None
    if rng.random() < 0.5:
        return ColorChange(hue=rng.uniform(-MAX_HUE_CHANGE, MAX_HUE_CHANGE))
    return ColorChange(gamma=rng.uniform(1 - MAX_GAMMA_CHANGE, 1 + MAX_GAMMA_CHANGE))


class Face(NamedTuple):
    """Center and size in pixels of the image."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """The image options of one subset; fields are option names, except the last two."""

    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None  # shorter side of the crop / longer side of the face
    alpha_mask: bool = False
    resize_interpolation: str | None = None
    masked_loss: bool = False  # whether conditioning images are masks
    full_size: bool = False  # whether there are no buckets, so that random crops are cut at the original size
    cached: bool = False  # whether latents are cached, so that an image always has the same pixels

    @property
    def varying_options(self) -> tuple[str, ...]:
        """The options in use that change the pixels every time; not flip_aug, which has only two results."""
        names = ("color_aug", "random_crop", *(("face_crop_aug_range",) if self.crops_around_faces else ()))
        return tuple(name for name in names if vars(self)[name])

    @property
    def crops_around_faces(self) -> bool:
        """Whether face_crop_aug_range has an effect: there are neither buckets nor cached latents."""
        return self.face_crop_aug_range is not None and self.full_size and not self.cached

    @property
    def uncacheable_options(self) -> tuple[str, ...]:
        """The options in use that contradict cached latents."""
        return self.varying_options if self.cached else ()
