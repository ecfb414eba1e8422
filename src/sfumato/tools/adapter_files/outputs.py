"""What tools for files write: where they may, with which metadata, and in a range that the dtype has."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sfumato import __version__
from sfumato.common.files import DiskNeed, check_disk_space, check_writable
from sfumato.common.names import DEFAULT_NETWORK_MODULE
from sfumato.common.text import plural
from sfumato.errors import Problems
from sfumato.families.checkpoint_saving import TensorEntries, TensorEntry, write_entries
from sfumato.families.source import MODEL_INDEX
from sfumato.formats.adapter_file import AdapterFile
from sfumato.formats.hashed_file import write_hashed_file
from sfumato.formats.hashes import HASH_KEYS
from sfumato.formats.peft_config import DIFFUSERS_KEY
from sfumato.tools.adapter_files.written_values import WrittenValues
from sfumato.track.progress_task import ProgressTask

SUFFIXES = (".safetensors", ".ckpt", ".pt")
MODULE_KEY, DIM_KEY, ALPHA_KEY, DYNAMIC = "ss_network_module", "ss_network_dim", "ss_network_alpha", "Dynamic"


def check_output(
    output: Path, inputs: Sequence[Path], *, is_folder: bool = False, suffixes: Sequence[str] = SUFFIXES
) -> None:
    """UserError where an output has none of the suffixes, is a folder, is one of the inputs, or cannot be written."""
    problems = Problems()
    if output.is_dir() and not is_folder:
        problems.add(f"{output} is a folder", code="tool-output-is-folder", fix="name the file to write")
    elif not is_folder and output.suffix not in suffixes:
        problems.add(
            f"{output} must end in {', '.join(suffixes)}",
            code="tool-output-suffix",
            fix=str(output.with_suffix("" if output.suffix[1:].isalpha() else output.suffix)) + ".safetensors",
        )
    if is_folder and output.is_file():
        problems.add(f"{output} is a file", code="tool-output-is-file", fix="name a folder to write")
    for path in inputs:
        if path.exists() and output.exists() and (path.samefile(output) or output.resolve() in path.resolve().parents):
            problems.add(f"{output} is one of the inputs: {path}", code="tool-output-is-input", fix="name another file")
    if is_folder:
        check_output_folder(output, inputs, problems)
    with problems.catch():
        check_writable(output.parent)
    problems.raise_all()


def check_output_folder(output: Path, inputs: Sequence[Path], problems: Problems) -> None:
    """Writing replaces the whole folder: only a model's own is replaced, and none inside of an input."""
    is_model = any((output / name).is_file() for name in (MODEL_INDEX, "config.json"))
    if output.is_dir() and any(output.iterdir()) and not is_model:
        problems.add(
            f"{output} has other files, which would be removed",
            code="tool-output-folder-in-use",
            fix="name a folder that does not exist",
        )
    if any(path.is_dir() and path.resolve() in output.resolve().parents for path in inputs):
        problems.add(
            f"{output} lies inside of an input", code="tool-output-inside-input", fix="name a folder elsewhere"
        )


def name_output(output: Path) -> str:
    """The path for the report, before it is written: with a note where there is an older one."""
    return f"{output}{' (replaced)' if output.exists() else ''}"


def check_space(output: Path, size: int) -> None:
    """UserError where the disk lacks room for a file of this many bytes."""
    check_disk_space(
        output.parent, [DiskNeed("file", 1, size)], mine=output.name, fix="free space, or name a file on another disk"
    )


def count_tensor_bytes(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> int:
    """Bytes of tensors, all of them in `dtype`; None: each in its own."""
    return sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors.values())


def count_entry_bytes(entries: Mapping[str, TensorEntry], dtype: torch.dtype | None) -> int:
    """Bytes of all tensors, floating-point ones in `dtype`."""
    total = 0
    for entry in entries.values():
        stored, shape = entry.spec
        written = dtype if dtype and stored.is_floating_point else stored
        total += torch.Size(shape).numel() * written.itemsize
    return total


def write_checkpoint(
    output: Path, entries: TensorEntries, metadata: Mapping[str, str], dtype: torch.dtype | None
) -> list[str]:
    """Write a file tensor by tensor, with a progress bar; the suffix is the format. dtype: None keeps each tensor's.

    The report's lines about inputs that are not finite. UserError for a disk without room and for values that the dtype
    cannot hold.
    """
    by_key = dict(entries)
    check_space(output, count_entry_bytes(by_key, dtype))
    with ProgressTask(output.name, "tensors") as progress:
        values = WrittenValues(progress)
        watched = values.watch(output, iter(by_key.items()), dtype)
        write_entries(output, watched, metadata, dtype)
    return values.list_warnings()


