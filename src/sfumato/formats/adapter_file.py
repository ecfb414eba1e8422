"""Adapter files of any program, read into one form: for each layer's name the tensors under their names here.

What a name belongs to is another question, which needs the model: see adapter_layers.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sfumato.common.text import list_some
from sfumato.errors import UserError
from sfumato.formats.adapter_keys import (
    ALPHA,
    DOWN,
    LORA,
    MIDDLE,
    SCALAR,
    UP,
    find_adapter_kind,
    guess_contents,
    guess_writer,
    parse_adapter_key,
)
from sfumato.formats.checkpoint import open_checkpoint
from sfumato.formats.checkpoint_writer import write_safetensors
from sfumato.formats.hashes import add_hashes
from sfumato.formats.peft_config import PeftConfig, read_diffusers_configs, read_peft_config
from sfumato.formats.pickled import is_pickled, write_pickle

LayerTensors = dict[str, Tensor]  # name of a tensor here -> tensor
PEFT_CONFIG = "adapter_config.json"
FOLDER_FILES = (  # in the order of preference; PEFT's and diffusers' names
    "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin",
)  # fmt: skip
LAYER_PREFIXES = ("lora_", "lycoris_", "base_model.model.")  # of keys that belong to networks, whatever follows


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """One adapter. A LoRA's layers have lora_down.weight, lora_up.weight and alpha, and nothing else."""

    path: Path
    layers: Mapping[str, LayerTensors]  # by the layer's name in the file
    passed_over: tuple[str, ...] = ()  # keys that no adapter has
    keys: tuple[str, ...] = ()  # all of the file's
    metadata: Mapping[str, str]

    def describe_origin(self) -> str:
        """Which program and model the file seems to come from, for errors; empty where nothing says it."""
        writer = guess_writer(self.keys)
        base = self.metadata.get("modelspec.architecture") or self.metadata.get("ss_base_model_version")
        facts = [f"its keys are those of {writer}"] if writer else []
        facts += [f"it was trained on {base}"] if base else []
        return "; ".join(facts)

    def describe_passed_over(self) -> list[str]:
        """A line about the keys that are not used; none where all are."""
        count = len(self.passed_over)
        return (
            [f"{self.path}: {count} tensors are no adapter and not used: {list_some(self.passed_over)}"]
            if count
            else []
        )


def read_adapter_file(path: Path) -> AdapterFile:
    """A file, or a folder of PEFT or diffusers, as any program writes it.

    Raises UserError where there is no adapter, one of another kind than LoRA, or only half of one, and for values that
    are not finite.
    """
    files = [_read_file(file, network) for file, network in find_adapter_files(path)]
    layers: dict[str, LayerTensors] = {}
    for file in files:
        layers |= file.layers
    return replace(
        files[0],
        path=path,
        layers=layers,
        passed_over=tuple(key for file in files for key in file.passed_over),
        keys=tuple(key for file in files for key in file.keys),
    )


def find_adapter_files(path: Path) -> list[tuple[Path, str]]:
    """The files of an adapter, each with the network that it is for where its folder says that: unet, text_encoder."""
    if not path.is_dir():
        return [(path, "")]
    own = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
    if own:
        return [(own, "")]
    inner = [(folder / name, folder.name) for folder in sorted(path.iterdir()) for name in FOLDER_FILES[:2]]
    inner = [(file, network) for file, network in inner if file.is_file()]
    if inner:
        return inner
    others = sorted(path.glob("*.safetensors"))
    if len(others) != 1:
        found = list_some([other.name for other in others]) if others else "no .safetensors file"
        raise UserError(
            f"{path} is a folder without {FOLDER_FILES[0]} or {FOLDER_FILES[2]}, and with {found}",
            code="adapter-folder-unclear",
            fix="name the adapter's file itself",
        )
    return [(others[0], "")]


def _read_file(path: Path, network: str) -> AdapterFile:
    layers: dict[str, LayerTensors] = defaultdict(dict)
    others: list[str] = []
    with open_checkpoint(path) as file:
        keys, metadata = tuple(file.header.tensors), file.header.metadata
        for key in keys:
            parsed = parse_adapter_key(key)
            if parsed is None:
                others.append(key)
                continue
            name, tensor = parsed
            name = f"{network}.{name}" if network else name
            if tensor in layers[name]:
                raise UserError(f"{path} holds {tensor} of {name} twice", code="adapter-tensor-twice")
            layers[name][tensor] = file.read(key)
    found = AdapterFile(path=path, layers=layers, passed_over=tuple(others), keys=keys, metadata=metadata)
    _check_kind(found)
    _check_others(found)
    configs = _read_configs(path, metadata)
    complete = {name: _complete_lora(path, name, tensors, configs) for name, tensors in layers.items()}
    return replace(found, layers=complete)


def _check_kind(file: AdapterFile) -> None:
    """UserError for a file that holds no adapter, and for one of another kind than LoRA."""
    if not file.keys:
        raise UserError(f"{file.path} holds no tensors", code="adapter-file-empty", fix="save or download it again")
    kinds: dict[str, int] = defaultdict(int)
    for tensors in file.layers.values():
        found = {name for name in map(find_adapter_kind, tensors) if name}
        for name in found - {LORA} or found:
            kinds[name] += 1
    if not kinds:
        contents = guess_contents(file.keys)
        raise UserError(
            f"{file.path} holds no adapter" + (f" but {contents}" if contents else f": {list_some(file.keys)}"),
            code="adapter-file-without-adapter",
            fix="give a LoRA file",
        )
    others = {name: count for name, count in kinds.items() if name != LORA}
    if others:
        text = " and ".join(f"a {name} ({count} layers)" for name, count in others.items())
        raise UserError(
            f"{file.path} is {text}; only LoRA is supported",
            code="adapter-kind-unsupported",
            fix="merge it into the model with the program that made it, or give a LoRA",
        )


