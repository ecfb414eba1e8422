"""The interface of adapters, and the engine that attaches them by forward hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.hooks import RemovableHandle

from sfumato.adapters.perturbation import Perturbation
from sfumato.common.registry import Registry
from sfumato.common.text import list_some, plural
from sfumato.config.base import Options
from sfumato.data.batch import Tensors
from sfumato.errors import InternalError
from sfumato.formats.adapter_kind import FileLayer, LayerMatch, LayerTensors, take_whole
from sfumato.formats.groups import Layer, LayerGroup


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Dropout probabilities in training, applied by each layer of a group for itself.

    Random numbers come from torch's global generators: these are reseeded for every micro-step, and checkpointing
    replays them.
    """

    neuron: float = 0.0  # of each value between an adapter's matrices
    rank: float = 0.0  # of each rank, or of each row of the change: its kind says which
    module: float = 0.0  # of the adapter's whole change, for the whole batch
    scales_rows: bool = False  # whether the rows that are left become larger by what was dropped, as ranks always do

    def __bool__(self) -> bool:
        return bool(self.neuron or self.rank or self.module)


NO_DROPOUT = Dropout()


@dataclass(frozen=True, kw_only=True)
class AdapterRequest:
    """What a run's options ask for in one layer group."""

    rank: int  # of --network_dim and the like; each kind says what it means
    alpha: float
    options: Options  # of the kind's own `options_class`
    generator: Generator | None = None  # None: values are not drawn
    inner: Adapter | None = None  # what a wrapper wraps