# ---------------------------------------------------------------- adapter files


def write_adapter(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None
) -> str:
    """Write an adapter file with the hashes of its tensors; "path" or "path (replaced)", for the report."""
    values = WrittenValues()
    for name, tensor in tensors.items():
        values.check(path, name, tensor, dtype or tensor.dtype)
    named = name_output(path)
    check_space(path, count_tensor_bytes(tensors, dtype))
    write_hashed_file(path, tensors, metadata, dtype)
    return named


def find_widest_dtype(files: Iterable[AdapterFile]) -> torch.dtype:
    """The widest dtype of the matrices of some files."""
    dtypes = {t.dtype for file in files for layer in file.layers.values() for t in layer.values() if t.ndim > 1}
    return max(dtypes, key=lambda dtype: (dtype.itemsize, torch.finfo(dtype).bits), default=torch.float32)


def make_adapter_metadata_from(
    path: Path,
    files: Sequence[AdapterFile],
    dims: Iterable[tuple[int, float]],
    *,
    minimal: bool = False,
    comment: str = "",
) -> dict[str, str]:
    """The metadata of an adapter file that a tool makes. dims: rank and alpha of each layer.

    Of one source all entries are kept; of several what describes the model, from the first that says it. minimal: the
    entries without which programs cannot use the file.
    """
    own = make_network_entries(dims)
    if minimal or len(files) != 1:
        kept: dict[str, str] = {}
        for name in ("ss_v2", "ss_base_model_version"):
            kept |= next(({name: file.metadata[name]} for file in files if name in file.metadata), {})
    else:
        dropped = {*HASH_KEYS, DIFFUSERS_KEY, "ss_network_args"}
        kept = {name: value for name, value in files[0].metadata.items() if name not in dropped}
    if minimal:
        return {"format": "pt", **kept, **own}
    return {"format": "pt", **kept, **own, **make_spec_entries(path, files, comment)}


def describe_ranks(ranks: Collection[int], more: str = "") -> str:
    """ "1 layer, rank 4", or "12 layers, rank 4 to 8"; more: after the number of layers. ranks: that of each."""
    low, high = (min(ranks), max(ranks)) if ranks else (0, 0)
    return f"{plural(len(ranks), 'layer')}{more}, rank {low:g}" + ("" if low == high else f" to {high:g}")


def make_network_entries(dims: Iterable[tuple[int, float]]) -> dict[str, str]:
    """What sd-scripts reads of an adapter: its module, and rank and alpha, "Dynamic" where layers differ."""
    found = list(dims)
    ranks, alphas = {str(rank) for rank, _ in found}, {f"{alpha:g}" for _, alpha in found}
    return {
        MODULE_KEY: DEFAULT_NETWORK_MODULE,
        DIM_KEY: ranks.pop() if len(ranks) == 1 else DYNAMIC,
        ALPHA_KEY: alphas.pop() if len(alphas) == 1 else DYNAMIC,
    }


def make_extracted_metadata(
    path: Path, base_model_version: str, dims: Iterable[tuple[int, float]], *, minimal: bool
) -> dict[str, str]:
    """The metadata of an adapter that comes from no other. base_model_version: sd-scripts' name of the model."""
    version = {"ss_base_model_version": base_model_version, "ss_v2": str("_v2" in base_model_version)}
    entries = {"format": "pt", **version, **make_network_entries(dims)}
    return entries if minimal else {**entries, **make_spec_entries(path, ())}


def make_spec_entries(path: Path, files: Sequence[AdapterFile], comment: str = "") -> dict[str, str]:
    """The entries of the model spec that change with every tool."""
    spec = {"sai_model_spec": "1.0.1", "title": path.stem, "date": time.strftime("%Y-%m-%dT%H:%M:%S")}
    spec["implementation_version"] = f"sfumato {__version__}"
    for name in ("architecture", "implementation"):
        found = next((file.metadata[key] for file in files if (key := f"modelspec.{name}") in file.metadata), "")
        spec |= {name: found} if found else {}
    if len(files) > 1:
        spec["merged_from"] = ", ".join(file.path.stem for file in files)
    entries = {f"modelspec.{name}": value for name, value in spec.items()}
    if comment:
        before = next(
            (file.metadata["ss_training_comment"] for file in files if "ss_training_comment" in file.metadata), ""
        )
        entries["ss_training_comment"] = f"{comment}; {before}" if before not in ("", "None") else comment
    return entries
