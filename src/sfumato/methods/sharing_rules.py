"""What does not go together where processes share out a model, and why: checked in the plan, shown in the docs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sfumato.config import Config
from sfumato.config.process_rules import ENGINES, FSDP2, ZERO_3, name_engine, name_engine_option
from sfumato.data.plans import DataPlan
from sfumato.errors import UserError
from sfumato.families.blueprint import Blueprint
from sfumato.methods.base import Method, TrainablePart
from sfumato.optim.optimizers import choose_optimizer

# Packages whose optimizers compute each number of a weight from that number, its gradient and its state alone.
ELEMENTWISE_PACKAGES = ("torch", "lion_pytorch", "schedulefree", "deepspeed")
NOT_ELEMENTWISE = ("Adafactor", "LBFGS", "Muon", "SparseAdam")  # of torch
FEWER_BITS = ("fp8_base", "fp8_base_unet", "fp8_scaled", "fp8_compute", "int8_base", "int8_compute", "nf4_base")
METHODS_WITH_SHARES = ("adapter", "full")
ZERO = ENGINES[1:]
SHARING_WEIGHTS = (FSDP2, ZERO_3)  # where no process has the whole denoiser


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
    """One thing that does not go together with some of ENGINES."""

    code: str  # of the error
    name: str  # the options, as a table names them
    reason: str  # a sentence
    fix: str  # {engine}: the option that asks for it
    is_broken: Callable[[Planned], bool]
    engines: tuple[str, ...] = SHARING_WEIGHTS


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
        fix="remove {engine}: what trains is small, and --blocks_to_swap saves memory",
        is_broken=lambda p: p.config.run.method not in METHODS_WITH_SHARES,
        engines=ENGINES,
    ),
    SharingRule(
        code="sharing-optimizer",
        name="--optimizer_type AdaFactor, Prodigy, DAdaptation, CAME, 8 bits (FSDP2: but for adapters)",
        reason="the optimizer looks at many numbers of a weight together, and each process has some of them",
        fix="--optimizer_type AdamW or Lion; with --fsdp an adapter trains with any",
        is_broken=lambda p: (p.trains_denoiser or p.config.processes.deepspeed) and not steps_each_number(p.config),
        engines=ENGINES,
    ),
    SharingRule(
        code="sharing-schedule-free",
        name="--optimizer_type AdamWScheduleFree and its like",
        reason="the engine cannot give its weights the average that such an optimizer evaluates and saves",
        fix="--optimizer_type AdamW, or train with --fsdp",
        is_broken=lambda p: p.config.optim.schedule_free,
        engines=ZERO,
    ),
    SharingRule(
        code="sharing-ema",
        name="--ema_decay, --ema_sigma_rel",
        reason="the engine keeps the weights that are averaged in float32, in pieces of its own",
        fix="remove the option, or train with --fsdp",
        is_broken=lambda p: p.config.ema.ema_count > 0,
        engines=ZERO,
    ),
    SharingRule(
        code="sharing-half-weights",
        name="--full_bf16, --full_fp16",
        reason="the engine computes in half precision and keeps weights in float32 beside that",
        fix="--mixed_precision alone, or train with --fsdp",
        is_broken=lambda p: p.config.memory.trained_precision != "no",
        engines=ZERO,
    ),
    SharingRule(
        code="sharing-uncertainty",
        name="--uncertainty_weighting",
        reason="the engine would clip the learned weights of the loss with the gradients of the model",
        fix="remove the option, or train with --fsdp",
        is_broken=lambda p: p.config.loss.uncertainty_weighting,
        engines=ZERO,
    ),
    SharingRule(
        code="sharing-norm-limit",
        name="--scale_weight_norms, --network_args ggpo_sigma",
        reason="what is changed after a step or read from gradients is the engine's, which keeps copies of it",
        fix="remove the option, or train with --fsdp",
        is_broken=lambda p: bool(p.config.network.scale_weight_norms) or "ggpo_sigma" in p.config.network.network_args,
        engines=ZERO,
    ),
    SharingRule(
        code="sharing-stopped-encoder",
        name="--stop_text_encoder_training",
        reason="the engine expects the same weights to train at every step",
        fix="remove the option, or train with --fsdp",
        is_broken=lambda p: p.config.full.stop_text_encoder_training is not None,
        engines=ZERO,
    ),
    SharingRule(
        code="sharing-compiled-blocks",
        name="--compile",
        reason="the engine fetches weights in hooks between layers, which blocks that are compiled have not",
        fix="remove the option, or train with --fsdp",
        is_broken=lambda p: p.config.memory.compile,
        engines=(ZERO_3,),
    ),
    SharingRule(
        code="sharing-block-swap",
        name="--blocks_to_swap, --stream_blocks",
        reason="blocks that wait in main memory are whole, and here each process has some rows of them",
        fix="remove the option; --fsdp_offload_params and --offload_param_device keep weights in main memory",
        is_broken=lambda p: bool(p.config.memory.swapped_blocks),
        engines=ENGINES,
    ),
    SharingRule(
        code="sharing-low-precision",
        name="--fp8_base, --int8_base, --nf4_base and their like, checkpoints in fewer bits",
        reason="rows of weights in fewer bits are not sent from process to process",
        fix="remove the option, or {engine}: a denoiser in fewer bits needs less memory than one that is shared by two",
        is_broken=lambda p: not p.trains_denoiser and has_low_precision(p),
        engines=ENGINES,
    ),
    SharingRule(
        code="sharing-base-weights",
        name="--base_weights",
        reason="what is merged into a weight needs the whole of it",
        fix="merge the file into the checkpoint once, or give it as a frozen adapter",
        is_broken=lambda p: bool(p.config.network.base_weights),
        engines=(FSDP2,),
    ),
    SharingRule(
        code="sharing-reading-adapter",
        name="adapters whose change depends on the weights or starts from them",
        reason="the adapter is made from the whole weights that it changes, which no process has",
        fix="another --network_module, or remove {engine}",
        is_broken=lambda p: any(part.reads_weights for part in p.parts),
    ),
    SharingRule(
        code="sharing-preservation",
        name="diff_output_preservation, --preserve_reg_images, --masked_prior_preservation_weight",
        reason="the model before training is asked for some images alone, and here all processes have to ask together",
        fix="remove the option or {engine}",
        is_broken=lambda p: p.data.has_preserved_samples or bool(p.config.loss.masked_prior_preservation_weight),
    ),
)


def has_low_precision(planned: Planned) -> bool:
    """Whether the denoiser's weights would be kept in fewer bits."""
    denoiser = planned.blueprint.networks["denoiser"]
    return any(planned.config.value(name) for name in FEWER_BITS) or denoiser.weights.has_formats


def list_broken_sharing_rules(planned: Planned) -> Iterator[UserError]:
    """An error for each; none where the weights are not shared out."""
    engine = name_engine(planned.config)
    if engine is None or planned.data.processes == 1:
        return
    option = name_engine_option(engine)
    for rule in SHARING_RULES:
        if engine in rule.engines and rule.is_broken(planned):
            fix = rule.fix.replace("{engine}", option)
            yield UserError(f"{engine} and {rule.name}: {rule.reason}", code=rule.code, fix=fix)


def format_sharing_table() -> Iterator[str]:
    """What does not go together with which engine, in Markdown."""
    yield "| | not with | why |"
    yield "|---|---|---|"
    for rule in SHARING_RULES:
        yield f"| {rule.name.replace('|', '/')} | {list_engines(rule.engines)} | {rule.reason} |"


def list_engines(engines: Sequence[str]) -> str:
    """For instance "FSDP2, ZeRO 3", and "any" for all."""
    return "any" if set(engines) == set(ENGINES) else ", ".join(engines)
