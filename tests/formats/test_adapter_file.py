"""Reading adapter files: keys of every program, alpha wherever it is, and what is refused; no model is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.adapters.kinds import list_kinds, read_adapter_file
from sfumato.errors import UserError
from sfumato.formats.adapter_file import AdapterFile
from sfumato.formats.adapter_keys import COMMON_SPELLINGS, find_foreign_kind, parse_adapter_key
from sfumato.formats.adapter_kind import collect_spellings, describe_kinds, find_kinds

DOWN, UP = "lora_down.weight", "lora_up.weight"


def pair(name: str, down: str = DOWN, up: str = UP) -> dict[str, Tensor]:
    return {f"{name}.{down}": torch.ones(2, 3), f"{name}.{up}": torch.ones(4, 2)}


def read(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> AdapterFile:
    save_file(state, path / "a.safetensors", metadata)
    return read_adapter_file(path / "a.safetensors")


def read_error(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> UserError:
    with pytest.raises(UserError) as error:
        read(path, state, metadata)
    assert str(path) in error.value.what
    return error.value


@pytest.mark.parametrize(("key", "expected"), [
    ("lora_unet_a_b.lora_down.weight", ("lora_unet_a_b", DOWN)),
    ("lora_unet_a_b.alpha", ("lora_unet_a_b", "alpha")),
    ("transformer.a.0.b.lora_A.weight", ("transformer.a.0.b", DOWN)),
    ("transformer.a.0.b.lora_B.default.weight", ("transformer.a.0.b", UP)),
    ("unet.a.attn1.to_q.lora.down.weight", ("unet.a.attn1.to_q", DOWN)),
    ("unet.a.attn1.to_q.lora_linear_layer.up.weight", ("unet.a.attn1.to_q", UP)),
    ("unet.a.attn1.processor.to_out_lora.up.weight", ("unet.a.attn1.to_out.0", UP)),
    ("a.attn2.processor.to_k_lora.down.weight", ("a.attn2.to_k", DOWN)),
    ("text_encoder.a.self_attn.to_v_lora.up.weight", ("text_encoder.a.self_attn.v_proj", UP)),
    ("text_encoder.a.self_attn.to_out_lora.up.weight", ("text_encoder.a.self_attn.out_proj", UP)),
    ("base_model.model.a.b.lora_A.weight", ("a.b", DOWN)),
    ("unet.base_model.model.a.b.lora_A.weight", ("unet.a.b", DOWN)),
    ("_orig_mod.a.b.lora_A.weight", ("a.b", DOWN)),
    ("a._orig_mod.b.lora_A.weight", ("a.b", DOWN)),
    ("a.0.processor.qkv_lora1.down.weight", ("a.0.processor.qkv_lora1", DOWN)),
    ("lora_unet_a.hada_w1_a", ("lora_unet_a", "hada_w1_a")),
    ("bundle_emb.cup.clip_l", None),
    ("text_projection", None),
    ("model.diffusion_model.a.weight", None),
    ("." * 100_000, None),
])  # fmt: skip
def test_keys(key: str, expected: tuple[str, str] | None) -> None:
    assert parse_adapter_key(key, {**COMMON_SPELLINGS, **collect_spellings(list_kinds().values())}) == expected


@pytest.mark.parametrize(("tensor", "expected"), [
    ("dora_scale", "DoRA"), ("lora_magnitude_vector", "DoRA"), ("lora_magnitude_vector.weight", "DoRA"),
    ("hada_w2_b", "LoHa"), ("hada_t1", "LoHa"), ("lokr_w1", "LoKr"), ("lokr_t2", "LoKr"), ("oft_blocks", "Diag-OFT"),
    ("oft_R.weight", "OFTv2"), ("oft_diag", "OFT of PEFT before 0.16"), ("boft_R", "BOFT of PEFT"),
    ("boft_s", "BOFT of PEFT"), ("oft_blocks.1", "Diag-OFT"), ("on_input", "(IA)3"),
    ("ia3_l.weight", "(IA)3 of PEFT"), ("diff", "full difference"),
    ("a1.weight", "GLoRA"), ("lora_B.bias", "LoRA with biases"),
    ("lora_mid.weight", "Tucker LoRA"), ("alpha", ""), ("weight", ""),
])  # fmt: skip
def test_kinds(tensor: str, expected: str) -> None:
    kinds = list_kinds().values()
    name = collect_spellings(kinds).get(tensor, tensor)
    tensors = {name: torch.zeros(1, 2, 2)}
    assert (describe_kinds(find_kinds(tensors, kinds)) or find_foreign_kind(tensor)) == expected


@pytest.mark.parametrize(("alpha", "expected"), [
    (torch.tensor(1.5), 1.5), (torch.tensor([1.5]), 1.5), (torch.tensor([[3]]), 3.0),
    (torch.tensor(1.5, dtype=torch.float16), 1.5), (torch.tensor(4, dtype=torch.int64), 4.0), (None, 2.0),
])  # fmt: skip
def test_alpha(alpha: Tensor | None, expected: float, tmp_path: Path) -> None:
    """One number in any shape; without one it is the rank."""
    more = {} if alpha is None else {"x.alpha": alpha}
    assert float(read(tmp_path, pair("x") | more).layers["x"]["alpha"]) == expected


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
def test_containers(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "safetensors":
        save_file(pair("x"), path)
    else:
        torch.save(pair("x"), path)
    assert set(read_adapter_file(path).layers) == {"x"}


def test_a_scalar_is_multiplied_into_the_second_matrix(tmp_path: Path) -> None:
    layer = read(tmp_path, pair("x") | {"x.scalar": torch.tensor(0.25)}).layers["x"]
    assert torch.equal(layer[UP], torch.full((4, 2), 0.25))
    assert set(layer) == {DOWN, UP, "alpha"}


def test_foreign_tensors_are_passed_over_and_named(tmp_path: Path) -> None:
    state = pair("lora_unet_x") | {"bundle_emb.cup.clip_l": torch.ones(2), "text_projection": torch.ones(2)}
    file = read(tmp_path, state)
    assert set(file.layers) == {"lora_unet_x"}
    assert sorted(file.passed_over) == ["bundle_emb.cup.clip_l", "text_projection"]
    (line,) = file.describe_passed_over()
    assert "bundle_emb.cup.clip_l" in line
    assert not read(tmp_path, pair("lora_unet_x")).describe_passed_over()


@pytest.mark.parametrize(("state", "code", "word"), [
    ({}, "adapter-file-empty", "no tensors"),
    ({f"x.{DOWN}": torch.ones(2, 3)}, "adapter-matrix-missing", "lora_up"),
    ({f"x.{UP}": torch.ones(2, 3)}, "adapter-matrix-missing", "lora_down"),
    ({"x.alpha": torch.ones(1)}, "adapter-file-without-adapter", "x.alpha"),
    (pair("x") | {"y.alpha": torch.ones(1)}, "adapter-kind-unclear", "y has alpha"),
    (pair("x") | {f"x.{UP}": torch.full((4, 2), torch.nan)}, "adapter-not-finite", "x.lora_up"),
    (pair("x") | {"x.alpha": torch.tensor(torch.inf)}, "adapter-not-finite", "x.alpha"),
    (pair("x") | {"x.alpha": torch.ones(2)}, "adapter-alpha-shape", "2 numbers"),
    (pair("x") | {f"x.{UP}": torch.ones(4, 5)}, "adapter-matrices-mismatch", "(4, 5)"),
    (pair("x") | {f"x.{UP}": torch.ones(4)}, "adapter-matrices-mismatch", "(4,)"),
    ({f"x.{DOWN}": torch.ones(0, 3), f"x.{UP}": torch.ones(4, 0)}, "adapter-matrices-mismatch", "(0, 3)"),
    (pair("x") | {"x.lora_mid.weight": torch.ones(2, 2)}, "adapter-matrices-mismatch", "(2, 2)"),
    (pair("x") | {"x.lokr_w1": torch.ones(4, 1)}, "adapter-kind-unclear", "x has"),
    ({"x.dora_scale": torch.ones(4, 1)}, "adapter-kind-unclear", "x has dora_scale"),
    ({"x.hada_w1_a": torch.ones(1)}, "adapter-matrix-missing", "hada_w1_b"),
    ({"x.oft_r": torch.ones(1)}, "adapter-kind-unsupported", "is of the kind OFT of PEFT before 0.16 (1 layer)"),
    ({"x.boft_R": torch.ones(1)}, "adapter-matrix-missing", "boft_s"),
    ({"x.boft_R": torch.ones(3, 2, 2, 2), "x.boft_s": torch.ones(4, 1)}, "adapter-matrices-mismatch", "(3, 2, 2, 2)"),
    ({"x.oft_blocks": torch.ones(2, 3, 2)}, "adapter-matrices-mismatch", "(2, 3, 2)"),
    ({"x.oft_blocks": torch.ones(2, 2, 2), "x.rescale": torch.ones(3, 1)}, "adapter-matrices-mismatch", "(3, 1)"),
    ({"x.rescale": torch.ones(3, 1)}, "adapter-matrix-missing", "oft_blocks"),
    ({"x.oft_blocks.1": torch.ones(2, 2, 2)}, "adapter-matrix-missing", "oft_blocks.0"),
    ({"x.oft_R.weight": torch.ones(2, 2)}, "adapter-matrices-mismatch", "(2, 2)"),
    (pair("x") | {"y.lokr_w1": torch.ones(2, 2)}, "adapter-matrix-missing", "lokr_w2_a"),
    ({"x.lokr_w1": torch.ones(1), "x.lokr_w2": torch.ones(2, 2)}, "lokr-tensor-no-matrix", "lokr_w1"),
    (
        {"x.lokr_w1": torch.ones(2, 2), "x.lokr_w2_a": torch.ones(3, 2), "x.lokr_w2_b": torch.ones(3, 4)},
        "adapter-matrices-mismatch", "(3, 2) and (3, 4)",
    ),
    (pair("x") | {"y.diff_b": torch.ones(1)}, "adapter-matrix-missing", "no diff"),
    (pair("x") | {"y.set_weight": torch.ones(1)}, "adapter-kind-unsupported", "whole weights"),
    ({"x.diff": torch.ones(4)}, "adapter-matrices-mismatch", "(4,)"),
    ({"x.diff": torch.ones(4, 3), "x.diff_b": torch.ones(3)}, "adapter-matrices-mismatch", "(4, 3) and (3,)"),
    ({"x.on_input": torch.tensor(0)}, "adapter-matrix-missing", "no weight"),
    ({"lora_unet_x.on_input": torch.tensor(0), "lora_unet_x.weight": torch.ones(4),
      "lora_unet_y.weight": torch.ones(4)}, "adapter-with-whole-weights", "lora_unet_y.weight"),
    (pair("u.x") | {"u.norm.scale": torch.ones(1)}, "adapter-with-whole-weights", "u.norm.scale"),
    (pair("lora_unet_x") | {"lora_unet_x.new": torch.ones(1)}, "adapter-with-whole-weights", "lora_unet_x.new"),
    (pair("base_model.model.x") | {"base_model.model.y.weight": torch.ones(1)}, "adapter-with-whole-weights", "y"),
    (pair("x") | pair("x", "lora_A.weight", "lora_B.weight"), "adapter-tensor-twice", "x"),
    ({"model.diffusion_model.a.weight": torch.ones(1)}, "adapter-file-without-adapter", "a checkpoint"),
    ({"emb_params": torch.ones(1)}, "adapter-file-without-adapter", "a textual inversion"),
    ({"lllite_dit_x.down.weight": torch.ones(2, 3), "lllite_dit_x.up.weight": torch.ones(3, 2)},
     "adapter-file-without-adapter", "--control_net_lllite_models"),
])  # fmt: skip
def test_refusals(state: dict[str, Tensor], code: str, word: str, tmp_path: Path) -> None:
    error = read_error(tmp_path, state)
    assert (error.code, word in error.what) == (code, True), error.what


@pytest.mark.parametrize("facts", ["", "[1]", "{", '{"transformer.lora_alpha": "much"}', "[" * 100_000])
def test_damaged_metadata_of_diffusers(facts: str, tmp_path: Path) -> None:
    error = read_error(tmp_path, pair("transformer.x"), {"lora_adapter_metadata": facts})
    assert error.code in ("adapter-metadata-damaged", "peft-alpha-invalid")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"lora_alpha": true}', '{"lora_alpha": 1e999}', '{"alpha_pattern": 3}']
)
def test_damaged_configurations_of_peft(text: str, tmp_path: Path) -> None:
    save_file(pair("base_model.model.x"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_adapter_file(tmp_path)
    assert error.value.code in ("peft-config-damaged", "peft-alpha-invalid")


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_adapter_file(tmp_path)
    assert error.value.code == "adapter-folder-unclear"
    save_file(pair("x"), tmp_path / "mine.safetensors")
    assert set(read_adapter_file(tmp_path).layers) == {"x"}
    save_file(pair("y"), tmp_path / "other.safetensors")
    with pytest.raises(UserError) as error:
        read_adapter_file(tmp_path)
    assert (error.value.code, "mine.safetensors, other.safetensors" in error.value.what) == (
        "adapter-folder-unclear", True,
    )  # fmt: skip
    save_file(pair("z"), tmp_path / "pytorch_lora_weights.safetensors")
    assert set(read_adapter_file(tmp_path).layers) == {"z"}
    save_file(pair("base_model.model.w"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 7}))
    layers = read_adapter_file(tmp_path).layers
    assert {name: float(layer["alpha"]) for name, layer in layers.items()} == {"w": 7.0}


@pytest.mark.parametrize(("key", "word"), [
    ("lora_transformer_x", "OneTrainer"), ("lycoris_x", "LyCORIS"), ("base_model.model.x.y", "PEFT"),
    ("diffusion_model.x.y", "ComfyUI"), ("transformer.x.y", "diffusers"), ("lora_unet_x", "kohya"),
])  # fmt: skip
def test_the_origin_is_guessed(key: str, word: str, tmp_path: Path) -> None:
    ends = (DOWN, UP) if key.startswith("l") else ("lora_A.weight", "lora_B.weight")
    file = read(tmp_path, pair(key, *ends), {"ss_base_model_version": "toy1"})
    assert word in file.describe_origin()
    assert "toy1" in file.describe_origin()
