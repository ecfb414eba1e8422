"""What --network_module and its arguments ask for: a kind of adapter, its arguments, and the layers of a preset."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfumato.adapters import register_adapters
from sfumato.adapters.base import ADAPTERS
from sfumato.adapters.kinds import list_related
from sfumato.common.extensions import ADAPTERS_GROUP, find_registered, import_extension
from sfumato.common.names import (
    DEFAULT_KIND,
    DEFAULT_NETWORK_MODULE,
    LYCORIS_ALGOS,
    LYCORIS_DEFAULTS,
    LYCORIS_MODULES,
    LYCORIS_PRESETS,
    MODULE_ARGUMENTS,
    MODULE_PRESETS,
    NETWORK_MODULES,
    REFUSED_LYCORIS_ALGOS,
    LycorisPreset,
    find_default_rank,
)
from sfumato.common.registry import did_you_mean
from sfumato.config import NetworkOptions
from sfumato.errors import UserError
from sfumato.methods.lycoris_preset import read_preset_file

# LyCORIS' arguments -> the values at which they change nothing of the adapters that are known here; None: every value.
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...] | None] = {
    "bypass_mode": None,  # another way to compute the same
    "train_llm_adapter": (False, None),
}
RENAMED_ARGUMENTS = {  # LyCORIS' name -> the name here
    "rs_lora": "rank_stabilized",
    "constrain": "constraint",
    "block_size": "unit",
}
OF_RANKS = ("use_scalar", "rank_stabilized")  # arguments without effect on kinds without a rank or its alpha
TUCKER_NAMES = ("use_tucker", "use_cp", "use_conv_cp")  # LyCORIS' names for one argument, and its opposite
NO_TUCKER = "disable_conv_cp"


@dataclass(frozen=True, kw_only=True)
class AdapterModule:
    """A run's adapter options in the words that are used here."""

    adapter_kind: str  # a name in ADAPTERS
    network: NetworkOptions
    preset: LycorisPreset | None = None
    notes: tuple[str, ...] = ()


def read_adapter_module(network: NetworkOptions, *, has_convolutions: bool, opt_ins: Collection[str]) -> AdapterModule:
    """has_convolutions: whether the model has any that adapters may change. opt_ins: arguments that let a part train.

    UserError for a module that cannot be used, and for values of LyCORIS' arguments that would change the result.
    """
    register_adapters()
    module = network.network_module or DEFAULT_NETWORK_MODULE
    if module in LYCORIS_MODULES:
        return read_lycoris(network, has_convolutions=has_convolutions, opt_ins=opt_ins)
    kind = NETWORK_MODULES[module] if module in NETWORK_MODULES else import_kind(module)
    return read_module(network, module, kind)


def read_module(network: NetworkOptions, module: str, kind: str) -> AdapterModule:
    """A module of sd-scripts or of one's own: what its name and its arguments say of layers and sizes."""
    given = {**MODULE_ARGUMENTS.get(module, {}), **network.network_args}
    dim, alpha = take_dim(given, kind, network), network.network_alpha
    preset = MODULE_PRESETS.get(module)
    if preset is not None and given.pop("enable_all_linear", False):
        preset = replace(preset, layers="")
    has_flag = "enable_conv" in given
    if given.pop("enable_conv", False):
        given |= {"conv_dim": dim, "conv_alpha": alpha}
    notes = list_idle_tucker(given, network)
    changes: dict[str, Any] = {"network_args": given, "network_dim": dim}
    if preset is not None and not preset.has_text_encoders and not network.network_train_unet_only:
        changes["network_train_unet_only"] = True
        notes.append(f"--network_module {module} adapts the denoiser alone; --network_module {kind} has all parts")
    preset = preset or (LycorisPreset() if has_flag else None)
    return AdapterModule(
        adapter_kind=kind, network=network.model_copy(update=changes), preset=preset, notes=tuple(notes)
    )


def take_dim(given: dict[str, Any], kind: str, network: NetworkOptions) -> int:
    """What --network_dim is, or an argument that says the same for this kind, which is taken out."""
    values = [given.pop(name) for name in ADAPTERS.get(kind).dim_arguments if name in given]
    values = [value for value in values if value]
    if any(not isinstance(value, int) or value < 1 for value in values):
        raise UserError(
            f"--network_args {'='.join(ADAPTERS.get(kind).dim_arguments[:1])}={values[0]}: a number of 1 or more is "
            "expected",
            code="dim-argument-invalid",
        )
    return values[0] if values else network.network_dim or find_default_rank(network.network_module)


def import_kind(module: str) -> str:
    """The kind of this name, or the one that a module registers when it is imported."""
    if module not in ADAPTERS and "create_network" in vars(import_extension(module, option="--network_module")):
        raise UserError(
            f"--network_module {module} is written for kohya's scripts (create_network), whose models are others",
            code="network-module-of-kohya",
            fix="docs/extending.md shows an adapter of one's own in one file; LyCORIS' are built in: lycoris.kohya",
        )
    return find_registered(ADAPTERS, module, group=ADAPTERS_GROUP, option="--network_module")


# ---------------------------------------------------------------- LyCORIS


