"""Which layers get adapters of which rank: names and shapes at full size, against the reference trainer's files."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any

import pytest
from torch import nn

from families.built_part import BuiltPart
from keys import CLIP_G, CLIP_H, CLIP_L, SD3, UNETS, on_meta
from lora_keys import Shapes, golden
from sfumato.adapters.lora import LoRA
from sfumato.adapters.split_lora import SplitLoRA
from sfumato.common.names import LYCORIS_PRESETS
from sfumato.config import NetworkOptions
from sfumato.errors import SeveralErrors, UserError
from sfumato.families import (
    _chroma_keys,
    _clip,
    _flux_keys,
    _open_clip,
    _sd3_keys,
    _unet,
    sd,
    sdxl,
)
from sfumato.families.part import PartSpec
from sfumato.formats.groups import LayerGroup, is_pointwise
from sfumato.methods.adapter_args import read_args
from sfumato.methods.adapter_ranks import AdapterRanks

CONV = {"conv_dim": 4, "conv_alpha": 1}
EVERY_THIRD = (0, 2, 4) * 8 + (0,)
SOME = (0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2)


def part(spec: PartSpec, build: Callable[[], nn.Module]) -> BuiltPart:
    return BuiltPart(spec=spec, module=on_meta(build))


def unet(family: Any, variant: str) -> BuiltPart:
    return part(family._unet_spec(_unet.key_map(UNETS[variant])), lambda: _unet.build(UNETS[variant]))


@cache
def sd15() -> list[BuiltPart]:
    return [unet(sd, "sd15"), part(_clip.spec("clip", sd.CLIP_PREFIX, "lora_te"), lambda: _clip.build(CLIP_L))]


@cache
def sd21(variant: str) -> list[BuiltPart]:
    spec = _clip.spec("clip", sd.OPEN_CLIP_PREFIX, "lora_te", _open_clip.key_map(projected=False))
    return [unet(sd, variant), part(spec, lambda: _clip.build(CLIP_H))]


@cache
def xl() -> list[BuiltPart]:
    clip_g = part(sdxl.clip_g_spec(), lambda: _open_clip.build_projected(CLIP_G))
    return [unet(sdxl, "sdxl"), part(sdxl.clip_l_spec(), lambda: _clip.build(CLIP_L)), clip_g]


@cache
def flux_dev() -> list[BuiltPart]:
    config = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
    return [part(_flux_keys.spec(""), lambda: _flux_keys.build(config))]


@cache
def sd35_medium() -> list[BuiltPart]:
    config = SD3["5-medium"]
    return [part(_sd3_keys.spec("", config["num_layers"]), lambda: _sd3_keys.build(config))]


@cache
def chroma() -> list[BuiltPart]:
    return [part(_chroma_keys.spec(""), lambda: _chroma_keys.build({}))]


def choose_ranks(
    parts: list[BuiltPart], arguments: dict[str, Any], **options: Any
) -> list[tuple[LayerGroup, int, float]]:
    specs = {part.spec.name: part.spec for part in parts}
    network = NetworkOptions(**{"network_dim": 4, **options})
    ranks = AdapterRanks(network=network, args=read_args(arguments, specs.values()), specs=specs)
    groups = list(chain.from_iterable(part.groups(every=True) for part in parts))
    ranks.check(groups)
    chosen: list[tuple[LayerGroup, int, float]] = []
    for group in groups:
        rank = ranks.find_rank(group)
        if rank is not None:
            chosen.append((group, *rank))
    return chosen


def make_shapes(parts: list[BuiltPart], arguments: dict[str, Any]) -> Shapes:
    split = arguments.get("split_qkv", False)
    shapes: Shapes = {}
    for group, rank, alpha in choose_ranks(parts, arguments):
        adapter_class = SplitLoRA if split and len(group.layers) > 1 else LoRA
        adapter = adapter_class(group, rank=rank, alpha=alpha)
        for suffix, tensor in adapter.export_tensors().items():
            shapes[f"{group.name}.{suffix}"] = tuple(tensor.shape)
    return shapes


@pytest.mark.parametrize(
    ("variant", "parts", "arguments"),
    [
        ("lora_sd15_conv", sd15, CONV),
        ("lora_sd15_block_dims", sd15, {"block_dims": EVERY_THIRD}),
        ("lora_sd21_conv", lambda: sd21("sd21"), CONV),
        ("lora_sd21_linearproj_conv", lambda: sd21("sd21_linearproj"), CONV),
        ("lora_sdxl_conv", xl, CONV),
        ("lora_sdxl_block_dims", xl, {"block_dims": SOME}),
        ("lora_flux_reg_dims", flux_dev, {"network_reg_dims": "single_blocks_.*_linear1=8,_img_mod_=0"}),
        (
            "lora_flux_dims",
            flux_dev,
            {
                "img_attn_dim": 2, "txt_attn_dim": 6, "img_mlp_dim": 8, "txt_mlp_dim": 10, "img_mod_dim": 12,
                "txt_mod_dim": 14, "single_dim": 16, "single_mod_dim": 18, "in_dims": [1, 3, 5, 7, 9],
            },
        ),
        (
            "lora_flux_block_indices",
            flux_dev,
            {"train_double_block_indices": "0-2,5", "train_single_block_indices": None},
        ),
        ("lora_flux_train_blocks_double", flux_dev, {"train_blocks": "double"}),
        ("lora_flux_train_blocks_single", flux_dev, {"train_blocks": "single"}),
        (
            "lora_sd35_medium_dims",
            sd35_medium,
            {
                "context_attn_dim": 2, "context_mlp_dim": 6, "context_mod_dim": 8, "x_attn_dim": 10, "x_mlp_dim": 12,
                "x_mod_dim": 14, "emb_dims": [1, 2, 3, 4, 5, 6], "train_block_indices": "0-3",
            },
        ),
        ("lora_flux_split_qkv", flux_dev, {"split_qkv": True}),
        ("lora_sd35_medium_split_qkv", sd35_medium, {"split_qkv": True}),
    ],
)  # fmt: skip
def test_files_are_those_of_the_reference_trainer(
    variant: str, parts: Callable[[], list[BuiltPart]], arguments: dict[str, Any]
) -> None:
    assert make_shapes(parts(), arguments) == golden(variant)


def find_ranks(parts: list[BuiltPart], arguments: dict[str, Any], **options: Any) -> dict[str, tuple[int, float]]:
    return {group.name: (rank, alpha) for group, rank, alpha in choose_ranks(parts, arguments, **options)}


def test_alphas() -> None:
    """conv_alpha is 1 unless given; 0 means the rank; blocks may have their own; text encoders keep network_alpha."""
    parts = sd15()
    linear, conv = "lora_unet_down_blocks_0_attentions_0_proj_in", "lora_unet_down_blocks_0_resnets_0_conv1"
    shortcut, text = "lora_unet_up_blocks_0_resnets_0_conv_shortcut", "lora_te_text_model_encoder_layers_0_mlp_fc1"
    plain = find_ranks(parts, {"conv_dim": 8}, network_dim=16, network_alpha=2.0)
    assert (plain[linear], plain[conv], plain[shortcut], plain[text]) == ((16, 2), (8, 1), (16, 2), (16, 2))
    zero = find_ranks(parts, {"conv_dim": 8, "conv_alpha": 0}, network_dim=16, network_alpha=0.0)
    assert (zero[linear], zero[conv]) == ((16, 16), (8, 8))
    blocks = {"block_alphas": (3,) * 25, "conv_block_dims": (5,) * 25, "conv_block_alphas": (7,) * 25}
    own = find_ranks(parts, blocks, network_dim=16)
    assert (own[linear], own[conv], own[shortcut], own[text]) == ((16, 3), (5, 7), (16, 3), (16, 1))


def find_preset(name: str, kind: str = "lora") -> tuple[AdapterRanks, dict[str, LayerGroup]]:
    """The ranks of a preset of LyCORIS on SD 1.5, and the adapted layers by their names."""
    parts, preset = sd15(), LYCORIS_PRESETS[name]
    specs = {part.spec.name: part.spec for part in parts}
    args = read_args({"conv_dim": 2} if preset.has_convolutions else {}, specs.values(), kind=kind)
    ranks = AdapterRanks(network=NetworkOptions(), args=args, specs=specs, preset=preset, adapter_kind=kind)
    groups = [group for part in parts for group in part.groups(every=True)]
    return ranks, {group.name: group for group in groups if ranks.find_rank(group)}


def test_the_preset_of_all_linear_layers() -> None:
    _, found = find_preset("full-lin")
    assert all(is_pointwise(group.layers[0]) for group in found.values())
    every = {name for name, group in find_preset("full")[1].items() if is_pointwise(group.layers[0])}
    assert {*found} == every
    assert {"lora_unet_up_blocks_0_resnets_0_conv_shortcut", "lora_unet_mid_block_resnets_0_time_emb_proj",
            "lora_unet_time_embedding_linear_1", "lora_te_text_model_encoder_layers_0_mlp_fc1"} <= every  # fmt: skip


def test_the_preset_of_blocks_of_convolutions() -> None:
    _, found = find_preset("unet-convblock-only")
    kinds = {re.sub(r"\d+", "N", name).removeprefix("lora_unet_") for name in found}
    assert kinds == {
        "conv_in", "conv_out", "down_blocks_N_downsamplers_N_conv", "up_blocks_N_upsamplers_N_conv",
        *(f"{block}_resnets_N_{layer}" for block in ("down_blocks_N", "mid_block", "up_blocks_N")
          for layer in ("convN", "time_emb_proj", "conv_shortcut") if (block, layer) != ("mid_block", "conv_shortcut")),
    }  # fmt: skip


def test_the_preset_of_factors_has_inputs_for_the_second_linear_layers() -> None:
    """Keys and values by their outputs, ff.net.2 and mlp.fc2 by their inputs, and nothing else."""
    ranks, found = find_preset("ia3", "ia3")
    sides: dict[str, set[bool]] = {}
    for group in found.values():
        end = re.search(r"to_\w$|\w_proj$|net\.2$|fc\d$", group.paths[0])
        assert end, group.paths
        sides.setdefault(end[0], set()).add(vars(ranks.find_options(group)["ia3"])["train_on_input"])
    assert sides == {
        "to_k": {False}, "to_v": {False}, "net.2": {True}, "k_proj": {False}, "v_proj": {False}, "fc2": {True},
    }  # fmt: skip
    assert len(found) == 16 * 5 + 12 * 3


def test_a_stabilized_rank_divides_by_its_root() -> None:
    """alpha / rank of what is written is alpha / sqrt(rank) of what was asked for; 0 stays alpha = rank."""
    for given, alpha in ((3.0, 12.0), (0.0, 64.0)):
        found = find_ranks(sd15(), {"rank_stabilized": True}, network_dim=16, network_alpha=given)
        assert set(found.values()) == {(16, alpha)}


def test_blocks_are_counted_as_in_sd_scripts() -> None:
    """Down- and upsamplers belong to the block before them; rank n marks block n."""
    ranks = find_ranks(sd15(), {"block_dims": tuple(range(100, 125)), "conv_block_dims": tuple(range(100, 125))})
    places = {
        "down_blocks_0_resnets_0_conv1": 1, "down_blocks_0_attentions_1_proj_in": 2,
        "down_blocks_0_downsamplers_0_conv": 3, "down_blocks_3_resnets_1_conv2": 11, "mid_block_resnets_1_conv1": 12,
        "mid_block_attentions_0_proj_in": 12, "up_blocks_0_resnets_0_conv1": 13, "up_blocks_0_upsamplers_0_conv": 15,
        "up_blocks_1_attentions_0_proj_out": 16, "up_blocks_3_resnets_2_time_emb_proj": 24,
    }  # fmt: skip
    assert {name: ranks[f"lora_unet_{name}"][0] - 100 for name in places} == places
    ranks = find_ranks(xl(), {"block_dims": tuple(range(100, 123)), "conv_block_dims": tuple(range(100, 123))})
    places = {
        "input_blocks_1_0_in_layers_2": 2, "input_blocks_3_0_op": 4, "input_blocks_8_1_proj_in": 9,
        "middle_block_0_in_layers_2": 10, "middle_block_1_proj_in": 11, "middle_block_2_emb_layers_1": 12,
        "output_blocks_0_1_proj_in": 13, "output_blocks_2_2_conv": 15, "output_blocks_8_0_skip_connection": 21,
    }  # fmt: skip
    assert {name: ranks[f"lora_unet_{name}"][0] - 100 for name in places} == places


def test_expressions_take_precedence_and_the_last_one_wins() -> None:
    arguments = {"train_blocks": "single", "single_dim": 6, "network_reg_dims": "_blocks_3_=2,double_.*_mlp_{1,2}0=9"}
    ranks = find_ranks(flux_dev(), arguments)
    assert ranks["lora_unet_single_blocks_3_linear1"] == (2, 1)
    assert ranks["lora_unet_single_blocks_4_linear1"] == (6, 1)
    assert ranks["lora_unet_double_blocks_3_img_attn_qkv"] == (2, 1)
    assert ranks["lora_unet_double_blocks_3_img_mlp_0"] == (9, 1)
    assert "lora_unet_double_blocks_4_img_attn_qkv" not in ranks


@pytest.mark.parametrize(
    ("parts", "arguments", "code", "detail"),
    [
        (sd15, {"block_dims": (4,) * 24}, "network-arg-wrong-length", "24 numbers, this model needs 25"),
        (sd15, {"network_reg_dims": "resnets=4"}, "network-arg-expression-unmatched", "resnets"),
        (sd15, {"exclude_patterns": "resnets"}, "network-arg-expression-unmatched", "resnets"),
        (sd15, {"include_patterns": "("}, "network-arg-invalid", "'('"),
        (sd15, {"block_dim": (4,) * 25}, "network-arg-unknown", "'block_dims'"),
        (sd15, {"conv_alpha": 1}, "conv-alpha-without-dim", "conv_dim"),
        (sd15, {"conv_block_alphas": (1,) * 25}, "conv-block-alphas-without-dims", "conv_block_dims"),
        (sd15, {"network_reg_dims": "a=1.5"}, "network-arg-invalid", "network_reg_dims=a=1.5"),
        (sd15, {"network_reg_dims": "a=1,b"}, "network-arg-invalid", "network_reg_dims=a=1,b"),
        (sd15, {"network_reg_dims": "(=1"}, "network-arg-invalid", "'('"),
        (sd15, {"rank_dropout": 1}, "network-arg-invalid", "rank_dropout=1"),
        (sd15, {"train_t5xxl": True}, "network-arg-unknown", "'train_t5xxl'"),
        (flux_dev, {"conv_dim": 4}, "network-arg-without-effect", "conv_dim"),
        (flux_dev, {"block_dims": (4,)}, "network-arg-without-effect", "block_dims"),
        (flux_dev, {"in_dims": (4, 4)}, "network-arg-wrong-length", "2 numbers, this model needs 5"),
        (flux_dev, {"train_blocks": "triple"}, "network-arg-invalid", "all, double, single"),
        (flux_dev, {"train_double_block_indices": "3-19"}, "block-index-too-high", "from 0 to 18"),
        (flux_dev, {"train_double_block_indices": "3-"}, "network-arg-invalid", "train_double_block_indices=3-"),
        (sd15, {"split_qkv": True}, "split-qkv-without-fused-layer", "split_qkv"),
        (flux_dev, {"split_qkv": 1}, "network-arg-invalid", "split_qkv=1"),
        (
            flux_dev, {"split_qkv": True, "img_attn_dim": 0, "txt_attn_dim": 0, "single_dim": 0},
            "split-qkv-without-fused-layer", "split_qkv",
        ),
        (chroma, {"img_mod_dim": 4}, "network-arg-unknown", "'img_mod_dim'"),
        (chroma, {"in_dims": (4, 0, 4, 0, 4)}, "rank-for-missing-layer", "in_dims: number 3"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_match_the_model(parts: Any, arguments: dict[str, Any], code: str, detail: str) -> None:
    with pytest.raises(UserError) as error:
        choose_ranks(parts(), arguments)
    assert error.value.code == code
    assert detail in str(error.value)


@pytest.mark.parametrize(("arguments", "adapted", "left"), [
    ({"exclude_patterns": r".*mlp.*"}, "img_attn_qkv", "img_mlp_0"),
    ({"include_patterns": [r"double_blocks\.\d+\.img_attn\..*"]}, "img_attn_qkv", "txt_attn_qkv"),
    ({"exclude_patterns": r".*", "include_patterns": r".*\.img_attn\.qkv"}, "img_attn_qkv", "img_attn_proj"),
])  # fmt: skip
def test_patterns_choose_layers_by_their_whole_names(arguments: dict[str, Any], adapted: str, left: str) -> None:
    ranks = find_ranks(flux_dev(), arguments)
    assert f"lora_unet_double_blocks_3_{adapted}" in ranks
    assert f"lora_unet_double_blocks_3_{left}" not in ranks


def test_alphas_by_names_and_names_with_dots() -> None:
    arguments = {"network_reg_dims": r"double_blocks\.3\..*=2", "network_reg_alphas": "_3_img=0.5,_3_img_mlp_0=8"}
    ranks = find_ranks(flux_dev(), arguments)
    assert ranks["lora_unet_double_blocks_3_img_attn_qkv"] == (2, 0.5)
    assert ranks["lora_unet_double_blocks_3_img_mlp_0"] == (2, 8)
    assert ranks["lora_unet_double_blocks_4_img_mlp_0"] == (4, 1)


def test_every_fault_is_reported_at_once() -> None:
    with pytest.raises(SeveralErrors) as error:
        read_args({"a": 1, "rank_dropout": "b"}, [_flux_keys.spec("")])
    assert error.value.codes == ["network-arg-unknown", "network-arg-invalid"]


def test_convolution_ranks_need_convolutions_that_train() -> None:
    parts = sd15()
    specs = {part.spec.name: part.spec for part in parts}
    ranks = AdapterRanks(network=NetworkOptions(), args=read_args(CONV, specs.values()), specs=specs)
    with pytest.raises(UserError) as error:
        ranks.check(parts[1].groups())
    assert error.value.code == "conv-dim-without-convolution"


def test_arguments_of_a_part_that_does_not_train() -> None:
    parts = [*flux_dev(), part(_clip.spec("clip_l", "", "lora_te1"), lambda: _clip.build(CLIP_L))]
    specs = {part.spec.name: part.spec for part in parts}
    for arguments in (
        {"single_dim": 4},
        {"in_dims": [1] * 5},
        {"train_blocks": "all"},
        {"train_single_block_indices": 0},
    ):
        ranks = AdapterRanks(network=NetworkOptions(), args=read_args(arguments, specs.values()), specs=specs)
        ranks.check(parts[0].groups(every=True))
        with pytest.raises(UserError, match=next(iter(arguments))) as error:
            ranks.check(parts[1].groups(every=True))
        assert error.value.code == "network-arg-of-frozen-part"


def test_a_kind_without_layers() -> None:
    config = {"num_layers": 2, "num_single_layers": 0}
    parts = [part(_flux_keys.spec(""), lambda: _flux_keys.build(config))]
    with pytest.raises(UserError, match="single_dim") as error:
        choose_ranks(parts, {"single_dim": 4})
    assert error.value.code == "rank-kind-without-layer"


def test_layers_beside_the_blocks_where_a_model_has_fewer() -> None:
    ranks = find_ranks(chroma(), {"in_dims": (2, 0, 0, 0, 8)})
    assert (ranks["lora_unet_img_in"], ranks["lora_unet_txt_in"]) == ((2, 1), (8, 1))
    assert len(ranks) == 230


@pytest.mark.parametrize(("rank", "is_refused"), [(1280, False), (1281, True), (10**9, True)])
def test_a_rank_above_that_of_every_layer_is_refused(rank: int, is_refused: bool) -> None:
    """SD 1's largest layers have the rank 1280: what is above adds nothing to any of them."""
    parts = sd15()
    specs = {part.spec.name: part.spec for part in parts}
    ranks = AdapterRanks(network=NetworkOptions(network_dim=rank), args=read_args({}, specs.values()), specs=specs)
    groups = [*parts[0].groups(), *parts[1].groups()]
    if not is_refused:
        ranks.check(groups)
        return
    with pytest.raises(UserError) as error:
        ranks.check(groups)
    assert error.value.code == "adapter-rank-beyond-layers"
    assert "1280" in error.value.fix


def test_block_indices_without_end_are_not_counted_out() -> None:
    args = read_args({"train_double_block_indices": "0-999999999"}, [_flux_keys.spec("")])
    indices = args.block_indices["train_double_block_indices"]
    assert indices is not None
    assert max(indices) == 9999
