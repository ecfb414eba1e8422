"""`sfumato doctor`: what this machine has, what is missing and what it would bring, and what its card can train."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from packaging.requirements import Requirement

import sfumato
from sfumato.common.files import check_writable
from sfumato.common.text import GIB, format_bytes, plural
from sfumato.config.presets import Preset, list_presets
from sfumato.data.find.index import get_default_cache_dir
from sfumato.errors import Problems
from sfumato.memory.device_memory import read_free_memory
from sfumato.tools.rehearse import ALLOWANCE

DISTRIBUTION = "sfumato"
EXTRAS = {  # extra -> what it brings
    "tensorboard": "--log_with tensorboard",
    "wandb": "--log_with wandb",
    "heif": "images in HEIC and HEIF",
    "jxl": "images in JPEG XL",
    "optimizers": "8-bit optimizers, Lion, Prodigy, D-Adaptation and the schedule-free ones",
    "tagger": "sfumato dataset tag",
    "deepspeed": "--deepspeed, on several GPUs (Linux)",
}
BY_HAND = {  # module -> what it brings; none of them is in an extra
    "triton": "--compile on a GPU (on Windows the package triton-windows)",
    "xformers": "--attention xformers",
    "flash_attn": "--attention flash",
    "flash_attn_interface": "--attention flash_3",
}
PRECISIONS = {"bf16": (8, 0), "8-bit products of int8": (7, 5), "8-bit products of fp8": (8, 9)}  # compute capability
SMALLEST_SPACE = 10 * 10**9  # bytes on a disk, below which caches and checkpoints may not fit


def examine(memory: int | None, problems: Problems) -> Iterator[str]:
    """The lines of the report. memory: of a card that is not in this machine, bytes; what would not work goes to
    `problems`.
    """
    yield f"sfumato {sfumato.__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield from heading("Device")
    yield from describe_devices(problems)
    yield from heading("Packages")
    yield from describe_packages(list_requirements(), problems)
    yield from heading("Extras")
    yield from describe_extras(list_requirements())
    yield from heading("Places")
    yield from describe_places(problems)
    yield from heading("What fits")
    yield from describe_fitting(find_card() if memory is None else memory)


def heading(title: str) -> Iterator[str]:
    yield ""
    yield title


def describe_devices(problems: Problems) -> Iterator[str]:
    """Every GPU, or why there is none that torch can use; the processor."""
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        memory = read_free_memory(torch.device("cuda", number))
        free = f", {format_bytes(memory.free)} of it free" if memory else ""
        yield f"  cuda:{number}  {properties.name}, {format_bytes(properties.total_memory)}{free}"
        capability = (properties.major, properties.minor)
        able = [name for name, least in PRECISIONS.items() if capability >= least]
        yield f"          compute capability {properties.major}.{properties.minor}: {', '.join(able) or 'fp16 only'}"
    if not torch.cuda.is_available():
        yield "  no GPU that torch can use; models of real size need one"
        if shutil.which("nvidia-smi"):
            problems.add(
                f"this machine has an NVIDIA driver, and torch {torch.__version__} cannot use it",
                code="torch-without-cuda",
                fix="install the build of torch for the driver's version of CUDA",
            )
    yield f"  cpu     {plural(os.cpu_count() or 1, 'thread')}, {format_bytes(read_main_memory())} of memory"


def read_main_memory() -> int:
    """Bytes; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def list_requirements() -> list[Requirement]:
    """What the installed package asks for, extras included; nothing in a checkout that is not installed."""
    try:
        return [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError:
        return []


def find_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_packages(requirements: list[Requirement], problems: Problems) -> Iterator[str]:
    """The packages that every run needs; one that is missing or too old is a problem."""
    if not requirements:
        problems.add(
            f"{DISTRIBUTION} itself is not installed, so its packages are not checked",
            code="not-installed",
            fix="pip install -e . in the folder of the checkout",
        )
    for requirement in requirements:
        if requirement.marker is not None:
            continue
        version = find_version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            problems.add(
                f"{requirement.name} {version or 'is not installed'}, where {requirement.specifier} is needed",
                code="package-unfit",
                fix=f'pip install --upgrade "{requirement.name}{requirement.specifier}"',
            )
        yield f"  {requirement.name:<18}{version or 'missing':<14}{requirement.specifier}"


def describe_extras(requirements: list[Requirement]) -> Iterator[str]:
    """What is optional: present or missing, what it brings, and the command that installs it."""
    for extra, brings in EXTRAS.items():
        packages = [each for each in requirements if each.marker and belongs_to(each, extra)]
        missing = [each.name for each in packages if find_version(each.name) is None]
        state = f"missing: {', '.join(missing)}" if missing else "present"
        yield f"  {extra:<14}{brings}: {state}"
        if missing:
            yield f'                pip install "{DISTRIBUTION}[{extra}]"'
    for module, brings in BY_HAND.items():
        state = "present" if importlib.util.find_spec(module) else "missing"
        yield f"  {module:<22}{brings}: {state}"


def belongs_to(requirement: Requirement, extra: str) -> bool:
    """Whether a requirement is there for this extra alone."""
    assert requirement.marker is not None
    return re.search(rf"""extra == ["']{re.escape(extra)}["']""", str(requirement.marker)) is not None


def list_places() -> Mapping[str, Path]:
    """Folders that runs write to beside --output_dir."""
    from huggingface_hub import constants

    return {
        "caches": get_default_cache_dir(),
        "models of the hub": Path(constants.HF_HUB_CACHE),
        "temporary files": Path(tempfile.gettempdir()),
    }


def describe_places(problems: Problems) -> Iterator[str]:
    """Where they are, what they hold, and what is free on their disk."""
    for name, folder in list_places().items():
        with problems.catch():
            check_writable(folder, option=name)
        held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if name == "caches" else None
        holds = "" if held is None else f", holds {format_bytes(held)}"
        place = folder
        while not place.exists() and place != place.parent:
            place = place.parent
        free = shutil.disk_usage(place).free
        few = "; that is little" if free < SMALLEST_SPACE else ""
        yield f"  {name:<18}{folder}{holds}, {format_bytes(free)} free{few}"


def find_card() -> int | None:
    """Memory of the first GPU, bytes."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def describe_fitting(memory: int | None) -> Iterator[str]:
    """Of each model and task the preset for the largest card that this one is not smaller than."""
    if memory is None:
        yield "  sfumato doctor --device 12GB shows what a card of that size can train"
        return
    fitting = find_fitting(memory)
    yield f"  on {memory / GIB:.0f} GB, of which {format_bytes(ALLOWANCE)} are for CUDA itself, with --preset NAME:"
    for preset in fitting:
        yield f"  {preset.name:<28}{preset.title}, {format_bytes(preset.needs)}"
    if not fitting:
        yield "  no model of real size"
    lacking = {(preset.title) for preset in list_presets().values()} - {preset.title for preset in fitting}
    if lacking:
        yield f"  needs a larger card: {'; '.join(sorted(lacking))}"


def find_fitting(memory: int) -> list[Preset]:
    """Cards have a little less memory than they are sold with."""
    best: dict[str, Preset] = {}
    for preset in list_presets().values():
        if preset.card * GIB * 0.95 <= memory and preset.needs + ALLOWANCE <= memory:
            best[preset.title] = preset
    return list(best.values())


def show_doctor(memory: int | None) -> None:
    """Print the report; raises UserErrors for what would stop a run."""
    problems = Problems()
    for line in examine(memory, problems):
        print(line)
    sys.stdout.flush()
    problems.raise_all()
