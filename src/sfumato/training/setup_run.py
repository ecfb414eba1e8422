"""Builds a Run: checks, plan, restored state, model, caches, optimizer."""

from __future__ import annotations

from contextlib import ExitStack

from sfumato.config import Config
from sfumato.parallel.base import ParallelStrategy
from sfumato.track.best import Best
from sfumato.training import reporting
from sfumato.training.agreement import check_agreement
from sfumato.training.loaders import make_loader, make_validation_loader
from sfumato.training.model_setup import load_networks, make_loss_context, open_model
from sfumato.training.optimizer_setup import set_up_optimizer
from sfumato.training.outcomes import make_outcomes
from sfumato.training.output_folder import lock_output, prepare_output_folder, record_images
from sfumato.training.plan_report import make_reported_plan
from sfumato.training.preview_prompts import read_preview_prompts
from sfumato.training.run import Run
from sfumato.training.run_state import open_state
from sfumato.training.start_point import StartPoint, find_start_point, has_steps_left


def build_run(config: Config, parallel: ParallelStrategy) -> Run | None:
    """Check all that needs no weights, then load; None when a resumed run has nothing left to do."""
    warnings = reporting.start_logging(config, is_main=parallel.is_main)
    plan = make_reported_plan(config, parallel)
    config = plan.config
    with ExitStack() as undo:  # whatever ends this early gives the output folder back
        undo.enter_context(output_lock := lock_output(plan, parallel))
        state = open_state(plan)
        start = find_start_point(plan.config, plan.data, state.counters)
        if not has_steps_left(plan.total_steps, start, StartPoint(**state.counters)):
            return None
        check_agreement(parallel, state.info, start)
        if parallel.is_main:
            prepare_output_folder(plan, resumed=state.resumed)
        model = open_model(plan, parallel.device)
        prompts = read_preview_prompts(plan, model)
        loader = make_loader(plan, model, parallel, prompts=prompts, first_step=start.data)
        networks = load_networks(plan, model, parallel, cached=loader.caches.cached_networks)
        optimization = set_up_optimizer(plan, networks, start, state, parallel)
        context = make_loss_context(plan, prompts.text, optimization.uncertainty)
        metrics = reporting.make_metrics_logger(
            plan,
            start.step,
            warnings,
            is_main=parallel.is_main,
            devices=parallel.devices,
            image_numbers=record_images(plan, continued=start.step > 0) if parallel.is_main else (),
        )
        run = Run(
            plan=plan,
            start=start,
            state=state,
            parallel=parallel,
            context=context,
            optimization=optimization,
            outcomes=make_outcomes(
                plan,
                parallel.device,
                optimization.optimizer,
                first_step=start.step,
                is_main=parallel.is_main,
                sees_gradients=optimization.owner.keeps_gradients,
            ),
            loader=loader,
            validation_loader=make_validation_loader(plan, loader, parallel),
            best=state.add("best", Best()),
            metrics=state.add("metrics", metrics),
            hub=reporting.make_hub(config),
            metadata=reporting.make_run_metadata(plan, optimization.optimizer),
            output_lock=output_lock,
            step=start.step,
            file_hashes=reporting.start_hashing(config.model),
        )
        undo.pop_all()
        return run
