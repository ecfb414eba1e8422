"""New modules of ControlNet-LLLite: which version, beside which layers, how large."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sfumato.adapters.control_modules import ControlModules
from sfumato.adapters.lllite import LLLite
from sfumato.adapters.lllite_file import read_lllite_file
from sfumato.adapters.lllite_shared import SharedLLLite
from sfumato.adapters.lllite_trunk import MASK_SIDE, LLLiteSizes
from sfumato.common.layer_kinds import parse_layer_kinds
from sfumato.config import Config
from sfumato.config.network import LLLiteOptions
from sfumato.errors import UserError
from sfumato.families.blueprint import Blueprint
from sfumato.formats.controlled import ControlledLayer

Layers = Mapping[str, ControlledLayer]
DEFAULT_WIDTH = 64  # of --network_dim
DEFAULT_IMAGE_WIDTH = 32  # of --cond_emb_dim
OF_VERSION_2 = (
    "lllite_target_layers", "lllite_cond_dim", "lllite_cond_resblocks", "lllite_use_aspp", "lllite_cond_input",
    "lllite_inpaint_masked_input",
)  # fmt: skip
OF_TRAINING = {"lllite_multiplier"}  # not of a file


def make_control_modules(config: Config, layers: Layers, blueprint: Blueprint) -> ControlModules:
    """Those of --network_weights, else new ones of either version. UserError where the model has no such layers."""
    file, dropout = config.network.network_weights, config.network.network_dropout or 0.0
    if file is not None:
        return read_lllite_file(file, layers, blueprint.latents, dropout=dropout)
    if choose_version(config, layers, blueprint) == 1:
        return make_first(config, layers)
    return make_shared(config, layers, blueprint)


def list_lllite_notes(config: Config, layers: Layers, blueprint: Blueprint) -> Iterator[str]:
    """A line for each option without the effect that it seems to have."""
    if config.network.network_weights is not None:
        if config.is_changed("network_dim", *(LLLiteOptions.model_fields.keys() - OF_TRAINING)):
            yield "--network_dim, --cond_emb_dim and --lllite_ options have no effect: --network_weights has its own"
    elif choose_version(config, layers, blueprint) == 1:
        for name in (name for name in OF_VERSION_2 if config.is_changed(name)):
            yield f"--{name} has no effect: it is for --lllite_version 2"
    else:
        own = {layer.layer_kind for layer in layers.values()}
        for kind in parse_layer_kinds(config.lllite.lllite_target_layers):
            if kind not in own:
                yield f"--lllite_target_layers: {blueprint.title} has no {kind} layers"


def choose_version(config: Config, layers: Layers, blueprint: Blueprint) -> int:
    """UserError for version 1 with a model that has none of its layers, or with a mask, which it does not read."""
    version, has_first = config.lllite.lllite_version, any(layer.in_version_1 for layer in layers.values())
    if version == 1 and not has_first:
        raise UserError(
            f"--lllite_version 1 is for UNets; {blueprint.title} has none",
            code="lllite-version-unsupported",
            fix="--lllite_version 2",
        )
    if version == 1 and reads_mask(config):
        raise UserError(
            "--lllite_cond_in_channels 4: version 1 reads no mask",
            code="lllite-version-without-mask",
            fix="--lllite_version 2",
        )
    needs_second = reads_mask(config) or config.lllite.lllite_cond_input == "latent"
    return version or (1 if has_first and not needs_second else 2)


def reads_mask(config: Config) -> bool:
    """Whether new modules read a mask beside the image."""
    return config.lllite.lllite_cond_in_channels > 3


def make_first(config: Config, layers: Layers) -> LLLite:
    return LLLite(
        {name: layer for name, layer in layers.items() if layer.in_version_1},
        width=config.network.network_dim or DEFAULT_WIDTH,
        image_width=config.lllite.cond_emb_dim or DEFAULT_IMAGE_WIDTH,
        dropout=config.network.network_dropout or 0.0,
        seed=get_seed(config),
    )


def make_shared(config: Config, layers: Layers, blueprint: Blueprint) -> SharedLLLite:
    """UserError where the model has no layers of the wanted kinds, or the trunk's width is odd."""
    options = config.lllite
    kinds = parse_layer_kinds(options.lllite_target_layers)
    some = {name: layer for name, layer in layers.items() if layer.layer_kind in kinds}
    if not some:
        raise UserError(
            f"--lllite_target_layers {options.lllite_target_layers}: {blueprint.title} has no such layers",
            code="lllite-no-layers",
            fix="--lllite_target_layers self_attn_q",
        )
    if options.lllite_cond_dim % 2:
        raise UserError(
            f"--lllite_cond_dim {options.lllite_cond_dim} is odd, and half of it are the channels of the first layers",
            code="lllite-cond-dim-odd",
            fix=f"--lllite_cond_dim {options.lllite_cond_dim + 1}",
        )
    in_latents = options.lllite_cond_input == "latent"
    if in_latents and reads_mask(config) and blueprint.latents.downscale != MASK_SIDE:
        raise UserError(
            f"--lllite_cond_input latent: masks are read beside latents {MASK_SIDE} times smaller than images, those "
            f"of {blueprint.title} are {blueprint.latents.downscale} times smaller",
            code="lllite-mask-size",
            fix="--lllite_cond_input pixel",
        )
    sizes = LLLiteSizes(
        width=config.network.network_dim or DEFAULT_WIDTH,
        image_width=options.cond_emb_dim or DEFAULT_IMAGE_WIDTH,
        trunk_width=options.lllite_cond_dim,
        residual_blocks=options.lllite_cond_resblocks,
        has_pyramid=options.lllite_use_aspp,
        image_channels=options.lllite_cond_in_channels,
        hides_masked=options.lllite_inpaint_masked_input,
        latent_channels=blueprint.latents.channels if in_latents else 0,
        latent_side=blueprint.latents.downscale,
    )
    return SharedLLLite(some, sizes, dropout=config.network.network_dropout or 0.0, seed=get_seed(config))


def get_seed(config: Config) -> int:
    assert config.loop.seed is not None, "a plan has a seed"
    return config.loop.seed
