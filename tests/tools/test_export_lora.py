"""`sfumato lora convert`: diffusers with the exported file predicts what our networks with the LoRA do."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from families.built_part import BuiltPart
from families.loading import load_family
from families.toys import ToyShelf
from sfumato.adapters.base import AdapterEngine
from sfumato.adapters.lora import LoRA
from sfumato.cli.main import main
from sfumato.config import Config, NetworkOptions, NoiseOptions, OptimOptions
from sfumato.config.run import LoopOptions
from sfumato.data.batch import Sizes
from sfumato.families import _unet, register_families, sdxl
from sfumato.families.base import FAMILIES, Family, find_family
from sfumato.families.blueprint import Component
from sfumato.families.encoding import encode_with_grad
from sfumato.families.source import open_source
from sfumato.formats.hashes import calculate_adapter_hashes
from sfumato.methods import make_method

CPU = torch.device("cpu")
PROMPT = "a red cup of coffee"
EMBEDDERS = {"flux": "in_dims", "chroma": "in_dims", "sd3": "emb_dims", "lumina": "embedder_dims"}


@dataclass(frozen=True)
class Case:
    """A toy, and where diffusers' pipeline has its networks."""

    family: str
    networks: dict[str, str]  # part -> attribute of the pipeline, of those for which it loads LoRA
    variant: str = ""
    args: dict[str, Any] = field(default_factory=dict)
    removed: str = ""


CASES = {
    "flux": Case("flux", {"denoiser": "transformer", "clip_l": "text_encoder"}, args={"in_dims": (1, 2, 3, 2, 1)}),
    "flux, split": Case("flux", {"denoiser": "transformer", "clip_l": "text_encoder"}, args={"split_qkv": True}),
    "flux with T5": Case(
        "flux", {"denoiser": "transformer", "clip_l": "text_encoder"}, args={"train_t5xxl": True}, removed="t5"
    ),
    "chroma": Case("chroma", {"denoiser": "transformer"}, args={"in_dims": (3, 0, 0, 0, 2), "single_dim": 5}),
    "chroma with T5": Case("chroma", {"denoiser": "transformer"}, args={"train_t5xxl": True}, removed="t5"),
    "sd3": Case("sd3", {"denoiser": "transformer", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}),
    "sd3.5": Case(
        "sd3", {"denoiser": "transformer", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}, "3.5-medium",
        {"emb_dims": (2, 1, 2, 3, 2, 1), "train_t5xxl": True, "context_attn_dim": 4}, "t5",
    ),
    "lumina": Case(
        "lumina", {"denoiser": "transformer"}, args={"embedder_dims": (2, 1, 3), "attn_dim": 4}, removed="gemma2"
    ),
    "lumina, split": Case("lumina", {"denoiser": "transformer"}, args={"split_qkv": True}, removed="gemma2"),
    "sd": Case("sd", {"denoiser": "unet", "clip": "text_encoder"}, args={"conv_dim": 3, "conv_alpha": 2}),
    "sd2": Case("sd", {"denoiser": "unet", "clip": "text_encoder"}, "2"),
}  # fmt: skip


def load(toy_shelf: ToyShelf, case: Case) -> Family:
    register_families()
    options = toy_shelf.options(case.family, variant=case.variant)
    source = open_source(options)
    family = find_family(None, source)
    return load_family(family, family.read(source, options, NoiseOptions()), options)


