"""A run that is set up in stages and takes no more than a step; it reports nothing and writes no output of its own."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import nullcontext

from sfumato.parallel.single import Single
from sfumato.plan import RunPlan
from sfumato.tools.rehearsal_stages import StageRecorder
from sfumato.track.best import Best
from sfumato.track.hub import Hub
from sfumato.track.metrics_logger import MetricsLogger
from sfumato.track.progress import Progress
from sfumato.training.loaders import make_loader, make_validation_loader
from sfumato.training.model_setup import load_networks, make_loss_context, open_model
from sfumato.training.optimizer_setup import set_up_optimizer
from sfumato.training.outcomes import make_outcomes
from sfumato.training.preview_prompts import read_preview_prompts
from sfumato.training.run import Run
from sfumato.training.run_state import RunState
from sfumato.training.start_point import StartPoint


def make_staged_run(plan: RunPlan, recorder: StageRecorder) -> Run:
    """As `build_run` makes it, without metrics, files and uploads. Filling caches is a stage for each encoder."""
    device = recorder.meter.device
    parallel = Single(device)
    state, start = RunState(), StartPoint()
    model = open_model(plan, device)
    prompts = read_preview_prompts(plan, model)
    recorder.parts, recorder.method = model.parts, plan.method
    with recorder.caching_stages():
        loader = make_loader(plan, model, parallel, prompts=prompts)
    with recorder.stage("loading"):
        networks = load_networks(plan, model, parallel, cached=loader.caches.cached_networks)
        recorder.add_trained(plan.method)
    optimization = set_up_optimizer(plan, networks, start, state, parallel)
    recorder.optimizer = optimization.optimizer
    context = make_loss_context(plan, prompts.text, optimization.uncertainty)
    no_hashes: Future[dict[str, str]] = Future()
    no_hashes.set_result({})
    return Run(
        plan=plan,
        start=start,
        state=state,
        parallel=parallel,
        context=context,
        optimization=optimization,
        outcomes=make_outcomes(plan, device, optimization.optimizer),
        loader=loader,
        validation_loader=make_validation_loader(plan, loader, parallel),
        best=Best(),
        metrics=MetricsLogger((), Progress(plan.total_steps, 0, plain=True, visible=False), window=1),
        hub=Hub(plan.config.hub, ()),
        metadata={},
        file_hashes=no_hashes,
        output_lock=nullcontext(),
        step=0,
    )
