"""What a later run needs of this one: named parts, collected, written and read by one object."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from sfumato.common.text import EMPTY, plural
from sfumato.config import Config
from sfumato.config.listing import public_options
from sfumato.config.schema import vocabulary
from sfumato.config.secrets import collect_secrets
from sfumato.data.fingerprint import compare_fingerprints, fingerprint_data
from sfumato.errors import UserError
from sfumato.formats.state import StateTree, find_newest_state, flatten_state, is_newest_of_run, load_state
from sfumato.plan import RunPlan
from sfumato.track.hub import fetch_state
from sfumato.training.start_point import StartPoint

log = logging.getLogger(__name__)
WEIGHTS = "weights"  # the part that the method trains
THEMES_OF_WEIGHTS = {"run", "model", "network", "full", "embedding"}  # whose options decide what it has
# Where a run writes, what it shows, and how fast it is do not change what it learns.
HARMLESS_THEMES = {"save", "metadata", "hub", "log", "samples", "validation", "loader", "processes"}
HARMLESS_OPTIONS = {
    "config_file", "preset", "plot_timesteps", "output_config", "cache_latents", "cache_latents_to_disk", "cache_dir",
    "cache_text_encoder_outputs_to_disk", "vae_batch_size", "skip_cache_check", "train_data_dir", "reg_data_dir",
    "dataset_config",
}  # fmt: skip


class Stateful(Protocol):
    """torch's two methods."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


_Part = TypeVar("_Part", bound=Stateful)


class RunState:
    """Every part of a run that training changes. What is not added here is neither saved nor resumed."""

    def __init__(
        self, saved: Mapping[str, Any] | None = None, *, info: Mapping[str, Any] = EMPTY, changes: Sequence[str] = ()
    ) -> None:
        self.info = info  # about this run, for the states that it saves
        self.changes = changes  # of the options that say what is trained
        self.parts: dict[str, Stateful] = {}
        self.resumed = saved is not None
        self._saved = dict(saved or {})  # parts that were not yet taken over
        self.counters: dict[str, int] = self._saved.pop("counters", {})  # of the saved state

    def add(self, name: str, part: _Part) -> _Part:
        """Register a part; in a resumed run it takes over what was saved, whose memory is then given back."""
        assert name not in self.parts, f"two parts of the state are called {name}"
        self.parts[name] = part
        if self.resumed:
            if name not in self._saved:
                raise UserError(
                    f"the state has no {name!r}: another version of the program saved it",
                    code="state-part-missing",
                    fix="start without --resume",
                )
            state = self._saved.pop(name)
            if name == WEIGHTS:
                check_weights_fit(state, part.state_dict(), self.changes)
            part.load_state_dict(state)
        return part

    def collect(self, start: StartPoint, step: int, shared: tuple[type[Tensor], ...]) -> StateTree:
        """All parts as they are after `step`, of which nothing is copied. shared: classes as in `flatten_state`."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return flatten_state({"counters": start.counters(step), **parts}, shared)


def open_state(plan: RunPlan) -> RunState:
    """The state that --resume names, or an empty one; each difference to the saved run is reported once."""
    config = plan.config
    name = config.save.output_name
    now = {
        "run": uuid.uuid4().hex,
        "name": name,
        "options": public_options(config),
        "data": fingerprint_data(plan.data),
    }
    if config.save.resume is None:
        return RunState(info=now)
    folder = plan.saved.folder if plan.saved else find_newest_state(download_state(config, config.save.resume), name)
    saved, before = load_state(folder)
    if "run" in before and is_newest_of_run(folder):  # else the steps after this one belong to another run
        now["run"] = before["run"]
    options = compare_options(before["options"], now["options"])
    data = compare_fingerprints(before["data"], now["data"]) if "data" in before else ()
    for line in (*options.values(), *data):
        log.warning("%s", line)
    themes = {name: option.theme for name, option in vocabulary().items()}
    changes = [line for name, line in options.items() if themes.get(name) in THEMES_OF_WEIGHTS]
    state = RunState(saved, info=now, changes=changes)
    log.info("resuming from %s, step %d of %d", folder, state.counters["step"], plan.total_steps)
    return state


def compare_options(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Option -> what has changed, of those that can change the result."""
    changes: dict[str, str] = {}
    known = vocabulary()
    for name in sorted({*before, *now}):
        harmless = name in HARMLESS_OPTIONS or (name in known and known[name].theme in HARMLESS_THEMES)
        if before.get(name) != now.get(name) and not harmless:
            changes[name] = f"--{name} was {before.get(name, 'not set')}, now it is {now.get(name, 'not set')}"
    return changes


def check_weights_fit(saved: Mapping[str, Any], own: Mapping[str, Any], changes: Sequence[str]) -> None:
    """UserError where a state holds other layers, or layers of another rank, than this run trains.

    changes: of the options that decide about that.
    """
    shapes, now = [{name: tuple(value.shape) for name, value in weights.items()} for weights in (saved, own)]
    if shapes == now:
        return
    facts = list(changes)
    for names, text in (
        (shapes.keys() - now.keys(), "only in the state"),
        (now.keys() - shapes.keys(), "only in this run"),
    ):
        if names and not changes:
            facts.append(f"{plural(len(names), 'weight is', 'weights are')} {text}, e.g. {min(names)}")
    other = [name for name in shapes if name in now and shapes[name] != now[name]]
    if other and not changes:
        facts.append(f"{other[0]} was {shapes[other[0]]}, now it is {now[other[0]]}")
    raise UserError(
        f"the state does not fit what this run trains: {'; '.join(facts) or 'the order of the layers differs'}",
        code="resume-weights-mismatch",
        fix="give the values of the saved run, or start without --resume",
    )


def download_state(config: Config, path: Path) -> Path:
    """Where the state of this name on the hub lies on this machine."""
    return fetch_state(config.hub, path, collect_secrets(config))
