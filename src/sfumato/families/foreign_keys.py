"""Keys in a file of weights that its network has no place for: which may be passed over, and how they are named."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable

from sfumato.common.text import list_some
from sfumato.formats.keymap import matches

V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"  # empty tensors that say what a model predicts and how its noise ends
MOST_GROUPS = 6  # of keys that a line names
# What programs write beside networks: tables that follow from the configuration, counters, marks of the training's
# objective (which are read elsewhere), tokenizers.
REDUNDANT = "|".join(
    (
        *("betas", "alphas_cumprod{*}", "alphas_cumprod", "sqrt_{*}", "log_one_minus_{*}", "posterior_{*}", "logvar"),
        *("lvlb_weights", "sigmas", "denoiser.sigmas", "model_ema.decay", "model_ema.num_updates", "global_step"),
        *(V_MARK, ZERO_SNR_MARK, "edm_{*}", "{*}.position_ids", "position_ids", "{*}logit_scale", "{*}spiece_model"),
        *("text_encoders.{*}.text_projection.weight",),
    )
)


def find_conflicts(foreign: Iterable[str], known: Collection[str]) -> list[str]:
    """The foreign keys that would change what the network computes: of further blocks, or of layers that it has.

    known: keys in the same layout that the network has a place for. Beside it, e.g. in layers.2.extra or in another
    network, a key changes nothing.
    """
    blocks = {_without_numbers(key) for key in known}
    layers = {layer for key in known if (layer := key.rpartition(".")[0])}
    return [key for key in foreign if _without_numbers(key) in blocks or not layers.isdisjoint(_list_parents(key))]


def is_redundant(key: str) -> bool:
    """Whether a key of a whole file is of what every program can do without."""
    return matches(REDUNDANT, key)


def describe_passed_over(place: object, keys: Iterable[str]) -> str:
    """A line that names keys without effect. place: the file's path."""
    return f"{place}: not used: {summarize_keys(keys)}"


def summarize_keys(keys: Iterable[str]) -> str:
    """Keys by what they begin with: "loss.* (14), model_ema.* (686, averaged weights), logit_scale"."""
    groups: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        groups[key.partition(".")[0]].append(key)
    texts: list[str] = []
    for first, members in sorted(groups.items()):
        remark = ", averaged weights" if "ema" in first.split("_") else ""
        texts.append(members[0] if len(members) == 1 else f"{first}.* ({len(members)}{remark})")
    return list_some(texts, MOST_GROUPS)


def _list_parents(key: str) -> list[str]:
    """a.b, a for a.b.c."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _without_numbers(key: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "{n}", key)