class Adapter(nn.Module, ABC):
    """A change of the weights of one layer group; knows no family and no file name."""

    label: ClassVar[str]  # in messages and documents
    spellings: ClassVar[Mapping[str, str]] = {}  # the end of a key in files -> the tensor's name here
    plain_spellings: ClassVar[Mapping[str, str]] = {}  # ends that any layer may have: read beside the others alone
    options_class: ClassVar[type[Options]] = Options  # its own arguments in --network_args
    dim_meaning: ClassVar[str] = "the rank"  # of --network_dim
    uses_rank: ClassVar[bool] = True  # whether --network_dim says more than which layers it has
    uses_alpha: ClassVar[bool] = True  # whether --network_alpha has an effect
    dim_arguments: ClassVar[tuple[str, ...]] = ()  # in --network_args, which say the same as --network_dim
    renamed: ClassVar[tuple[str, str]] = ("", "")  # the start of layers' names, and what files of it have instead
    is_wrapper: ClassVar[bool] = False  # whether it changes what another adapter does
    takes_wrappers: ClassVar[bool] = True  # whether one may change what it does
    reads_weights: ClassVar[bool] = False  # whether its change depends on the weights that it is a change of
    starts_from_weights: ClassVar[bool] = False  # whether its first tensors are made from them
    changes_biases: ClassVar[bool] = False  # whether `bias_delta` gives something
    of_norms: ClassVar[bool] = False  # whether it is for norm layers, which no other kind changes, and for them alone
    replaces: ClassVar[str] = ""  # the kind in whose place it comes where `is_wanted`
    files_of: ClassVar[str] = ""  # the kind whose tensors its files have; empty for its own
    plus_params: tuple[str, ...] = ()  # parameters that loraplus_lr_ratio speeds up
    linear_tensors: ClassVar[tuple[str, ...]] = ()  # of files: the change is linear in the first of these that it has
    has_norm_limit: ClassVar[bool] = False  # whether `limit_norm` is implemented
    has_perturbation: ClassVar[bool] = False  # whether `measure_rows` is implemented, which GGPO needs
    dropouts: ClassVar[frozenset[str]] = frozenset()  # the fields of Dropout that have an effect

    alpha: float
    dropout: Dropout = NO_DROPOUT

    def __init__(self, group: LayerGroup) -> None:
        super().__init__()
        self._group = (group,)  # in a tuple: the layers are not this module's children
        self.perturbation: Perturbation | None = None

    @property
    def group(self) -> LayerGroup:
        return self._group[0]

    @property
    @abstractmethod
    def known_rank(self) -> int | None:
        """Its rank; None where the tensors do not say it."""

    def set_dropout(self, dropout: Dropout) -> None:
        self.dropout = dropout

    def configure(self, options: Options) -> None:
        """Take from its own arguments what files do not say of training, whether it is new or from a file."""

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The names and parameters that a learning rate trains; the others stay as they are."""
        yield from self.named_parameters()

    @abstractmethod
    def delta(self, i: int) -> Tensor:
        """The change of the i-th layer's weight at strength 1, in that weight's shape."""

    def bias_delta(self, i: int) -> Tensor | None:
        """The change of the i-th layer's bias at strength 1; None where it has none."""
        return None

    def forward(self, x: Tensor, i: int) -> Tensor:
        """The change of the i-th layer's output at strength 1; subclasses may avoid forming delta."""
        return apply_weight(self.group.layers[i], x, self.delta(i))

    def add_to(self, output: Tensor, x: Tensor, i: int, strength: float | Tensor) -> Tensor:
        """The i-th layer's output for x with this change added, in the output's dtype.

        strength: one number, or (rows,), one for each row of the batch. Subclasses may save a pass over the output.
        """
        return self.add_beside(output, x, i, strength)

    def add_beside(self, output: Tensor, x: Tensor, i: int, strength: float | Tensor) -> Tensor:
        """The same where other adapters have changed the output already: each changes what the layer alone gives, so
        that their order does not count and their sum is what merging them gives."""
        return add_change(output, self(x, i), strength)

    def limit_norm(self, maximum: float) -> tuple[Tensor, Tensor]:
        """Scale the parameters so that the change's norm is at most `maximum`; (norm now, whether it was larger).

        Both 0-d and on the device, so that nothing waits for it.
        """
        raise InternalError(f"{type(self).__name__} has no norm limit")

    def measure_rows(self) -> tuple[Tensor, Tensor]:
        """(rows,) twice: the squared lengths of the rows of the change at strength 1, and of its gradient."""
        raise InternalError(f"{type(self).__name__} does not measure its rows")

    def perturb(self, output: Tensor, x: Tensor, i: int) -> Tensor:
        """The i-th layer's output for x while its weight is perturbed; unchanged but for training with GGPO."""
        if self.perturbation is None or not self.training:
            return output
        noise = self.perturbation.draw(self.group, i, output)
        with torch.no_grad():
            change = apply_weight(self.group.layers[i], x.to(output.dtype), noise)
        return output + change

    @classmethod
    def is_wanted(cls, options: Options, group: LayerGroup | None) -> bool:
        """Of wrappers and replacements: whether their arguments ask for them on this group; None for any group."""
        return False

    @classmethod
    def find_rank_limit(cls, group: LayerGroup) -> int | None:
        """The --network_dim above which the group's adapter can do nothing more; None where there is none."""
        return None

    @classmethod
    def allows_dim(cls, group: LayerGroup, dim: int, options: Options) -> bool:
        """Whether the group can have an adapter with this --network_dim."""
        return True

    @classmethod
    def check(cls, options: Options, groups: Sequence[LayerGroup]) -> None:
        """Raise UserError for arguments without effect on these groups, all that get an adapter."""

    @classmethod
    @abstractmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        """A new adapter, which changes nothing yet."""

    # ------------------------------------------------------------ files

    @property
    def file_name(self) -> str:
        """The name of its layers in files."""
        start, instead = self.renamed
        name = self.group.name
        return instead + name.removeprefix(start) if start and name.startswith(start) else name

    @abstractmethod
    def export_tensors(self) -> Tensors:
        """File suffix -> tensor, e.g. lora_down.weight, alpha."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        """The adapter that `tensors` were saved from, under their names here; their sizes are those of the group.

        inner: what a wrapper wraps, made from the same tensors.
        """

    @classmethod
    def owns(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Of a file's tensors with names of this kind: whether they are its own, where another kind has such names."""
        return True

    @staticmethod
    @abstractmethod
    def complete(layer: FileLayer) -> LayerTensors:
        """A layer of a file in the form that `from_tensors` takes; UserError for a part that is missing or wrong."""

    @staticmethod
    @abstractmethod
    def find_weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The shape of the weight that these tensors change; a kernel may be flattened into its columns.

        0 for a size that they do not tell.
        """

    @staticmethod
    def join(group: LayerGroup, found: Sequence[LayerMatch]) -> LayerTensors:
        """One adapter of the group from those that a file has for its layers; UserError where there is none."""
        return take_whole(group, found)

    @staticmethod
    def to_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """down (rank, columns * kernel) and up (rows, rank), whose product up @ down is the change, in float32.

        None where the change of this kind is no such product.
        """
        return None

    @staticmethod
    def to_peft(match: LayerMatch) -> list[Tensors] | None:
        """For each layer of the match the tensors that diffusers loads; None where it does not know the kind."""
        return None


ADAPTERS: Registry[type[Adapter]] = Registry("kind of adapter")


def add_change(output: Tensor, change: Tensor, strength: float | Tensor) -> Tensor:
    """output + strength * change, in the output's dtype; strength: a number, or one for each row of the batch."""
    change = change.to(output.dtype)
    if isinstance(strength, Tensor):
        return output + change * per_row(strength, change)
    return torch.add(output, change, alpha=strength)


