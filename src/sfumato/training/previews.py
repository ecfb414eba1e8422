"""Previews: sample images of the prompts, made while training. Called by the loop between steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from sfumato.common.seeds import seed_of
from sfumato.common.text import strip_paths
from sfumato.config.prompts import Prompt, read_prompts
from sfumato.sample import generate_batch
from sfumato.sampling.request import ImageRequest, group_requests, list_ignored, make_request
from sfumato.training.comfyui_workflow import make_workflow
from sfumato.training.evaluation import eval_mode
from sfumato.training.image_metadata import generate_command, image_metadata, save_image
from sfumato.training.memory_shortage import give_up_where_short, run_within_memory
from sfumato.training.run import Run

log = logging.getLogger(__name__)
PREVIEWS = "previews"
PreviewGroup = list[tuple[ImageRequest, Path]]  # that is made in one batch


def save_due_previews(run: Run, step: int) -> None:
    """The previews that are due after this step, counted from 1; --sample_every_n_epochs takes precedence."""
    samples, steps_per_epoch = run.config.samples, run.plan.steps_per_epoch
    if samples.sample_every_n_epochs:
        epoch = step // steps_per_epoch
        if step % steps_per_epoch == 0 and epoch % samples.sample_every_n_epochs == 0:
            save_previews(run, step, f"e{epoch:06d}")
    elif samples.sample_every_n_steps and step % samples.sample_every_n_steps == 0:
        save_previews(run, step, f"{step:06d}")


def save_previews(run: Run, step: int, label: str) -> None:
    """One of every prompt; the file is read again each time. A failure is a warning, training goes on.

    The processes share them out. Each image is a function of the step and its prompt's number, whoever makes it.
    """
    path = run.config.samples.sample_prompts
    if path is None or PREVIEWS in run.given_up or "vae" in run.model.blueprint.cached_parts:  # which the plan has said
        return
    what, shortage = f"making previews after step {step}", ""
    with run.metrics.guard.survive(what) as failure:
        work = plan_previews(run, path, step, label)
        if not run.parallel.moves_together:
            shortage = run_within_memory(partial(save_share, run, work, step), run.parallel)
    if run.parallel.moves_together and not any(run.parallel.exchange(failure.text)):
        save_share(run, work, step)  # an error here has to end all, since the others wait in the middle of it
    for rank, text in enumerate(run.parallel.exchange(failure.text)):
        if text and rank:  # only the main process is heard, and its own failure was reported
            log.warning("%s failed in process %d, training goes on: %s", what, rank, text)
    give_up_where_short(run, PREVIEWS, shortage)
    run.metrics.publish()


def plan_previews(run: Run, path: Path, step: int, label: str) -> list[PreviewGroup]:
    """The previews of all processes, as they are made together."""
    previews: PreviewGroup = []
    for number, prompt in enumerate(read_prompts(path)):
        preview = prepare_preview(run, prompt, number, step, label)
        previews += [preview] if can_preview(run, preview[0]) else []
    return list(group_requests(previews, run.config.samples.sample_batch_size or 1))


def save_share(run: Run, work: Sequence[PreviewGroup], step: int) -> None:
    """This process's part of the previews."""
    with eval_mode(run):
        for group, is_own in run.parallel.share_rounds(work, key=lambda group: group[0][0].batch_key):
            if run.parallel.may_break_off():  # whoever stops a run may kill it soon
                log.info("no further previews after step %d, since the run stops", step)
                break
            save_preview_group(run, group, step, is_own=is_own)


def prepare_preview(run: Run, prompt: Prompt, number: int, step: int, label: str) -> tuple[ImageRequest, Path]:
    """A preview's request and its file; options of the prompt that are ignored are reported once."""
    samples = run.config.samples
    seed = seed_of(run.plan.seed, "preview", step, number) & 0xFFFFFFFF
    request = make_request(
        prompt, run.model, sampler=samples.sample_sampler, seed=seed, weighted=samples.prompt_weighting
    )
    run.warn_once((*prompt.notes, *list_ignored(prompt, request, run.model), *list_ignored_in_previews(prompt)))
    given_seed = "" if prompt.seed is None else f"_{prompt.seed}"
    now = time.strftime("%Y%m%d%H%M%S")
    name = f"{run.plan.saves.name}_{label}_{number:02d}_{now}{given_seed}.png"
    return request, run.plan.output_dir / "sample" / name


