"""What cannot be trained by several processes, or where they share out the weights, and why: checked in the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sfumato.config import Config
from sfumato.data.plans import DataPlan
from sfumato.errors import UserError
from sfumato.families.blueprint import Blueprint
from sfumato.methods.base import Method, TrainablePart
from sfumato.optim.optimizers import choose_optimizer

# Packages whose optimizers compute each number of a weight from that number, its gradient and its state alone.
ELEMENTWISE_PACKAGES = ("torch", "lion_pytorch", "schedulefree")
NOT_ELEMENTWISE = ("Adafactor", "LBFGS", "Muon", "SparseAdam")  # of torch
FEWER_BITS = ("fp8_base", "fp8_base_unet", "fp8_scaled", "fp8_compute", "int8_base", "int8_compute", "nf4_base")
METHODS_WITH_SHARES = ("adapter", "full")


class Planned(NamedTuple):
    """What a rule looks at."""

    config: Config
    blueprint: Blueprint
    method: Method
    parts: Sequence[TrainablePart]
    data: DataPlan

    @property
    def trains_denoiser(self) -> bool:
        """Whether the weights that are shared out train themselves."""
        return "denoiser" in self.method.full_precision_parts(self.blueprint)


@dataclass(frozen=True, kw_only=True)
class SharingRule:
    """One thing that does not go together with sharing out weights."""

    code: str  # of the error
    name: str  # the options, as a table names them
    reason: str  # a sentence
    fix: str
    is_broken: Callable[[Planned], bool]


def steps_each_number(config: Config) -> bool:
    """Whether the optimizer steps each number of a weight by itself, so that any piece of a weight can step alone."""
    choice = choose_optimizer(config.optim).optimizer_class
    package = choice.__module__.partition(".")[0]
    return package in ELEMENTWISE_PACKAGES and choice.__name__ not in NOT_ELEMENTWISE


SHARING_RULES = (
    SharingRule(
        code="sharing-method",
        name="ControlNet, LLLite, textual inversion, LECO, sliders",
        reason="these copy the denoiser's weights or call it as often as the images of one process ask for",
        fix="remove --fsdp: what trains is small, and --blocks_to_swap saves memory",
        is_broken=lambda p: p.config.run.method not in METHODS_WITH_SHARES,
    ),
    SharingRule(
        code="sharing-optimizer",
        name="--optimizer_type with a look at whole weights (AdaFactor, Prodigy, DAdaptation, CAME, 8 bits)",
        reason="the optimizer looks at many numbers of a weight together, and each process has some rows of it",
        fix="--optimizer_type AdamW, Lion or AdamWScheduleFree, or train an adapter",
        is_broken=lambda p: p.trains_denoiser and not steps_each_number(p.config),
    ),
    SharingRule(
        code="sharing-block-swap",
        name="--blocks_to_swap, --stream_blocks",
        reason="blocks that wait in main memory are whole, and here each process has some rows of them",
        fix="--fsdp_offload_params",
        is_broken=lambda p: bool(p.config.memory.swapped_blocks),
    ),
    SharingRule(
        code="sharing-low-precision",
        name="--fp8_base, --int8_base, --nf4_base and their like, checkpoints in fewer bits",
        reason="rows of weights in fewer bits are not sent from process to process",
        fix="remove the option, or --fsdp: a denoiser in fewer bits needs less memory than one that is shared by two",
        is_broken=lambda p: not p.trains_denoiser and has_low_precision(p),
    ),
    SharingRule(
        code="sharing-base-weights",
        name="--base_weights",
        reason="what is merged into a weight needs the whole of it",
        fix="merge the file into the checkpoint once, or give it as a frozen adapter",
        is_broken=lambda p: bool(p.config.network.base_weights),
    ),
    SharingRule(
        code="sharing-reading-adapter",
        name="adapters whose change depends on the weights or starts from them",
        reason="the adapter is made from the whole weights that it changes, which no process has",
        fix="another --network_module, or remove --fsdp",
        is_broken=lambda p: any(part.reads_weights for part in p.parts),
    ),
    SharingRule(
        code="sharing-preservation",
        name="diff_output_preservation, --preserve_reg_images, --masked_prior_preservation_weight",
        reason="the model before training is asked for some images alone, and here all processes have to ask together",
        fix="remove the option or --fsdp",
        is_broken=lambda p: p.data.has_preserved_samples or bool(p.config.loss.masked_prior_preservation_weight),
    ),
)


def has_low_precision(planned: Planned) -> bool:
    """Whether the denoiser's weights would be kept in fewer bits."""
    denoiser = planned.blueprint.networks["denoiser"]
    return any(planned.config.value(name) for name in FEWER_BITS) or denoiser.weights.has_formats


def list_broken_sharing_rules(planned: Planned) -> Iterator[UserError]:
    """An error for each; none where the weights are not shared out."""
    if not planned.config.processes.fsdp or planned.data.processes == 1:
        return
    for rule in SHARING_RULES:
        if rule.is_broken(planned):
            yield UserError(f"--fsdp and {rule.name}: {rule.reason}", code=rule.code, fix=rule.fix)