def attach_lora(model: Family, case: Case) -> Any:
    """A LoRA that matters on every layer; its alpha / rank is no power of two."""
    config = Config(
        network=NetworkOptions(network_dim=2, network_alpha=3.0, network_args=case.args),
        optim=OptimOptions(learning_rate=1.0), loop=LoopOptions(seed=1),
    )  # fmt: skip
    method: Any = make_method(config)
    method.plan(model.blueprint)
    method.prepare(model)
    for i, parameter in enumerate(method.modules.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    method.modules.eval()
    return method


def write_lora(model: Family, method: Any, path: Path, dtype: torch.dtype | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    method.write(model, path, {"ss_base_model_version": "toy", "ss_network_dim": "2"}, dtype)
    return path


def count_lora_layers(module: nn.Module) -> int:
    return sum(1 for each in module.modules() if isinstance(getattr(each, "lora_A", None), nn.ModuleDict))


def make_inputs(model: Family) -> dict[str, Any]:
    """What the denoiser gets for a fixed prompt and noisy latent."""
    model_text = {part: encode_with_grad(model, part, [PROMPT]) for part in model.text_parts}
    conditioning = model.condition(model_text, Sizes.from_size(1, 64, 64), None)
    x = torch.randn(1, model.latents.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.make_inputs(x, torch.tensor([600.0]), conditioning)


def encode_tokens(module: Any, vocabulary: int) -> Tensor:
    return module(input_ids=(torch.arange(77) % vocabulary)[None]).last_hidden_state


FAST = {"flux, split", "sd3.5"}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.full) for name in sorted(CASES)]
)
@torch.no_grad()
def test_diffusers_gives_the_same(name: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    case = CASES[name]
    model = load(toy_shelf, case)
    inputs = make_inputs(model)
    before = model.denoiser(**inputs, return_dict=False)[0]
    method = attach_lora(model, case)
    file, target = write_lora(model, method, tmp_path / "lora.safetensors"), tmp_path / "out" / "lora.safetensors"
    command = ["lora", "convert", str(file), str(target), "--to", "diffusers"]
    assert main([*command, *(["--without", case.removed] if case.removed else [])]) == 0

    folder = toy_shelf.paths(case.family, "diffusers", case.variant)["pretrained_model_name_or_path"]
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(target.parent, weight_name=target.name)
    for part, theirs in case.networks.items():
        layers = sum(len(adapter.group.paths) for adapter in method.engine if adapter.group.part == part)
        assert count_lora_layers(getattr(pipe, theirs)) == layers > 0, part
    ours = model.denoiser(**inputs, return_dict=False)[0]
    found = getattr(pipe, case.networks["denoiser"])(**inputs, return_dict=False)[0]
    assert (ours - before).abs().max() > 1e-2, "the LoRA must matter"
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)
    for part, theirs in case.networks.items():
        if part != "denoiser":
            encoder, module = getattr(pipe, theirs), model.parts[part].module
            vocabulary = module.get_input_embeddings().weight.shape[0]
            mine = encode_tokens(module, vocabulary)
            torch.testing.assert_close(encode_tokens(encoder, vocabulary), mine, rtol=0, atol=1e-5)
            with method.disabled():
                assert (encode_tokens(module, vocabulary) - mine).abs().max() > 1e-3


