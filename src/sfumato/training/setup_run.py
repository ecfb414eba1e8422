"""Everything before the first step: checks, model, caches, optimizer, and what a saved state brings back."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from sfumato import plan
from sfumato.config import Config
from sfumato.config.prompts import read_prompts
from sfumato.config.secrets import secrets_of
from sfumato.data.ss_metadata import metadata as data_metadata
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.recipe import make_recipe
from sfumato.diffusion.uncertainty import NAME, Uncertainty, make_uncertainty, resume_uncertainty
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenText
from sfumato.formats.metadata import Facts, named_files, training_metadata
from sfumato.formats.outputs import Plan as SavePlan
from sfumato.formats.outputs import make_plan, retention
from sfumato.formats.state import load_state, newest_complete
from sfumato.memory.checkpointing import checkpoint_blocks
from sfumato.memory.host import keep_freed_memory
from sfumato.methods.base import Method
from sfumato.optim.ema import Averages
from sfumato.optim.groups import ParameterGroup
from sfumato.optim.optimizers import describe, make_optimizer, restore
from sfumato.optim.rates import Rates, make_rates
from sfumato.optim.rounding import keep_in_bfloat16, make_rounding
from sfumato.track.best import Best
from sfumato.track.console import set_up
from sfumato.track.hub import Hub, fetch_state
from sfumato.track.journal import Journal
from sfumato.track.progress import Progress
from sfumato.track.report import Report
from sfumato.track.report_facts import Remembered, describe_run, remember_warnings
from sfumato.track.trackers import make_trackers
from sfumato.training.caching import make_held_out, make_loader
from sfumato.training.nonfinite import Health, Proof
from sfumato.training.run import DTYPES, Run
from sfumato.training.start_point import Beginning, beginning, told

log = logging.getLogger(__name__)


def open_run(config: Config) -> Run | None:
    """Check what can be checked without weights, then load; None when a resumed run has nothing left to do."""
    checked = check(config)
    if checked is None:
        return None
    config, outlook, state, begun = checked.config, checked.outlook, checked.state, checked.begun
    method, device = outlook.method, checked.device
    assert config.loop.seed is not None
    assert config.save.output_dir is not None
    model, groups = load(checked)
    uncertainty = make_uncertainty(config.loss, config.loop.seed, device)
    optimizer = make_optimizer(config.optim, [*groups, *uncertainty_groups(config, uncertainty)])
    rates = make_rates(config.optim, optimizer, outlook.total - begun.schedule)
    scaler = GradScaler(device.type, enabled=config.memory.mixed_precision == "fp16")
    parameters = [parameter for group in groups for parameter in group.parameters]
    if state:
        take_over(state, method, uncertainty, optimizer, rates, scaler)
    frozen_text = FrozenText(model, weighted=config.captions.weighted_captions)
    if config.cache.cache_text_encoder_outputs:
        read_prompts_beforehand(config, method, frozen_text)
    processes = checked.processes
    loader = make_loader(config, outlook.data, outlook.total, model, method, processes, began=begun.data)
    return Run(
        config=config,
        processes=processes,
        outlook=outlook,
        model=model,
        method=method,
        recipe=make_recipe(config.noise, config.loss, model.objective, config.model.guidance_scale, uncertainty),
        randomness=Randomness(config.loop.seed),
        optimizer=optimizer,
        rates=rates,
        rounding=make_rounding(config.memory, optimizer, config.loop.seed),
        scaler=scaler,
        parameters=parameters,
        averages=resumed_averages(config, parameters, state),
        health=Health(limit=config.loop.max_bad_steps),
        proof=Proof(optimizer),
        loader=loader,
        held_out=make_held_out(config, outlook.data, loader, processes),
        best=Best(**state.get("best", {})),
        frozen_text=frozen_text,
        journal=open_journal(checked),
        hub=Hub(config.hub, secrets_of(config)),
        saves=checked.saves,
        metadata=training_metadata(config, facts_of(config, outlook, optimizer)),
        named_files=ThreadPoolExecutor(1).submit(named_files, config.model),
        output=config.save.output_dir,
        begun=begun,
        total=outlook.total,
        steps_per_epoch=steps_per_epoch(config, outlook),
    )


def check(config: Config) -> Checked | None:
    """Everything that can be wrong before weights are read; None when a resumed run has nothing left to do."""
    config = plan.with_seed(config)
    patience = config.processes.ddp_timeout
    processes = open_processes(patience)
    set_up(config.log, main_process=processes.is_main_process, secrets=secrets_of(config))
    if patience is not None and processes.num_processes == 1:
        log.info("note: --ddp_timeout has no effect: there is one process")
    warnings = remember_warnings()
    outlook = plan.look(config, processes=processes.num_processes)
    saves = make_plan(config.save, -(-outlook.total // steps_per_epoch(config, outlook)))
    report(config, outlook, saves)
    if processes.is_main_process:
        plan.draw_timesteps(config, outlook)
    state = resumed_state(config, outlook.total)
    begun = beginning(config, outlook.data, state)
    if begun.step >= outlook.total:
        log.info("nothing left to do: training was complete at step %d of %d", begun.step, outlook.total)
        return None
    if begun != Beginning.of(state):
        log.warning("%s", told(begun))
    return Checked(
        config=config,
        processes=processes,
        outlook=outlook,
        saves=saves,
        state=state,
        begun=begun,
        warnings=warnings,
    )


def load(checked: Checked) -> tuple[Family, Sequence[ParameterGroup]]:
    """The model on its device, prepared by the method, and what trains."""
    config, outlook = checked.config, checked.outlook
    if checked.device.type == "cpu":
        keep_freed_memory()
    own = torch.bfloat16 if config.memory.full_bf16 else torch.float32
    blueprint = outlook.blueprint.with_dtype(outlook.method.own_weights(outlook.blueprint), own)
    dtype = DTYPES[config.memory.mixed_precision]
    model = outlook.family.load(blueprint, config.model, dtype=dtype, device=checked.device)
    model.expect(dataset.settings.resolution for dataset in outlook.data.datasets)
    groups = outlook.method.prepare(model)
    if config.memory.full_bf16:
        keep_in_bfloat16(groups)
    if config.memory.gradient_checkpointing:
        for part in model.parts.values():
            checkpoint_blocks(part.module, part.spec.blocks)
    return model, groups


def read_prompts_beforehand(config: Config, method: Method, frozen_text: FrozenText) -> None:
    """Encode the prompts of the previews while the encoders whose output is cached are still on the device."""
    path = config.samples.sample_prompts
    for prompt in read_prompts(path) if path else ():
        for text, negative in ((prompt.prompt, False), (prompt.negative_prompt, True)):
            for part in set(frozen_text.model.text_parts) - method.live_text:
                frozen_text.encode(
                    part, [method.caption(text)], weighted=config.samples.prompt_weighting, negative=negative
                )


def facts_of(config: Config, outlook: plan.Outlook, optimizer: Optimizer) -> Facts:
    """What a saved file says beyond the options, the checkpoint's name and hashes excepted."""
    return Facts(
        session_id=random.SystemRandom().randrange(2**32),
        started_at=time.time(),
        total_steps=outlook.total,
        epochs=-(-outlook.total // steps_per_epoch(config, outlook)),
        base_model_version=outlook.blueprint.base_model_version,
        optimizer=describe(optimizer, config.optim.optimizer_args),
        data=data_metadata(outlook.data),
        family=outlook.blueprint.metadata,
        method=outlook.method.metadata(),
    )


def open_processes(patience: int | None = None) -> PartialState:
    """This process alone, or its place among those that a launcher started; a launch that stayed alone is refused.

    patience: minutes that each waits for the others; torch's own without it.
    """
    limits = {} if patience is None else {"timeout": timedelta(minutes=patience)}
    processes = PartialState(cpu=not torch.cuda.is_available(), **limits)
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != processes.num_processes:
        raise UserError(
            f"{asked} processes were launched, but they do not know of each other",
            fix="launch with torchrun --nproc_per_node N",
        )
    return processes


def steps_per_epoch(config: Config, outlook: plan.Outlook) -> int:
    return outlook.data.steps_per_epoch(config.loop.gradient_accumulation_steps)


def report(config: Config, outlook: plan.Outlook, saves: SavePlan) -> None:
    """The same tables that `sfumato plan` prints, before anything is loaded."""
    kept = retention(saves, states=config.save.save_state)
    for line in (*plan.data_lines(config, outlook.data), *plan.model_lines(outlook), *kept):
        log.info("%s", line)
    log.info("seed %d", config.loop.seed)


def resumed_state(config: Config, total: int) -> dict[str, Any]:
    """What --resume brings back, {} for a fresh run; each option that differs from the saved run is named."""
    if config.save.resume is None:
        return {}
    path, hub = config.save.resume, config.hub
    folder = newest_complete(fetch_state(hub, path, secrets_of(config)) if hub.resume_from_huggingface else path)
    state, info = load_state(folder)
    log.info("resuming from %s, step %d of %d", folder, state["step"], total)
    before, now = info["options"], plan.public_options(config)
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            log.warning("--%s was %s, now it is %s", name, before.get(name, "not set"), now.get(name, "not set"))
    return state


def uncertainty_groups(config: Config, uncertainty: Uncertainty | None) -> Iterator[ParameterGroup]:
    """It learns at its own rate, and is not drawn to 0."""
    if uncertainty:
        rate, parameters = config.loss.uncertainty_lr, list(uncertainty.parameters())
        yield ParameterGroup(name=NAME, parameters=parameters, learning_rate=rate, decays=False)


def take_over(
    state: dict[str, Any],
    method: Method,
    uncertainty: Uncertainty | None,
    optimizer: Optimizer,
    rates: Rates,
    scaler: GradScaler,
) -> None:
    """Everything that trains, as it was saved; each part of the state goes as soon as it is read."""
    resume_uncertainty(uncertainty, state.pop("uncertainty", {}))
    method.load_state(state.pop("weights"))
    restore(optimizer, state.pop("optimizer"), state["optimizer_class"])
    rates.load_state_dict(state["rates"])
    if state["scaler"]:  # empty where the saved run was not in fp16
        scaler.load_state_dict(state["scaler"])


def resumed_averages(config: Config, parameters: Sequence[nn.Parameter], state: dict[str, Any]) -> Averages:
    """Those that the options ask for, as the saved state left them."""
    averages = Averages(config.ema, parameters)
    new = averages.load_state_dict(state.pop("averages", {}))
    for suffix in new if state else ():
        log.warning("the saved state has no %s: it begins at step %d", suffix.removeprefix("-"), state["step"] + 1)
    return averages


def open_journal(checked: Checked) -> Journal:
    config, outlook, start = checked.config, checked.outlook, checked.begun.step
    main = checked.processes.is_main_process
    progress = Progress(outlook.total, start, plain=config.log.console_log_simple, visible=main)
    assert config.save.output_dir is not None
    facts = plan.public_options(config)
    trackers = make_trackers(config.log, config.save.output_dir, config.save.output_name, start, facts) if main else ()
    report = open_report(checked) if main and config.log.report else None
    journal = Journal(trackers, progress, window=steps_per_epoch(config, outlook), report=report)
    journal.load_state_dict(checked.state.get("journal", {}))
    return journal


def open_report(checked: Checked) -> Report:
    config, outlook, device = checked.config, checked.outlook, checked.device
    assert config.save.output_dir is not None
    number = checked.processes.num_processes
    count = f"{number} × " if number > 1 else ""
    rows = outlook.method.plan(outlook.blueprint)
    description = describe_run(
        config,
        outlook.data,
        options=plan.public_options(config),
        model=outlook.blueprint.title,
        checkpoint=outlook.blueprint.source.name,
        trains=[(row.part, row.modules, row.parameters, row.learning_rate) for row in rows],
        total=outlook.total,
        device=count + (torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()),
        notes=outlook.notes,
    )
    return Report(config.save.output_dir, description, start=checked.begun.step, warnings=checked.warnings)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A run of which everything is known that needs no weights."""

    config: Config
    processes: PartialState
    outlook: plan.Outlook
    saves: SavePlan
    state: dict[str, Any]  # what --resume brings back
    begun: Beginning
    warnings: Remembered

    @property
    def device(self) -> torch.device:
        assert self.processes.device is not None
        return self.processes.device
