"""Makes the presets of src/sfumato/presets: good practice by model and task, made to fit cards by rehearsal.

    python recipes/presets/make.py [--models sdxl flux-dev ...] [--tasks lora full] [--again]

A card gets the first rung of the task's ladder with which a rehearsal fits it: what costs least comes first, and what
changes numbers last. A rung takes 10 to 60 s of one processor; presets that exist are kept unless --again. A card on
which no rung fits gets none. `sfumato plan --fit` searches further, for the images and options of one run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))

from sfumato.common import files
from sfumato.common.text import GIB
from sfumato.config import Config, load_config
from sfumato.config.presets import FOLDER, INDEX, Preset
from sfumato.config.write import format_toml
from sfumato.families.published import read_published
from sfumato.memory.rehearsal.backend import register_backend
from sfumato.plan import make_run_plan
from sfumato.tools.fit_trials import bound_run
from sfumato.tools.published_run import drop_stand_ins, make_published_options
from sfumato.tools.rehearsal_stages import STEP
from sfumato.tools.rehearse import ALLOWANCE, rehearse_plan

CARDS = (8, 12, 16, 24)  # GB
SHARED = {  # what every preset starts from
    "mixed_precision": "bf16", "cache_latents": True, "cache_text_encoder_outputs": True, "enable_bucket": True,
    "seed": 42, "save_precision": "bf16", "max_train_steps": 2000,
}  # fmt: skip
TASKS: Mapping[str, Mapping[str, Any]] = {
    "lora": {
        "network_module": "networks.lora", "network_dim": 16, "network_alpha": 16.0, "network_train_unet_only": True,
        "learning_rate": 1e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 100, "save_every_n_steps": 500,
    },
    "full": {
        "method": "full", "optimizer_type": "Adafactor",
        "optimizer_args": {"relative_step": False, "scale_parameter": False, "warmup_init": False},
        "learning_rate": 1e-5, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 100, "max_grad_norm": 0.0,
        "save_every_n_steps": 1000,
    },
}  # fmt: skip
SWAPPED = {"gradient_checkpointing": True, "text_encoder_blocks_to_swap": 64}
FUSED = {"gradient_checkpointing": True, "full_bf16": True, "fused_backward_pass": True}
LADDERS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "lora": (
        {},
        {"gradient_checkpointing": True},
        {**SWAPPED, "blocks_to_swap": 10},
        {**SWAPPED, "blocks_to_swap": 20},
        {**SWAPPED, "blocks_to_swap": 64},
    ),
    "full": (
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "full_bf16": True},
        FUSED,
        {**FUSED, "text_encoder_blocks_to_swap": 64, "blocks_to_swap": 20},
        {**FUSED, "text_encoder_blocks_to_swap": 64, "blocks_to_swap": 64},
    ),
}
TITLES = {"lora": "LoRA", "full": "the whole model"}
FLOW = {"model_prediction_type": "raw", "loss_type": "l2"}
MODELS: Mapping[str, Mapping[str, Any]] = {  # what their guides agree on
    "sd15": {"min_snr_gamma": 5.0},
    "sdxl": {"min_snr_gamma": 5.0, "no_half_vae": True},
    "sd3-medium": {"weighting_scheme": "logit_normal"},
    "sd35-medium": {"weighting_scheme": "logit_normal"},
    "sd35-large": {"weighting_scheme": "logit_normal"},
    "flux-dev": {**FLOW, "guidance_scale": 1.0, "timestep_sampling": "shift", "discrete_flow_shift": 3.1582},
    "flux-kontext-dev": {**FLOW, "guidance_scale": 1.0, "timestep_sampling": "shift", "discrete_flow_shift": 3.1582},
    "chroma": {**FLOW, "guidance_scale": 0.0, "timestep_sampling": "sigmoid", "apply_t5_attn_mask": True},
    "lumina-2": {**FLOW, "timestep_sampling": "nextdit_shift", "discrete_flow_shift": 6.0},
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    arguments.add_argument("--again", action="store_true", help="make presets that exist, too")
    args = arguments.parse_args()
    for model in args.models:
        for task in args.tasks:
            names = {card: f"{model}-{task}-{card}gb" for card in CARDS}
            if args.again or not any((FOLDER / f"{name}.toml").exists() for name in names.values()):
                for preset, text in make_presets(model, task, names):
                    files.write_text(preset.path, text)
                    write_index(preset)


def make_presets(model: str, task: str, names: Mapping[int, str]) -> Iterator[tuple[Preset, str]]:
    """The presets of a run for every card on which it fits, each with its file's text."""
    given = {**SHARED, **TASKS[task], **MODELS[model]}
    title = f"{read_published(model)['title']}: {TITLES[task]}"
    with tempfile.TemporaryDirectory() as folder:
        stand_ins = make_published_options(model, Path(folder), method=given.get("method"))
        config = load_config([], defaults={**stand_ins, **given})
        rungs = iter(climb(config, LADDERS[task], CARDS[-1] * GIB - ALLOWANCE))
        rung = next(rungs, None)
        for card in reversed(CARDS):
            while rung is not None and max(rung.step, rung.caching) + ALLOWANCE > card * GIB:
                rung = next(rungs, None)
            if rung is None:
                print(f"{names[card]}: nothing fits")
                continue
            print(f"{names[card]}: {dict(rung.values)}")
            preset = Preset(name=names[card], title=title, task=task, card=card, peak=rung.step, caching=rung.caching)
            options = drop_stand_ins(config.with_values({**rung.values, "family": rung.family}))
            yield preset, format_preset(preset, format_toml(options.with_values({"caption_extension": ".txt"})), config)