@pytest.mark.full
@torch.no_grad()
def test_names_of_published_size(tmp_path: Path) -> None:
    """Stable Diffusion XL's blocks are counted otherwise in its files; few channels, all blocks."""
    from diffusers import UNet2DConditionModel

    config = {
        **sdxl._PUBLISHED_CONFIG, "block_out_channels": (32, 32, 64), "transformer_layers_per_block": (1, 2, 3),
        "cross_attention_dim": 32, "attention_head_dim": (1, 1, 2), "use_linear_projection": True,
    }  # fmt: skip
    torch.manual_seed(0)
    ours: Any = _unet.build(config)
    theirs: Any = UNet2DConditionModel.from_config(ours.config)
    theirs.load_state_dict(ours.state_dict())
    part = BuiltPart(spec=sdxl._unet_spec(_unet.key_map(config)), module=ours)
    engine = AdapterEngine()
    groups = [group for group in part.groups(every=True) if not group.is_norm]
    engine.attach(groups, lambda group: LoRA(group, rank=3, alpha=1.0))
    for i, parameter in enumerate(engine.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    save_file(
        {name: tensor.contiguous() for name, tensor in engine.export_tensors().items()}, tmp_path / "lora.safetensors"
    )
    target = tmp_path / "theirs.safetensors"
    assert main(["lora", "convert", str(tmp_path / "lora.safetensors"), str(target), "--to", "diffusers"]) == 0
    theirs.load_lora_adapter(load_file(target), prefix="unet")
    layers = [name for name, each in ours.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    assert count_lora_layers(theirs) == len(list(engine)) == len(layers)
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 32)
    found = theirs(x, torch.tensor([600]), encoder_hidden_states=text).sample
    torch.testing.assert_close(
        found, ours(x, torch.tensor([600]), encoder_hidden_states=text).sample, rtol=0, atol=1e-4
    )


# ---------------------------------------------------------------- the file


LAYER = "lora_unet_joint_blocks_0_x_block_mlp_fc1"
STACK = "lora_unet_joint_blocks_0_x_block_attn_qkv"


def small(path: Path, *, dtype: torch.dtype = torch.float32, **more: Tensor) -> Path:
    """Two layers of an SD3 transformer 4 channels wide, at strength 1/3."""
    torch.manual_seed(0)
    state = {
        f"{LAYER}.lora_down.weight": torch.randn(3, 4), f"{LAYER}.lora_up.weight": torch.randn(16, 3),
        f"{LAYER}.alpha": torch.tensor(1.0), f"{STACK}.lora_down.weight": torch.randn(6, 4),
        f"{STACK}.lora_up.weight": torch.randn(12, 6), f"{STACK}.alpha": torch.tensor(2.0),
    }  # fmt: skip
    state = {key: tensor.to(dtype) for key, tensor in (state | more).items()}
    save_file(state, path, {"ss_network_dim": "3", "sshs_model_hash": "old", "modelspec.title": "mine"})
    return path


def export(source: Path, target: Path, *words: str) -> int:
    return main(["lora", "convert", str(source), str(target), "--to", "diffusers", *words])


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """alpha / rank is in the second matrix; of the metadata only the hashes are new."""
    source, target = small(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    assert export(source, target) == 0
    written, note = capsys.readouterr().out.splitlines()
    assert written == f"{target}: 2 LoRA of denoiser; 4 layers in diffusers, 8 tensors"
    assert str(source) in note
    old, new = load_file(source), load_file(target)
    block = "transformer.transformer_blocks.0."
    names = [f"{block}{name}" for name in ("ff.net.0.proj", "attn.to_q", "attn.to_k", "attn.to_v")]
    assert set(new) == {f"{name}.lora_{matrix}.weight" for name, matrix in itertools.product(names, "AB")}
    assert torch.equal(new[f"{names[0]}.lora_A.weight"], old[f"{LAYER}.lora_down.weight"])
    torch.testing.assert_close(new[f"{names[0]}.lora_B.weight"], old[f"{LAYER}.lora_up.weight"] / 3)
    torch.testing.assert_close(new[f"{names[2]}.lora_B.weight"], old[f"{STACK}.lora_up.weight"][4:8] / 3)
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    hashes = calculate_adapter_hashes(new, metadata)
    assert metadata == {
        "format": "pt", "ss_network_dim": "3", "modelspec.title": "mine", "sshs_model_hash": hashes[0],
        "sshs_legacy_hash": hashes[1],
    }  # fmt: skip


@pytest.mark.parametrize(("stored", "word", "expected"), [
    (torch.bfloat16, "", torch.bfloat16),
    (torch.float16, "float", torch.float32),
    (torch.float32, "fp16", torch.float16),
])  # fmt: skip
def test_types(stored: torch.dtype, word: str, expected: torch.dtype, tmp_path: Path) -> None:
    source, target = small(tmp_path / "a.safetensors", dtype=stored), tmp_path / "b.safetensors"
    assert export(source, target, *(["--save_precision", word] if word else [])) == 0
    assert {tensor.dtype for tensor in load_file(target).values()} == {expected}


def test_layers_trained_one_by_one_get_their_own_ranks(tmp_path: Path) -> None:
    """As split_qkv leaves them: blocks on a diagonal. The product is the same, the file a third as large."""
    up = torch.block_diag(*torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1)))
    source = small(tmp_path / "a.safetensors", **{f"{STACK}.lora_up.weight": up})
    assert export(source, tmp_path / "b.safetensors") == 0
    old, new = load_file(source), load_file(tmp_path / "b.safetensors")
    product = up @ old[f"{STACK}.lora_down.weight"] / 3
    for i, name in enumerate("qkv"):
        first, second = (new[f"transformer.transformer_blocks.0.attn.to_{name}.lora_{x}.weight"] for x in "AB")
        assert first.shape == (2, 4)
        torch.testing.assert_close(second @ first, product[4 * i : 4 * i + 4])


def test_an_untrained_stack_keeps_its_ranks(tmp_path: Path) -> None:
    source = small(tmp_path / "a.safetensors", **{f"{STACK}.lora_up.weight": torch.zeros(12, 6)})
    assert export(source, tmp_path / "b.safetensors") == 0
    assert load_file(tmp_path / "b.safetensors")["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"].shape == (
        6,
        4,
    )


