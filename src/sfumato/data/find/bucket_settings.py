"""The buckets of one dataset, from its resolution and bucket options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sfumato.config.dataset_toml import OPTION_OF_KEY
from sfumato.config.schema import vocabulary
from sfumato.data.buckets import Buckets, Size
from sfumato.data.find.findings import Findings
from sfumato.data.find.headers import MAX_PIXELS
from sfumato.errors import UserError


class SizeSteps(NamedTuple):
    """What sides in pixels must be multiples of."""

    bucket: int
    single: int  # without buckets


def make_buckets(prefix: str, values: Mapping[str, Any], steps: SizeSteps, findings: Findings) -> Buckets:
    """The buckets, with limits rounded to multiples of the step. UserError where the options contradict each other.

    prefix: names the dataset in messages. values: by key of the dataset file.
    """
    width, height = values["resolution"]
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{prefix}resolution {width},{height} has more pixels than the largest image that is read ({MAX_PIXELS})",
            code="resolution-too-large",
            fix="give the side in pixels, e.g. 512 or 1024",
        )
    if not values["enable_bucket"]:
        return make_single_size(prefix, values, steps, findings)
    step = values["bucket_reso_steps"]
    if step % steps.bucket:
        raise UserError(
            f"{prefix}bucket_reso_steps is {step}, but this model needs a multiple of {steps.bucket}",
            code="bucket-step-not-multiple",
            fix=f"set bucket_reso_steps to {-(-step // steps.bucket) * steps.bucket}",
        )
    if values["bucket_no_upscale"]:
        keys = ("min_bucket_reso", "max_bucket_reso")
        report_unused_bucket_options(prefix, values, keys, "with bucket_no_upscale", findings)
        return Buckets(resolution=values["resolution"], step=step, no_upscale=True)
    shortest, longest = values["min_bucket_reso"], values["max_bucket_reso"]
    check_limits(prefix, values["resolution"], shortest, longest)
    rounded = max(shortest // step, 1) * step, -(-longest // step) * step
    if rounded != (shortest, longest):
        findings.note(f"{prefix}buckets go from {rounded[0]} to {rounded[1]} pixels, the nearest multiples of {step}")
    return Buckets(resolution=values["resolution"], shortest=rounded[0], longest=rounded[1], step=step)


def make_single_size(prefix: str, values: Mapping[str, Any], steps: SizeSteps, findings: Findings) -> Buckets:
    """Without enable_bucket: every image is brought to the resolution, rounded down to what the model can take."""
    resolution: Size = values["resolution"]
    if values["bucket_no_upscale"] and prefix:  # on the command line, the configuration reports it
        findings.report_no_effect(f"{prefix}bucket_no_upscale has no effect without enable_bucket")
    keys = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
    report_unused_bucket_options(prefix, values, keys, "without enable_bucket", findings)
    width, height = (max(side // steps.single, 1) * steps.single for side in resolution)
    if (width, height) != resolution:
        findings.note(
            f"{prefix}resolution {resolution[0]},{resolution[1]} is rounded to {width},{height}: without enable_bucket "
            f"this model takes multiples of {steps.single}"
        )
    return Buckets(resolution=(width, height), enabled=False, step=steps.bucket)


def check_limits(prefix: str, resolution: Size, shortest: int, longest: int) -> None:
    if shortest > longest:
        raise UserError(
            f"{prefix}min_bucket_reso {shortest} is above max_bucket_reso {longest}",
            code="bucket-limits-swapped",
            fix="swap them",
        )
    if min(resolution) < shortest:
        raise UserError(
            f"{prefix}resolution {min(resolution)} is below min_bucket_reso {shortest}",
            code="resolution-below-buckets",
            fix="lower min_bucket_reso",
        )
    if max(resolution) > longest:
        raise UserError(
            f"{prefix}resolution {max(resolution)} is above max_bucket_reso {longest}",
            code="resolution-above-buckets",
            fix="raise max_bucket_reso",
        )


def report_unused_bucket_options(
    prefix: str, values: Mapping[str, Any], keys: Sequence[str], reason: str, findings: Findings
) -> None:
    changed = [key for key in keys if values[key] != vocabulary()[OPTION_OF_KEY[key]].default]
    if changed:
        findings.report_no_effect(f"{prefix}{', '.join(changed)}: no effect {reason}")