class Rung(NamedTuple):
    """One rung of a ladder, rehearsed: peaks in bytes."""

    values: Mapping[str, Any]
    family: str
    step: int
    caching: int


def climb(config: Config, ladder: Iterable[Mapping[str, Any]], largest: int) -> Iterator[Rung]:
    """Every rung that a bound does not exclude from the largest card."""
    register_backend()
    for values in ladder:
        changed = config.with_values(values)
        if max(bound.size for bound in bound_run(changed)) > largest:
            continue
        plan = make_run_plan(changed, processes=1, remember=False)
        peaks = {stage.name: stage.peak for stage in rehearse_plan(plan, saves=False)}
        caching = max((peak for stage, peak in peaks.items() if stage.startswith("caching")), default=0)
        print(f"  {dict(values)}: step {peaks[STEP] / 1e9:.2f} GB, caching {caching / 1e9:.2f} GB", flush=True)
        yield Rung(values, plan.family.name, peaks[STEP], caching)


def format_preset(preset: Preset, options: str, config: Config) -> str:
    assert config.buckets.resolution
    height, width = config.buckets.resolution
    needed = "--pretrained_model_name_or_path ... --train_data_dir ... --output_dir ..."
    return (
        f"# {preset.title}, on a card of {preset.card} GB\n"
        f"# Rehearsed at {width} x {height}: {preset.peak / 1e9:.1f} GB in a step, {preset.caching / 1e9:.1f} GB while "
        "caches are filled.\n"
        f"# sfumato train --preset {preset.name} {needed}\n"
        "# A copy of this file, changed as you like, goes behind --config_file.\n\n"
        f"{options}"
    )


def write_index(preset: Preset) -> None:
    """Add or replace one row, in the order of models, tasks and cards."""
    rows = {row["name"]: row for row in json.loads(INDEX.read_text(encoding="utf-8"))} if INDEX.exists() else {}
    rows[preset.name] = {name: getattr(preset, name) for name in Preset.__dataclass_fields__}
    order = [f"{model}-{task}-{card}gb" for model in MODELS for task in TASKS for card in CARDS]
    text = ",\n".join(json.dumps(rows[name]) for name in order if name in rows)
    files.write_text(INDEX, f"[\n{text}\n]\n")


if __name__ == "__main__":
    main()