def drop_module(change: Tensor, probability: float) -> Tensor:
    """The change, or 0 with this probability; a factor and no branch, so that every parameter gets a gradient."""
    return change * (torch.rand((), device=change.device) >= probability).to(change.dtype)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """(rows,) -> (rows, 1, ...) in the dtype and on the device of `like` (rows, ...)."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


def apply_weight(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer's operation with another weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)  # pyright: ignore


def remove_bias(layer: Layer, output: Tensor) -> Tensor:
    """The layer's product with its weight alone, from its output."""
    return output if layer.bias is None else output - over_channels(layer, layer.bias).to(output.dtype)


def over_channels(layer: Layer, values: Tensor) -> Tensor:
    """(channels,) -> the shape in which they are multiplied with the layer's input or output."""
    return values.flatten() if isinstance(layer, nn.Linear) else values.reshape(-1, 1, 1)


def has_adapter(layer: nn.Module) -> bool:
    """Whether an engine adds an adapter's change to the layer's output."""
    hooks = (hook.func for hook in layer._forward_hooks.values() if isinstance(hook, partial))
    return any(isinstance(hook, MethodType) and hook.__func__ is AdapterEngine._add for hook in hooks)


class AdapterEngine(nn.Module):
    """Attaches adapters by forward hooks; the networks' own modules and state dicts stay untouched."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.multiplier: float | Tensor = 1.0  # (B,): rows of any layer's batch are sample-major
        self._names_run: set[str] = set()
        self._handles: list[RemovableHandle] = []

    def __iter__(self) -> Iterator[Adapter]:
        for adapter in self.adapters.values():
            assert isinstance(adapter, Adapter)
            yield adapter

    def attach(self, groups: Sequence[LayerGroup], make: Callable[[LayerGroup], Adapter | None]) -> None:
        """Hook every group for which `make` returns an adapter."""
        for group in groups:
            adapter = make(group)
            if adapter is None:
                continue
            assert group.name not in self.adapters, f"the adapter name {group.name} is used twice"
            self.adapters[group.name] = adapter
            for i, layer in enumerate(group.layers):
                add = adapter.add_to if not has_adapter(layer) else adapter.add_beside
                hook = partial(self._add, adapter, add, group.name, i)
                self._handles.append(layer.register_forward_hook(hook))

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _add(
        self,
        adapter: Adapter,
        add: Callable[[Tensor, Tensor, int, float | Tensor], Tensor],
        name: str,
        i: int,
        layer: nn.Module,
        args: tuple[Tensor],
        output: Tensor,
    ) -> Tensor:
        if not torch.compiler.is_compiling():  # a compiled graph with the name in it would serve this layer alone
            self._names_run.add(name)
        strength = self.multiplier
        x = args[0]
        if isinstance(strength, Tensor):
            strength = strength.repeat_interleave(output.shape[0] // strength.shape[0])
        elif strength == 0:
            return output
        return adapter.perturb(add(output, x, i, strength), x, i)

    @contextmanager
    def use_multiplier(self, multiplier: float | Tensor) -> Iterator[None]:
        """Another strength inside the block; only before the main forward, since recomputation must see the same."""
        before, self.multiplier = self.multiplier, multiplier
        try:
            yield
        finally:
            self.multiplier = before

    @torch.no_grad()
    def limit_norms(self, maximum: float) -> dict[str, Tensor]:
        """Scale every change to at most this norm; the values of sd-scripts' curves of it, 0-d and on the device."""
        limited = [adapter.limit_norm(maximum) for adapter in self if is_trainable(adapter)]
        norms = torch.stack([norm for norm, _ in limited])
        was_larger = torch.stack([larger for _, larger in limited])
        return {"keys_scaled": was_larger.sum(), "avg_key_norm": norms.mean(), "max_key_norm": norms.max()}

    @torch.no_grad()
    def update_perturbations(self) -> dict[str, Tensor]:
        """After a step: the perturbations of the next one; the values of sd-scripts' curves of them, 0-d."""
        gradients: list[Tensor] = []
        weights: list[Tensor] = []
        for adapter in self:
            if adapter.perturbation is not None:
                gradient, weight = adapter.perturbation.update(*adapter.measure_rows())
                gradients.append(gradient)
                weights.append(weight)
        if not gradients:
            return {}
        return {"avg_grad_norm": torch.stack(gradients).mean(), "avg_combined_norm": torch.stack(weights).mean()}

    def export_tensors(self) -> Tensors:
        """All entries of an adapter file: <file name>.<suffix> -> tensor, detached."""
        tensors: Tensors = {}
        for adapter in self:
            for suffix, tensor in adapter.export_tensors().items():
                tensors[f"{adapter.file_name}.{suffix}"] = tensor.detach()
        return tensors

    def report(self, unread: Collection[str] = ()) -> list[str]:
        """After the first backward: adapters whose layer never ran, and those that got no gradient.

        unread: adapters of layers that nothing depends on, which is no fault.
        """
        never_run: list[str] = []
        without_gradient: list[str] = []
        for name, adapter in self.adapters.items():
            if name in unread:
                continue
            if not is_trainable(adapter) or any(parameter.grad is not None for parameter in adapter.parameters()):
                continue
            (without_gradient if name in self._names_run else never_run).append(name)
        lines = [f"{plural(len(never_run), 'adapted layer')} never ran: {list_some(never_run)}"] if never_run else []
        if without_gradient:
            lines.append(f"{plural(len(without_gradient), 'adapter')} got no gradient: {list_some(without_gradient)}")
        return lines


@torch.no_grad()
def merge_adapter(adapter: Adapter, multiplier: float = 1.0) -> None:
    """Add an adapter's change to its layers' weights; the sum is rounded once, to the weights' own dtype."""
    layers = adapter.group.layers
    deltas = [adapter.delta(i).to(layer.weight.device) for i, layer in enumerate(layers)]  # which may read the weights
    for i, (layer, delta) in enumerate(zip(layers, deltas, strict=True)):
        precise = torch.promote_types(layer.weight.dtype, torch.float32)
        layer.weight.copy_(layer.weight.to(precise) + multiplier * delta)
        bias_delta = adapter.bias_delta(i)
        if bias_delta is not None:
            assert layer.bias is not None
            layer.bias.copy_(layer.bias + multiplier * bias_delta.to(layer.bias.device))


def is_trainable(adapter: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in adapter.parameters())
