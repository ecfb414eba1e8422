"""What a run reports, set up: messages, metrics, the report page, the metadata of its files."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch.optim import Optimizer

from sfumato.config import Config, ModelOptions
from sfumato.config.listing import public_options
from sfumato.config.secrets import collect_secrets, describe_exposed
from sfumato.data.ss_metadata import build_ss_metadata as data_metadata
from sfumato.formats.metadata import TrainingFacts, describe_files, make_training_metadata, read_thumbnail
from sfumato.formats.metadata_limit import THUMBNAIL_KEY, fit_metadata
from sfumato.optim.optimizers import describe_optimizer
from sfumato.plan import RunPlan
from sfumato.track.console import configure_logging
from sfumato.track.hub import Hub
from sfumato.track.metrics_logger import MetricsLogger
from sfumato.track.progress import Progress
from sfumato.track.report import Report
from sfumato.track.report_facts import WarningCollector, collect_warnings, describe_run
from sfumato.track.trackers import make_trackers

log = logging.getLogger(__name__)


def start_logging(config: Config, *, is_main: bool) -> WarningCollector:
    """Messages to where the options say, without secrets; warnings are collected for the report page."""
    configure_logging(config.log, main_process=is_main, secrets=collect_secrets(config))
    collector = collect_warnings()
    if is_main:
        warnings, notes = describe_exposed(config)
        for line in warnings:
            log.warning("%s", line)
        for line in notes:
            log.info("%s", line)
    return collector


def make_hub(config: Config) -> Hub:
    return Hub(config.hub, collect_secrets(config))


def make_metrics_logger(
    plan: RunPlan,
    start: int,
    warnings: WarningCollector,
    *,
    is_main: bool,
    devices: str,
    image_numbers: Sequence[int] = (),
) -> MetricsLogger:
    """Progress everywhere; trackers and the report page on the main process alone. start: steps that are done.

    devices: that train, for the report. image_numbers: in the list of the run's images, by their positions in the plan.
    """
    config = plan.config
    progress = Progress(plan.total_steps, start, plain=config.log.console_log_simple, visible=is_main)
    report = make_report(plan, start, warnings, devices) if is_main and config.log.report else None
    trackers = ()
    if is_main:
        options = public_options(config)
        trackers = make_trackers(config.log, plan.output_dir, config.save.output_name, start, options)
    return MetricsLogger(trackers, progress, window=plan.steps_per_epoch, report=report, image_numbers=image_numbers)


def make_report(plan: RunPlan, start: int, warnings: WarningCollector, devices: str) -> Report:
    """The page that shows the run while it goes on."""
    description = describe_run(
        plan.config,
        plan.data,
        options=public_options(plan.config),
        model=plan.blueprint.title,
        checkpoint=plan.blueprint.source.name,
        trained_parts=[(part.part, part.modules, part.parameters, part.learning_rate) for part in plan.parts],
        total=plan.total_steps,
        device=devices,
        notes=plan.notes,
    )
    return Report(plan.output_dir, description, start=start, warnings=warnings)


def start_hashing(model: ModelOptions) -> Future[dict[str, str]]:
    """The hashes of the checkpoint and --vae for metadata, computed while training goes on."""
    return ThreadPoolExecutor(1).submit(describe_files, model)


def make_run_metadata(plan: RunPlan, optimizer: Optimizer) -> dict[str, str]:
    """The ss_ keys that are known before training; hashes of the named files excepted. Reports what is shortened."""
    facts = TrainingFacts(
        session_id=random.SystemRandom().randrange(2**32),
        started_at=time.time(),
        total_steps=plan.total_steps,
        epochs=plan.epochs,
        base_model_version=plan.blueprint.base_model_version,
        optimizer=describe_optimizer(optimizer, plan.config.optim.optimizer_args),
        data=data_metadata(plan.data),
        family=plan.blueprint.metadata,
        method=plan.method.metadata(),
    )
    metadata = make_training_metadata(plan.config, facts)
    thumbnail = read_thumbnail(plan.config.metadata.metadata_thumbnail) or ""
    tags = {} if plan.config.save.no_metadata else metadata
    for note in fit_metadata({**tags, THUMBNAIL_KEY: thumbnail})[1]:
        log.warning("%s", note)
    return metadata