def _check_others(file: AdapterFile) -> None:
    """UserError for unknown tensors of networks that the adapter is for: passing over them would change the result."""
    networks = {name.partition(".")[0] for name in file.layers}
    check_whole_weights(
        file.path,
        [key for key in file.passed_over if key.partition(".")[0] in networks or key.startswith(LAYER_PREFIXES)],
    )


def check_whole_weights(path: Path, keys: Sequence[str]) -> None:
    """UserError where there are tensors of the model's networks that an adapter cannot express."""
    if keys:
        raise UserError(
            f"{path} holds {len(keys)} more tensors of its networks, without which the result would be wrong: "
            + list_some(keys),
            code="adapter-with-whole-weights",
            fix="merge it into the model with the program that made it",
        )


def _read_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """Network, or "" for all -> what is stored beside the LoRA about its scale."""
    beside = path.with_name(PEFT_CONFIG)
    if path.name in FOLDER_FILES[:2] and beside.is_file():
        return {"": read_peft_config(beside)}
    return read_diffusers_configs(path, metadata)


def _complete_lora(path: Path, name: str, tensors: LayerTensors, configs: Mapping[str, PeftConfig]) -> LayerTensors:
    """Both matrices, as they are, and alpha; what other tensors say is multiplied into the matrices."""
    missing = [tensor for tensor in (DOWN, UP) if tensor not in tensors]
    if missing:
        raise UserError(
            f"{path}: {name} has {', '.join(tensors)} but no {' and no '.join(missing)}",
            code="adapter-matrix-missing",
            fix="save or download the file again",
        )
    broken = [tensor for tensor, values in tensors.items() if not values.float().isfinite().all()]
    if broken:
        raise UserError(
            f"{path}: {name}.{broken[0]} has values that are not finite (NaN or infinite)",
            code="adapter-not-finite",
            fix="use an earlier save of it",
        )
    _check_numbers(path, name, tensors)
    down, up = tensors[DOWN], tensors[UP]
    if MIDDLE in tensors:
        down = fold_middle(path, name, tensors[MIDDLE], down)
    if SCALAR in tensors:
        up = up.float() * tensors[SCALAR].float().reshape(())
    network, _, layer = name.partition(".")
    config = configs.get("") or configs.get(network)
    rank = down.shape[0]
    if ALPHA in tensors:
        alpha = float(tensors[ALPHA])
    else:
        alpha = config.find_alpha(name if "" in configs else layer, rank) if config else float(rank)
    return {DOWN: down, UP: up, ALPHA: torch.tensor(alpha)}


def _check_numbers(path: Path, name: str, tensors: LayerTensors) -> None:
    """UserError for matrices that do not belong together, and for several numbers where there is one."""
    down, up = tensors[DOWN], tensors[UP]
    lists = [tensor for tensor in (ALPHA, SCALAR) if tensor in tensors and tensors[tensor].numel() != 1]
    if lists:
        raise UserError(
            f"{path}: {name}.{lists[0]} has {tensors[lists[0]].numel()} numbers instead of one",
            code="adapter-alpha-shape",
        )
    ranks = down.shape[:1], up.shape[1:2]
    if min(down.ndim, up.ndim) < 2 or ranks[0] != ranks[1] or 0 in (*down.shape, *up.shape):
        raise UserError(
            f"{path}: the matrices of {name} do not belong together: {tuple(down.shape)} and {tuple(up.shape)}",
            code="adapter-matrices-mismatch",
            fix="save or download the file again",
        )


def fold_middle(path: Path, name: str, middle: Tensor, down: Tensor) -> Tensor:
    """The down matrix (rank, in, k, k) of a LoRA with three: middle (rank, rank, k, k) after down (rank, in, 1, 1)."""
    if (
        middle.ndim != 4
        or middle.shape[1] != down.shape[0]
        or middle.shape[0] != down.shape[0]
        or down[0, 0].numel() != 1
    ):
        raise UserError(
            f"{path}: the matrices of {name} do not belong together: {tuple(down.shape)} and {tuple(middle.shape)}",
            code="adapter-middle-mismatch",
        )
    return torch.einsum("orhw,ri->oihw", middle.float(), down.flatten(1).float())


def write_adapter_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None
) -> None:
    """A safetensors file with sd-scripts' two hashes, or the tensors alone in a pickled one, as `path` ends."""
    if is_pickled(path):
        write_pickle(path, tensors, dtype=dtype)
    else:
        write_safetensors(path, tensors, add_hashes(metadata, tensors, dtype=dtype), dtype=dtype)


def make_unmatched_error(
    file: AdapterFile, names: Iterable[str], other_models: Iterable[str] = (), *, model: str = "this model"
) -> UserError:
    """For layers of a file that the model does not have. other_models: those that have all of them."""
    names = sorted(names)
    others = ", ".join(other_models)
    origin = file.describe_origin()
    fix = f"its layers are those of {others}" if others else "it was made for another model or other layers"
    return UserError(
        f"{file.path}: {len(names)} of {len(file.layers)} names match no layer of {model}: {list_some(names)}"
        + (f" ({origin})" if origin else ""),
        code="adapter-names-unmatched",
        fix=fix,
    )