def read_lycoris(network: NetworkOptions, *, has_convolutions: bool, opt_ins: Collection[str]) -> AdapterModule:
    """LyCORIS' arguments in the words of the adapters here; its convolutions have --network_dim by default."""
    given = dict(network.network_args)
    kind = read_algo(given.pop("algo", None) or DEFAULT_KIND)
    preset, excluded = read_preset(given.pop("preset", None) or "full")
    notes = list_unread(given, kind)
    given = {**LYCORIS_DEFAULTS.get(kind, {}), **drop_without_effect(given, kind, opt_ins)}
    dim = network.network_dim or find_default_rank(network.network_module)
    if excluded:
        given["exclude_patterns"] = excluded
    convolutions = {name: given.pop(name, None) for name in ("conv_dim", "conv_alpha")}
    if preset.has_convolutions and has_convolutions and not network.network_train_text_encoder_only:
        given["conv_dim"] = convolutions["conv_dim"] or dim
        given["conv_alpha"] = convolutions["conv_alpha"] or network.network_alpha
    elif any(convolutions.values()):
        notes.append("--network_args conv_dim and conv_alpha: no effect, no convolution is adapted")
    notes += list_idle_tucker(given, network)
    dropout = given.pop("dropout", None) if "dropout" in given else network.network_dropout
    changes = {"network_args": given, "network_dropout": dropout or None}
    if not preset.has_text_encoders:
        changes["network_train_unet_only"] = True
    return AdapterModule(
        adapter_kind=kind, network=network.model_copy(update=changes), preset=preset, notes=tuple(notes)
    )


def read_algo(algo: Any) -> str:
    """The kind of adapter; UserError for one whose files no program can read exactly, and for unknown ones."""
    if reason := REFUSED_LYCORIS_ALGOS.get(str(algo).lower()):
        raise UserError(
            f"--network_args algo={algo} is refused: {reason}",
            code="lycoris-algo-refused",
            fix="take another kind; docs/adapters.md says which start from singular vectors, too",
        )
    found = LYCORIS_ALGOS.get(str(algo).lower())
    if found is None:
        raise UserError(
            f"--network_args algo={algo} is no kind of adapter",
            code="lycoris-algo-unknown",
            fix=did_you_mean(str(algo), LYCORIS_ALGOS),
        )
    return found


def read_preset(name: Any) -> tuple[LycorisPreset, list[str]]:
    """A preset by its name or from its file, and patterns of layers that get no adapter."""
    if name in LYCORIS_PRESETS:
        return LYCORIS_PRESETS[name], []
    if str(name).endswith(".toml"):
        return read_preset_file(Path(name))
    raise UserError(
        f"--network_args preset={name} is not known",
        code="lycoris-preset-unknown",
        fix=did_you_mean(str(name), LYCORIS_PRESETS),
    )


def list_unread(given: Mapping[str, Any], kind: str) -> list[str]:
    """A line for each argument of a wrapper that asks for it where the kind takes none."""
    found = ADAPTERS.get(kind)
    if found.takes_wrappers:
        return []
    wrappers = [ADAPTERS.get(name) for name in ADAPTERS.names if ADAPTERS.get(name).is_wrapper]
    names = [name for wrapper in wrappers for name in wrapper.options_class.model_fields if given.get(name) is True]
    return [f"--network_args {name}: no effect, {found.label} has no such form" for name in names]


def list_idle_tucker(given: Mapping[str, Any], network: NetworkOptions) -> list[str]:
    """A line about use_tucker where no convolution has a kernel that it could divide."""
    has_kernels = network.dim_from_weights or any(name in given for name in ("conv_dim", "conv_block_dims"))
    if given.get("use_tucker") is not True or has_kernels:
        return []
    return ["--network_args use_tucker: no effect, no convolution is adapted"]


def drop_without_effect(given: Mapping[str, Any], kind: str, opt_ins: Collection[str]) -> dict[str, Any]:
    """The arguments without those that change nothing; UserError for one of a part that no model has."""
    kept = {RENAMED_ARGUMENTS.get(name, name): value for name, value in given.items()}
    tucker = [kept.pop(name) for name in TUCKER_NAMES if name in kept]
    tucker += [not kept.pop(NO_TUCKER)] if NO_TUCKER in kept else []
    related = list_related(kind)
    known = {name for each in related.values() for name in each.options_class.model_fields}
    if any(tucker) and "use_tucker" in known:  # the other kinds of LyCORIS do not read it
        kept["use_tucker"] = True
    if not kept.get("train_norm"):
        kept.pop("train_norm", None)
    if not (ADAPTERS.get(kind).uses_rank and ADAPTERS.get(kind).uses_alpha):
        for name in OF_RANKS:
            kept.pop(name, None)
    for other in (name for name in ADAPTERS.names if name not in related):
        for name in ADAPTERS.get(other).options_class.model_fields:
            if name not in known:  # LyCORIS gives all arguments to all of its adapters
                kept.pop(name, None)
    if "train_t5xxl" not in opt_ins and kept.get("train_t5xxl") in (False, None):
        kept.pop("train_t5xxl", None)
    for name, harmless in WITHOUT_EFFECT.items():
        if name in known:
            continue
        value = kept.pop(name, None)
        if harmless is not None and value not in harmless:
            raise UserError(
                f"--network_args {name}={value}: no model that is known here has such a part",
                code="lycoris-arg-of-other-model",
                fix=f"remove {name}",
            )
    return {name: value for name, value in kept.items() if value is not None}
