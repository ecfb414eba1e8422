"""Adapter files of any program, read into one form: for each layer's name the tensors under their names here.

What a name belongs to is another question, which needs the model: see adapter_layers.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sfumato.common.text import list_some, plural
from sfumato.errors import UserError
from sfumato.formats.adapter_keys import (
    ALPHA,
    COMMON_SPELLINGS,
    CONTROL_PREFIX,
    SCALAR,
    find_foreign_kind,
    guess_contents,
    guess_writer,
    parse_adapter_key,
    unwrap_layer,
)
from sfumato.formats.adapter_kind import (
    AdapterKind,
    FileLayer,
    Kinds,
    LayerTensors,
    collect_spellings,
    find_kinds,
    list_tensor_names,
)
from sfumato.formats.checkpoint import Checkpoint, open_checkpoint
from sfumato.formats.peft_config import PeftConfig, read_diffusers_configs, read_peft_config

PEFT_CONFIG = "adapter_config.json"
FOLDER_FILES = (  # in the order of preference; PEFT's and diffusers' names
    "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin",
)  # fmt: skip
LAYER_PREFIXES = ("lora_", "lycoris_", "base_model.model.")  # of keys that belong to networks, whatever follows


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """One adapter; for each of its layers the tensors that its kinds have here, and nothing else."""

    path: Path
    layers: Mapping[str, LayerTensors]  # by the layer's name in the file
    kinds: Mapping[str, Kinds]  # the same
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
        what = plural(count, "tensor is", "tensors are")
        return [f"{self.path}: {what} no adapter and not used: {list_some(self.passed_over)}"] if count else []

    def find_weight_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the weight that a layer of the file changes, of all its layers stacked."""
        return self.kinds[name][-1].find_weight_shape(self.layers[name])


def parse_adapter_file(path: Path, kinds: Sequence[AdapterKind]) -> AdapterFile:
    """A file, or a folder of PEFT or diffusers, as any program writes it; `kinds` are all that are known.

    Raises UserError where there is no adapter, one of a foreign kind, or only half of one, and for values that are not
    finite.
    """
    files = [_read_file(file, network, kinds) for file, network in find_adapter_files(path)]
    layers: dict[str, LayerTensors] = {}
    kinds_by_layer: dict[str, Kinds] = {}
    for file in files:
        layers |= file.layers
        kinds_by_layer |= file.kinds
    return replace(
        files[0],
        path=path,
        layers=layers,
        kinds=kinds_by_layer,
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


def _read_file(path: Path, network: str, kinds: Sequence[AdapterKind]) -> AdapterFile:
    spellings = {**COMMON_SPELLINGS, **collect_spellings(kinds)}
    layers: dict[str, LayerTensors] = defaultdict(dict)
    others: list[str] = []
    with open_checkpoint(path) as file:
        keys, metadata = tuple(file.header.tensors), file.header.metadata
        for key in keys:
            parsed = parse_adapter_key(key, spellings)
            if parsed is None:
                others.append(key)
                continue
            name, tensor = parsed
            name = f"{network}.{name}" if network else name
            if tensor in layers[name]:
                raise UserError(f"{path} holds {tensor} of {name} twice", code="adapter-tensor-twice")
            layers[name][tensor] = file.read(key)
        found = {name: find_kinds(tensors, kinds) for name, tensors in layers.items()}
        others = _read_plain(file, others, layers, found)
    result = AdapterFile(path=path, layers=layers, kinds=found, passed_over=tuple(others), keys=keys, metadata=metadata)
    _check_kinds(result, kinds)
    _check_others(result)
    configs = _read_configs(path, metadata)
    complete = {name: _complete_layer(path, name, layers[name], found[name], configs) for name in layers}
    return replace(result, layers=complete)


def _read_plain(
    file: Checkpoint, keys: Sequence[str], layers: Mapping[str, LayerTensors], found: Mapping[str, Kinds]
) -> list[str]:
    """Read the tensors whose names say something only beside others of their kind; the keys that are none."""
    others: list[str] = []
    for key in keys:
        layer, _, end = key.rpartition(".")
        name = unwrap_layer(layer)
        plain = next((kind.plain_spellings[end] for kind in found.get(name, ()) if end in kind.plain_spellings), None)
        if plain is None:
            others.append(key)
        else:
            layers[name][plain] = file.read(key)
    return others


def _check_kinds(file: AdapterFile, known: Sequence[AdapterKind]) -> None:
    """UserError for a file that holds no adapter, for one of a foreign kind, and for layers of two kinds at once."""
    if not file.keys:
        raise UserError(f"{file.path} holds no tensors", code="adapter-file-empty", fix="save or download it again")
    foreign = Counter(next(filter(None, map(find_foreign_kind, tensors)), "") for tensors in file.layers.values())
    del foreign[""]
    if foreign:
        text = " and ".join(f"{name} ({plural(count, 'layer')})" for name, count in foreign.items())
        raise UserError(
            f"{file.path} is of the kind {text}; only {', '.join(kind.label for kind in known)} are supported",
            code="adapter-kind-unsupported",
            fix="merge it into the model with the program that made it, or give one of a supported kind",
        )
    if not any(file.kinds.values()) or all(key.startswith(CONTROL_PREFIX) for key in file.keys):
        contents = guess_contents(file.keys)
        raise UserError(
            f"{file.path} holds no adapter" + (f" but {contents}" if contents else f": {list_some(file.keys)}"),
            code="adapter-file-without-adapter",
            fix="give an adapter file",
        )
    for name, kinds in file.kinds.items():
        if len([kind for kind in kinds if not kind.is_wrapper]) != 1:
            raise UserError(
                f"{file.path}: {name} has {', '.join(file.layers[name])}, which make no adapter of one kind",
                code="adapter-kind-unclear",
                fix="save or download the file again",
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
            f"{path} holds {plural(len(keys), 'more tensor')} of its networks, without which the result would be "
            "wrong: " + list_some(keys),
            code="adapter-with-whole-weights",
            fix="merge it into the model with the program that made it",
        )


def _read_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """Network, or "" for all -> what is stored beside the adapter about its scale."""
    beside = path.with_name(PEFT_CONFIG)
    if path.name in FOLDER_FILES[:2] and beside.is_file():
        return {"": read_peft_config(beside)}
    return read_diffusers_configs(path, metadata)


def _complete_layer(
    path: Path, name: str, tensors: LayerTensors, kinds: Kinds, configs: Mapping[str, PeftConfig]
) -> LayerTensors:
    """The tensors that each of the layer's kinds has here, checked."""
    broken = [tensor for tensor, values in tensors.items() if not values.float().isfinite().all()]
    if broken:
        raise UserError(
            f"{path}: {name}.{broken[0]} has values that are not finite (NaN or infinite)",
            code="adapter-not-finite",
            fix="use an earlier save of it",
        )
    lists = [tensor for tensor in (ALPHA, SCALAR) if tensor in tensors and tensors[tensor].numel() != 1]
    if lists:
        raise UserError(
            f"{path}: {name}.{lists[0]} has {plural(tensors[lists[0]].numel(), 'number')} instead of one",
            code="adapter-alpha-shape",
        )
    network, _, rest = name.partition(".")
    complete: LayerTensors = {}
    for kind in kinds:
        own = {each: tensors[each] for each in tensors if each in {*list_tensor_names(kind), SCALAR}}
        config = configs.get("") or configs.get(network)
        config_name = name if "" in configs else rest
        complete |= kind.complete(FileLayer(path=path, name=name, tensors=own, config=config, config_name=config_name))
    return complete


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