def test_an_existing_file_is_replaced_with_a_note_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = small(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    target.write_bytes(b"something older")
    assert export(source, target, "--without", "t5") == 2
    assert target.read_bytes() == b"something older"
    assert export(source, target) == 0
    assert "b.safetensors (replaced): 2 LoRA" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


# ---------------------------------------------------------------- what is refused


def read_errors(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    return "\n".join(lines)


def test_unknown_names_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {f"lora_unet_odd.lora_{which}.weight": torch.ones(4, 4) for which in ("down", "up")}
    assert export(small(tmp_path / "a.safetensors", **odd), tmp_path / "b.safetensors") == 2
    printed = read_errors(capsys)
    assert "1 of 3" in printed
    assert "lora_unet_odd" in printed
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(("state", "code"), [
    ({f"{LAYER}.lora_down.weight": (3, 4)}, "adapter-matrix-missing"),
    ({f"{LAYER}.lora_down.weight": (3, 4), f"{LAYER}.lora_up.weight": (16, 2)}, "adapter-matrices-mismatch"),
    ({f"{LAYER}.lora_down.weight": (3,), f"{LAYER}.lora_up.weight": (16,)}, "adapter-matrices-mismatch"),
    ({f"{LAYER}.oft_r": (3, 4)}, "adapter-kind-unsupported"),
    ({f"{STACK}.lora_down.weight": (3, 4), f"{STACK}.lora_up.weight": (13, 3)}, "adapter-names-unmatched"),
    ({}, "adapter-file-empty"),
])  # fmt: skip
def test_files_of_another_kind(
    state: dict[str, tuple[int, ...]], code: str, tmp_path: Path, codes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({key: torch.ones(shape) for key, shape in state.items()}, tmp_path / "a.safetensors")
    assert export(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == 2
    assert codes == [code]
    assert "a.safetensors" in read_errors(capsys)
    assert not (tmp_path / "b.safetensors").exists()


def test_values_beyond_the_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = small(tmp_path / "a.safetensors", **{f"{LAYER}.alpha": torch.tensor(1e6)})
    assert export(source, tmp_path / "b.safetensors", "--save_precision", "fp16") == 2
    printed = read_errors(capsys)
    assert LAYER in printed
    assert "--save_precision float" in printed
    assert math.isfinite(float(load_file(source)[f"{LAYER}.alpha"]))


def test_parts_that_diffusers_does_not_load_are_removed_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], codes: list[str]
) -> None:
    layer = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    text = {f"{layer}.lora_down.weight": torch.ones(2, 4), f"{layer}.lora_up.weight": torch.ones(4, 2)}
    source, target = small(tmp_path / "a.safetensors", **text), tmp_path / "b.safetensors"
    assert export(source, target) == 2
    assert "--without t5" in capsys.readouterr().err
    assert export(source, target, "--without", "t5,clip_l") == 2
    printed = capsys.readouterr().err
    assert "clip_l" in printed
    assert "t5, denoiser" in printed
    assert export(source, target, "--without", "t5,denoiser") == 2
    assert codes == ["lora-part-not-loadable", "lora-part-missing", "lora-without-parts"]
    assert export(source, target, "--without", "t5") == 0
    assert len(load_file(target)) == 8


def test_names_that_several_families_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], codes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fault while they agree about what is written."""
    register_families()
    name = "lora_unet_double_blocks_0_img_mlp_0"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)},
        tmp_path / "a.safetensors",
    )
    assert export(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == 0
    monkeypatch.setattr(
        FAMILIES.get("chroma"), "components", {"denoiser": Component(folder="other"), "t5": Component(folder="x")}
    )
    assert export(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == 2
    assert codes == ["adapter-family-ambiguous"]
    assert "--family chroma or flux" in capsys.readouterr().err
    assert export(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--family", "chroma") == 0
    assert next(iter(load_file(tmp_path / "b.safetensors"))).startswith("other.")


@pytest.mark.parametrize(("words", "message"), [
    (["a.safetensors", "--to", "diffusers"], "TARGET is missing"),
    (["a.safetensors", "b.safetensors", "--to", "comfy"], "'comfy' is not one of kohya, diffusers, aitoolkit, comfyui"),
    (["a.safetensors", "b.safetensors"], "--to is missing"),
    (["a.safetensors", "b.safetensors", "--to", "diffusers", "--save_precision", "fp8"], "'fp8' is not one of"),
    (["a.safetensors", "b.safetensors", "--to", "diffusers", "--familly", "x"], "did you mean --family?"),
    (["a.safetensors", "b.safetensors", "--to", "diffusers", "--family", "fluxx"], "did you mean 'flux'"),
    (["a.safetensors", "b.ckpt", "--to", "diffusers"], "must end in .safetensors"),
    (["a.safetensors", "a.safetensors", "--to", "diffusers"], "is one of the inputs"),
    (["none.safetensors", "b.safetensors", "--to", "diffusers"], "none.safetensors does not exist"),
    (["a.safetensors", "b.safetensors", "--to"], "--to needs a value"),
])  # fmt: skip
def test_wrong_words(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)
    assert main(["lora", "convert", *words]) == 2
    assert message in read_errors(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lora"]) == 0
    assert "convert" in capsys.readouterr().out
    assert main(["lora", "convert", "--help"]) == 0
    assert "--without" in capsys.readouterr().out
    assert main(["lora", "convret"]) == 2
    assert "did you mean 'convert'" in capsys.readouterr().err
