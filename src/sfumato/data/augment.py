"""How a picture is shown this time: mirrored, cropped, coloured, as a function of its generator alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from random import Random
from typing import NamedTuple

from sfumato.data.buckets import Choice, Size, crop_box
from sfumato.data.images import Colour, Transform, interpolation_for

COLOURED = 0.33  # chance that color_aug does something
HUE = 8 / 180  # largest change, in turns
GAMMA = 0.05  # largest change

Draw = Callable[[str], Random]  # a purpose -> this sample's own generator for it


def centred(rules: ImageRules, size: Size, choice: Choice, *, flip: bool = False) -> Transform:
    """A picture without chance: the centre of its bucket, mirrored or not."""
    wanted = interpolation_for(size, choice.resized, rules.resize_interpolation)
    return Transform(resized=choice.resized, bucket=choice.bucket, interpolation=wanted, flip=flip)


def drawn(rules: ImageRules, size: Size, choice: Choice, path: str, draw: Draw) -> Transform:
    """A picture as its generators would have it. size: width and height of the picture; the path may name a face."""
    flip = rules.flip_aug and draw("flip").random() < 0.5
    if not rules.varying:
        return centred(rules, size, choice, flip=flip)
    resized, offset = window(rules, size, choice, path, draw)
    return Transform(
        resized=resized,
        bucket=choice.bucket,
        interpolation=interpolation_for(size, resized, rules.resize_interpolation),
        offset=offset,
        flip=flip,
        colour=drawn_colour(draw("colour")) if rules.color_aug else None,
    )


def window(rules: ImageRules, size: Size, choice: Choice, path: str, draw: Draw) -> tuple[Size, Size | None]:
    """The size to resize to and the corner of the crop.

    Without buckets a random crop is a window of the picture at its own size, as long as that is large enough.
    """
    face = face_of(path) if rules.around_faces else None
    if face is not None and size != choice.bucket:
        return around_face(rules, size, choice.bucket, face, draw("crop"))
    if not rules.random_crop:
        return choice.resized, None
    large = size[0] >= choice.bucket[0] and size[1] >= choice.bucket[1]
    resized = size if rules.whole_size and large else choice.resized
    rng = draw("crop")
    left, top = (rng.randint(0, long - short) for long, short in zip(resized, choice.bucket, strict=True))
    return resized, (left, top)


def size_conditioning(size: Size, transform: Transform, *, whole_size: bool) -> tuple[Size, Size]:
    """(height, width before resizing), (top, left of the crop), as the field's models are told of them.

    Not where the pixels really come from: the crop is that of `crop_box`, also for a random crop, and a window of a
    picture that is shown at its own size counts as a picture of that size.
    """
    width, height = transform.bucket
    if whole_size and transform.offset is not None:
        return (height, width), (0, 0)
    left, top, right, _ = crop_box(size, transform.bucket)
    return (size[1], size[0]), (int(top), int(width - right if transform.flip else left))


def face_of(path: str) -> Face | None:
    """What a detector wrote at the end of the file name: name_cx_cy_w_h, in pixels."""
    numbers = PurePath(path).stem.split("_")[-4:]
    if len(PurePath(path).stem.split("_")) < 5 or not all(number.isdecimal() for number in numbers):
        return None
    face = Face(*map(int, numbers))
    return face if max(face.width, face.height) > 0 else None


def around_face(rules: ImageRules, size: Size, target: Size, face: Face, rng: Random) -> tuple[Size, Size]:
    """A random zoom at which the target's shorter side is so many times the face, then a window around the face.

    The picture is never enlarged beyond what covers the target. With random_crop the window moves far, most often a
    little; without it by a twentieth of a large face.
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
    for centre, length, wanted in zip((face.x, face.y), resized, target, strict=True):
        middle = min(int(centre * scale + 0.5), length)
        reach = max(length - middle, middle)
        far_off = rng.randint(0, reach) + rng.randint(0, reach) - reach
        shift = far_off if rules.random_crop else rng.randint(-jitter, jitter)
        corner.append(max(0, min(middle - wanted // 2 + shift, length - wanted)))
    return resized, (corner[0], corner[1])


def drawn_colour(rng: Random) -> Colour | None:
    """In a third of all cases another hue or another gamma, each as likely."""
    if rng.random() >= COLOURED:
        return None
    if rng.random() < 0.5:
        return Colour(hue=rng.uniform(-HUE, HUE))
    return Colour(gamma=rng.uniform(1 - GAMMA, 1 + GAMMA))


class Face(NamedTuple):
    """Centre and size in the picture's own pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """What may happen to the pictures of one subset; the fields are option names, the last two excepted."""

    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None  # the window's shorter side, in faces
    alpha_mask: bool = False
    resize_interpolation: str | None = None
    masked_loss: bool = False  # whether conditioning images are masks
    whole_size: bool = False  # whether there are no buckets, so that windows are cut at the picture's own size
    cached: bool = False  # whether latents are cached, so that a picture is always shown in the same way

    @property
    def varying(self) -> tuple[str, ...]:
        """The options that show other pixels every time; mirroring, with its two outcomes, is none of them."""
        names = ("color_aug", "random_crop", *(("face_crop_aug_range",) if self.around_faces else ()))
        return tuple(name for name in names if vars(self)[name])

    @property
    def around_faces(self) -> bool:
        """Whether faces may be cropped to: neither buckets nor a cache say what is seen."""
        return self.face_crop_aug_range is not None and self.whole_size and not self.cached

    @property
    def not_cacheable(self) -> tuple[str, ...]:
        """The options that latents, if they are cached, cannot follow."""
        return self.varying if self.cached else ()