def list_ignored_in_previews(prompt: Prompt) -> Iterator[str]:
    """Options that only `sfumato generate` has a use for."""
    start = f"the prompt {prompt.prompt[:40]!r}: "
    if prompt.seeds:
        yield f"{start}of several seeds in --d previews use the first"
    if prompt.file_name:
        yield f"{start}--f has no effect on previews, whose names have the step"
    if prompt.highres_fix_save_1st:
        yield f"{start}highres_fix_save_1st has no effect on previews"


def can_preview(run: Run, request: ImageRequest) -> bool:
    """False, with a warning, where an encoder has no file here and the cache has no features of the prompt."""
    for part in run.model.blueprint.cached_parts:
        for text, negative in request.texts:
            caption = run.method.rewrite_caption(text)
            if not run.context.text.can_encode(part, caption, weighted=request.weighted, negative=negative):
                run.warn_once(
                    [f"no preview of {text[:40]!r}: the cache has no features of it by {part}, whose file is not here"]
                )
                return False
    return True


def save_preview_group(run: Run, group: PreviewGroup, step: int, *, is_own: bool) -> None:
    """PNGs that carry their requests, and the command that makes them again; none where another process saves them."""
    requests = [request for request, _ in group]
    with run.method.sampling():
        images = run.forward(partial(generate_batch, run.model, run.method, requests, run.context.text))
    for image, (request, path) in zip(images, group, strict=True) if is_own else ():
        save_image(path, image, image_metadata(request) | describe_origin(run, request, step))


def describe_origin(run: Run, request: ImageRequest, step: int) -> dict[str, str]:
    """When a preview was made and of what: the model, the file of this moment, and the command that uses both.

    Files by their names, or as the user gave them where that is relative; never an absolute path.
    """
    file, note = find_weights_file(run, step)
    more = dict(run.method.list_generate_options(file, run.model.blueprint))
    if run.config.memory.mixed_precision != "no" and run.config.memory.trained_precision == "no":
        more |= {"float32_parts": sorted(run.method.full_precision_parts(run.model.blueprint)) or None}
    if run.config.model.enable_scaled_pos_embed:
        more["resolution"] = run.config.buckets.resolution
    text = {
        "step": str(step),
        "epoch": str(-(-step // run.plan.steps_per_epoch)),
        "model": run.plan.blueprint.source.name,
        "trained": strip_paths(file),
        "command": generate_command(run.config, request, run.model.sampling, more),
        "workflow": make_workflow(
            request,
            checkpoint=run.plan.blueprint.source.name,
            adapters=[(file, 1.0)] if "network_weights" in more else (),
            channels=run.model.latents.channels,
        ),
        "note": note,
    }
    return {name: value for name, value in text.items() if value}


def find_weights_file(run: Run, step: int) -> tuple[str, str]:
    """The file with the weights of a preview after this step, and a note where that file differs from them."""
    plan = run.plan
    if step == 0:
        given = run.config.network.network_weights or next(iter(run.config.embedding.weights), None)
        in_no_file = run.config.embedding.token_string and not given
        return str(given or ""), "what the new words start from is in no file" if in_no_file else ""
    ends_epoch = step % plan.steps_per_epoch == 0
    at_epoch = plan.saves.name_at_epoch(step // plan.steps_per_epoch, plan.epochs) if ends_epoch else None
    name = plan.saves.name if step == plan.total_steps else plan.saves.name_at_step(step) or at_epoch
    precision = run.config.save.save_precision
    note = f"the file is in {precision}, this preview was made before the weights were rounded" if precision else ""
    if name is None:
        name = f"{plan.saves.name}-step{step:08d}"
        note = "nothing was saved after this step; a save would have that name"
    suffix = run.ema.eval_ema.profile.suffix if run.ema.eval_ema else ""
    return str(run.output_path(name + suffix)), note
