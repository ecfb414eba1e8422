"""Weights and optimizer state of DeepSpeed's engine, as those of an optimizer that steps whole weights."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sfumato.errors import UserError
from sfumato.optim.optimizers import check_saved_class, class_name, group_sizes

WEIGHT = ""  # the key of a weight itself, beside those of its state


class EngineTensor(Tensor):
    """Stands for a whole tensor of which each process has a part: its shape and dtype, and nothing else."""

    parameter: nn.Parameter
    key: str  # of the optimizer's state, or WEIGHT

    def detach(self) -> EngineTensor:
        """It has no gradient."""
        return self


def make_engine_tensor(parameter: nn.Parameter, key: str) -> EngineTensor:
    empty = torch.empty(read_shape(parameter), dtype=torch.float32, device="meta")
    tensor = torch.Tensor._make_subclass(EngineTensor, empty)
    tensor.parameter, tensor.key = parameter, key
    return tensor


def read_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole weight, of which stage 3 leaves none in the parameter."""
    return vars(parameter).get("ds_shape", parameter.shape)


class ZeroState:
    """What the engine has of trained weights and of the state of its optimizer; part of a run's state.

    Made before the engine, which gives the optimizer other parameters.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.groups: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
        self.trained = {id(parameter) for group in self.groups for parameter in group}
        self.access = importlib.import_module("deepspeed.utils")
        self.engine: Any = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """In the order of the optimizer's groups."""
        return [parameter for group in self.groups for parameter in group]

    # ---------------------------------------------------------------- whole tensors

    def gather(self, shared: EngineTensor) -> Tensor:
        """All processes call it at the same time."""
        if shared.key == WEIGHT:
            whole = self.access.safe_get_full_fp32_param(shared.parameter)
        else:
            whole = self.access.safe_get_full_optimizer_state(shared.parameter, shared.key)
        return whole.reshape(shared.shape)

    def mark_weights(self, module: nn.Module, state: dict[str, Any], prefix: str, facts: Any) -> None:
        """A hook of `state_dict`: trained weights become what stands for the engine's own in float32."""
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in self.trained and prefix + name in state:
                state[prefix + name] = make_engine_tensor(parameter, WEIGHT)

    def set_weights(self, exact: Mapping[nn.Parameter, Tensor]) -> None:
        """Set the float32 copies of these weights."""
        for parameter, value in exact.items():
            self._set(parameter, value, WEIGHT)

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        value = value.to(self.engine.device, torch.float32)
        if "ds_id" not in vars(parameter):
            if key == WEIGHT:
                self.access.safe_set_full_fp32_param(parameter, value)
            else:
                self.access.safe_set_full_optimizer_state(parameter, value, key)
            return
        size = parameter.partition_numel()  # pyright: ignore[reportAttributeAccessIssue]  (DeepSpeed adds it)
        rank, flat = torch.distributed.get_rank(), value.flatten()
        piece = flat[rank * size : (rank + 1) * size]
        piece = nn.functional.pad(piece, (0, size - len(piece)))  # the last one is filled up
        if key == WEIGHT:
            self.access.safe_set_local_fp32_param(parameter, piece)
        else:
            self.access.safe_set_local_optimizer_state(parameter, piece, key)

    # ---------------------------------------------------------------- part of a run's state

    def state_dict(self) -> dict[str, Any]:
        """As that of the optimizer if it stepped the weights themselves."""
        example, flat_shape = self._read_example()
        by_number: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(self.parameters if example else ()):
            by_number[number] = {
                key: make_engine_tensor(parameter, key) if is_of_weights(value, flat_shape) else value
                for key, value in example.items()
            }
        groups: list[dict[str, Any]] = []
        first = 0
        for group, parameters in zip(self.optimizer.param_groups, self.groups, strict=True):
            numbers = list(range(first, first + len(parameters)))
            groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": numbers})
            first += len(parameters)
        return {"class": class_name(self.optimizer), "state": {"state": by_number, "param_groups": groups}}

    def load_state_dict(self, saved: dict[str, Any], /) -> None:
        check_saved_class(self.optimizer, saved["class"])
        state = saved["state"]
        if group_sizes(state["param_groups"]) != [len(group) for group in self.groups]:
            raise UserError(
                "the state was saved with other parts or layers in training",
                code="resume-engine-mismatch",
                fix="train the same parts, or start without --resume",
            )
        by_number: Mapping[int, Mapping[str, Any]] = state["state"]
        if not by_number:
            return
        values = by_number[min(by_number)]
        shape = read_shape(self.parameters[min(by_number)])
        for flat in self._list_flat():
            self.optimizer.state[flat] = {
                key: torch.zeros_like(flat) if is_of_weights(value, shape) else copy.deepcopy(value)
                for key, value in values.items()
            }
        self._link_state()
        for number, parameter in enumerate(self.parameters):
            for key, value in by_number.get(number, {}).items():
                if is_of_weights(value, read_shape(parameter)):
                    self._set(parameter, value, key)

    def _read_example(self) -> tuple[Mapping[str, Any], torch.Size]:
        """What the optimizer has of one of its flat parameters, and the shape of that; empty before the first step."""
        for flat, values in self.optimizer.state.items():
            if values:
                return values, flat.shape
        return {}, torch.Size()

    def _list_flat(self) -> Iterator[nn.Parameter]:
        """What the engine's optimizer steps: flat pieces of all weights of a group."""
        zero = vars(self.engine.optimizer)
        name = "fp32_partitioned_groups_flat" if "fp32_partitioned_groups_flat" in zero else FLAT_OF_STAGE_2
        yield from zero[name]

    def _link_state(self) -> None:
        """Let the engine find its parameters' pieces of a state that it has not made itself."""
        zero = self.engine.optimizer
        if "bit16_groups" not in vars(zero):
            return
        for parameters, flat in zip(zero.bit16_groups, self._list_flat(), strict=True):
            for parameter in parameters:
                if parameter._hp_mapping is not None:
                    parameter._hp_mapping.set_optim_state_fragment(flat, self.optimizer.state[flat])


FLAT_OF_STAGE_2 = "single_partition_of_fp32_groups"


def is_of_weights(value: Any, shape: torch.Size) -> bool:
    """Whether a value of an optimizer's state has a number for each of the parameter's."""
    return isinstance(value, Tensor) and value.shape == shape and value.dim() > 0
