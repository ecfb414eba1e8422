"""`sfumato plan --rehearse`: a run's stages on the rehearsal device, each with what is resident and its peak memory."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sfumato.common import files
from sfumato.config import Config
from sfumato.diffusion.timesteps import timestep_quantiles
from sfumato.formats.checkpoint import SAVE_DTYPES
from sfumato.memory.rehearsal.device import rehearsal_device
from sfumato.plan import RunPlan
from sfumato.tools.rehearsal_data import keep_largest_batches
from sfumato.tools.rehearsal_ranks import make_rank_memory
from sfumato.tools.rehearsal_run import make_staged_run
from sfumato.tools.rehearsal_stages import (
    GB,
    STEP,
    RehearsalMeter,
    Stage,
    StageRecorder,
    describe_stages,
    format_ranks,
    format_stages,
)
from sfumato.tools.rehearsal_step import rehearse_preview, rehearse_step
from sfumato.training.evaluation import eval_mode
from sfumato.training.run import Run
from sfumato.training.validation import measure_validation_loss

IN_MEMORY = {
    "cache_latents_to_disk": "cache_latents",
    "cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs",
}
ALLOWANCE = int(1.2e9)  # bytes; assumed, not yet measured on a card
LARGEST_SAVE = 4e9  # bytes of a file that is written to rehearse its save


def rehearse_plan(plan: RunPlan, *, saves: bool = True, processes: Sequence[int] = ()) -> list[Stage]:
    """Every stage at the batch that needs most memory, with networks whose weights are not read.

    saves: whether saving is rehearsed, too; it takes seconds, and hardly ever needs more than the step. processes: for
    how many that share the model it is counted what each needs. Writes nothing
    but a temporary file. Raises what the run would raise on a GPU, above all RuntimeError where tensors are on two
    devices and UnknownValueError where a shape depends on the device's values.
    """
    with (
        tempfile.TemporaryDirectory(prefix="sfumato-") as folder,
        rehearsal_device() as rehearsal,
        StageRecorder(RehearsalMeter(rehearsal)).watch_loading() as recorder,
    ):
        plan = replace(
            plan,
            config=cache_in_memory(plan.config, cache_dir=Path(folder)).with_values({"compile": False}),
            data=keep_largest_batches(plan.data, accumulation=plan.config.loop.gradient_accumulation_steps),
            blueprint=plan.blueprint.without_weights(rehearsal.without_values),
        )
        recorder.ranks = make_rank_memory(plan.config, rehearsal.memory, processes)
        run = make_staged_run(plan, recorder)
        run.optimization.owner.make_state()  # which from the second step on is there during forward and backward
        with recorder.stage(STEP):
            rehearse_step(run)
        evaluate(run, recorder)
        dtype = SAVE_DTYPES[plan.config.save.save_precision]
        if saves and plan.method.output_bytes(plan.blueprint, dtype) <= LARGEST_SAVE:
            write_output(run, recorder, Path(folder))
        return recorder.stages


def evaluate(run: Run, recorder: StageRecorder) -> None:
    """A preview and validation, where the run has them."""
    prompts = run.config.samples.sample_prompts
    if prompts is not None:
        with recorder.stage("preview"):
            rehearse_preview(run, prompts)
    if run.validation_loader is not None:
        with recorder.stage("validation"), eval_mode(run):
            measure_validation_loss(run, timestep_quantiles(run.config.noise, 1))


def write_output(run: Run, recorder: StageRecorder, folder: Path) -> None:
    """What the run saves, into a folder of its own."""
    path = folder / f"save{run.method.file_suffixes(run.model.blueprint)[0]}"
    with recorder.stage("save"):
        run.method.write(run.model, path, {}, SAVE_DTYPES[run.config.save.save_precision])


def cache_in_memory(config: Config, *, cache_dir: Path) -> Config:
    """The same caches, but nothing is found in the user's own or written there; nothing is traced.

    Before a concept's step there is one denoising step: further ones need no more memory.
    """
    on_disk = {option: kind for option, kind in IN_MEMORY.items() if config.value(option)}
    caches = {**dict.fromkeys(on_disk, False), **dict.fromkeys(on_disk.values(), True)}
    return config.with_values({**caches, "cache_dir": cache_dir, "profile": None, "max_denoising_steps": 2})


def show_rehearsal(plan: RunPlan, *, memory: int | None, path: Path | None, processes: Sequence[int] = ()) -> None:
    """Print the table; memory: of a card, in bytes. path: of a JSON file with the same. processes: numbers of them."""
    started = time.process_time()
    stages = rehearse_plan(plan, processes=processes)
    for line in (*format_stages(stages), *format_ranks(stages)):
        print(line)
    if plan.config.memory.compile:
        print("rehearsed without --compile: what it compiles needs a GPU; memory is that of blocks as they are")
    if all(stage.name != "save" for stage in stages):
        print(f"the save was not rehearsed, since it would write a file of more than {LARGEST_SAVE / GB:.0f} GB")
    print(f"rehearsed in {time.process_time() - started:.0f} s of one processor")
    if memory is not None:
        print("\n".join(describe_fit(stages, memory)))
    if path is not None:
        files.write_text(path, json.dumps({"stages": describe_stages(stages)}, indent=2) + "\n")


def describe_fit(stages: Sequence[Stage], memory: int) -> Iterator[str]:
    """Which stages fit a card with this many bytes: of one process, or of each among several where that was counted."""
    yield (
        f"of {memory / GB:.2f} GB on the card, {ALLOWANCE / GB:.2f} GB are set aside for CUDA itself, workspaces and "
        "fragmentation, which no rehearsal sees"
    )
    available = memory - ALLOWANCE
    yield from describe_excess([(stage.name, stage.peak) for stage in stages], available, "")
    for i, (count, _) in enumerate(stages[0].by_rank):
        peaks = [(stage.name, stage.by_rank[i].peak) for stage in stages]
        yield from describe_excess(peaks, available, f"{count} processes: ")


def describe_excess(peaks: Sequence[tuple[str, int]], available: int, who: str) -> Iterator[str]:
    """peaks: (stage, bytes)."""
    over = [(name, peak) for name, peak in peaks if peak > available]
    for name, peak in over:
        yield f"{who}does not fit: {name} needs {peak / GB:.2f} GB, {(peak - available) / GB:.2f} GB too much"
    if not over:
        yield f"{who}every stage fits, {(available - max(peak for _, peak in peaks)) / GB:.2f} GB remain"
