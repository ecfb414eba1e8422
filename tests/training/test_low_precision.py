"""Training on weights in fewer bits is training on the weights that they mean; memory falls as it should."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.toys import ToyShelf
from formats.test_gguf import write_gguf
from quantization.meant import FLOAT8, INT8, round_float8, round_nf4, round_scaled
from rehearsing import needs_rehearsal
from sfumato.config import load_config
from sfumato.config.memory import MemoryOptions
from sfumato.errors import UserError
from sfumato.memory.low_precision import check_float8_products, choose_formats
from sfumato.memory.offload import find_blocks
from sfumato.plan import RunPlan, make_run_plan
from sfumato.quantization.weight import QuantizedWeight, list_stored
from sfumato.tools.memory_bound import count_weight_bytes
from sfumato.tools.rehearsal_stages import STEP
from sfumato.tools.rehearse import rehearse_plan
from sfumato.training.model_setup import make_model
from toy_runs import equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy

FAMILIES = ("flux", "sd", "sdxl", "sd3", "chroma", "lumina")
every_family = pytest.mark.parametrize("family", [pytest.param(name, id=name) for name in FAMILIES])
Meant = Callable[[Tensor], Tensor]
FORMATS: Mapping[str, Meant] = {
    "fp8_base": round_float8,
    "fp8_base_unet": round_float8,
    "fp8_scaled": lambda weight: round_scaled(weight, 64, FLOAT8),
    "int8_base": lambda weight: round_scaled(weight, 128, INT8),
    "nf4_base": round_nf4,
}
# Every format where all layers are linear, those of several kinds of rows with convolutions, one in each other family:
# which layers these keep is `test_what_is_stored_is_all_that_is_loaded`.
TRAINED = [
    *(("flux", option) for option in FORMATS), ("sd", "fp8_scaled"), ("sd", "int8_base"), ("sd", "nf4_base"),
    ("sdxl", "fp8_base_unet"), ("sd3", "int8_base"), ("chroma", "nf4_base"), ("lumina", "fp8_scaled"),
]  # fmt: skip
OF_TEXT = {"fp8_base", "int8_base", "nf4_base"}  # those that hold for text encoders, too
SHORT = {"max_train_steps": 2}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), 2)


def plan_toy(toy: Mapping[str, Path], images: Path, output: Path, **options: Any) -> RunPlan:
    return make_run_plan(load_config(make_arguments(toy, images, output, **options)), processes=1)


def write_meant(toy: Mapping[str, Path], plan: RunPlan, folder: Path, meant: Meant, *, text: bool) -> dict[str, Path]:
    """The toy's files with the weights that stored ones mean: those of layers in the repeated blocks."""
    model = make_model(plan, torch.device("meta"))
    states = {path: load_file(path) for path in toy.values() if path.suffix == ".safetensors"}
    for name, part in model.parts.items():
        if name == "vae" or (name in model.text_parts and not text):
            continue
        weights = part.network.weights
        keys = {weights.prefix + weights.stored_keys[ours] for ours in part.weight_formats}
        assert keys
        state = states[weights.file.header.path]
        state |= {key: meant(state[key]).to(state[key].dtype) for key in keys}
    shutil.copytree(toy["pretrained_model_name_or_path"].parent, folder)
    for path, state in states.items():
        save_file(state, folder / path.name)
    return {option: folder / path.name for option, path in toy.items()}


@pytest.mark.fast_for("flux-fp8_base]")
@pytest.mark.parametrize(("family", "option"), TRAINED)
def test_it_trains_on_the_weights_that_are_meant(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, family: str, option: str
) -> None:
    """The losses and the trained file are those of a checkpoint with these weights, to the bit."""
    toy = toy_shelf.paths(family)
    plan = plan_toy(toy, images, tmp_path / "out", **{option: True})
    meant = write_meant(toy, plan, tmp_path / "meant", FORMATS[option], text=option in OF_TEXT)
    small = train_toy(toy, images, tmp_path / "small", **SHORT, **{option: True})
    whole = train_toy(meant, images, tmp_path / "whole", **SHORT)
    assert [row["loss/current"] for row in read_metrics(small)] == pytest.approx(
        [row["loss/current"] for row in read_metrics(whole)], rel=1e-5
    )
    for name, tensor in read_weights(small).items():
        torch.testing.assert_close(tensor, read_weights(whole)[name], rtol=1e-3, atol=2e-5)


@every_family
@pytest.mark.fast_for("flux")
def test_what_is_stored_is_all_that_is_loaded(toy_shelf: ToyShelf, images: Path, tmp_path: Path, family: str) -> None:
    """Layers in the blocks are in the format; norms, biases, embeddings and the other layers are not; plans say so."""
    plan = plan_toy(toy_shelf.paths(family), images, tmp_path / "out", fp8_base=True, mixed_precision="bf16")
    model = make_model(plan, torch.device("cpu"))
    assert model.parts["vae"].format is None
    for name in ("denoiser", *model.text_parts):
        part = model.parts[name]
        part.load()
        parameters = dict(part.module.named_parameters())
        small = [key for key, each in parameters.items() if isinstance(each, QuantizedWeight)]
        assert small == list(part.weight_formats)
        assert not [key for key in small if "norm" in key.rpartition(".")[0].rpartition(".")[2]]
        held = list_stored(part.module.state_dict(keep_vars=True).values())  # with the positions of SD3, a buffer
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in held}  # tied ones once
        assert sum(tensors.values()) == count_weight_bytes(part)
        assert any(note.startswith(f"{name}: {len(small)} weights in float8") for note in plan.notes)
        part.unload()


def test_which_networks_the_options_mean(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """--fp8_base_unet means the denoiser alone, as in sd-scripts also beside --fp8_base."""
    plan = plan_toy(toy_shelf.paths("flux"), images, tmp_path / "out")
    model = make_model(plan, torch.device("meta"))
    text, denoiser = model.parts["t5"], model.parts["denoiser"]
    for options, expected in (
        ({"fp8_base": True}, ("float8", "float8")),
        ({"fp8_base_unet": True}, ("float8", None)),
        ({"fp8_base": True, "fp8_base_unet": True}, ("float8", None)),
        ({"fp8_base": True, "fp8_scaled": True}, ("float8 with a scale for each 64 columns", "float8")),
        ({"fp8_scaled": True}, ("float8 with a scale for each 64 columns", None)),
        ({"nf4_base": True}, ("nf4 with a scale for each 64 columns",) * 2),
    ):
        choose_formats(model, MemoryOptions.model_validate(options))
        found = tuple(part.format and part.format.label for part in (denoiser, text))
        assert found == expected, options


@pytest.mark.full
@pytest.mark.parametrize("option", ["nf4_base", "int8_compute"])
@pytest.mark.fast_for("int8_compute")
def test_resuming_gives_the_same_bits(toy_shelf: ToyShelf, images: Path, tmp_path: Path, option: str) -> None:
    """Also with blocks whose stored weights visit the device from main memory."""
    toy = toy_shelf.paths("flux")
    options = {option: True, "cache_latents": True, "network_train_unet_only": True, "gradient_checkpointing": True}
    whole = train_toy(toy, images, tmp_path / "whole", **options, max_train_steps=3)
    train_toy(toy, images, tmp_path / "first", **options, max_train_steps=2, save_state=True)
    state = tmp_path / "first" / "lora-state"
    rest = train_toy(toy, images, tmp_path / "rest", **options, max_train_steps=3, resume=state, blocks_to_swap=2)
    assert equal_tensors(read_weights(rest), read_weights(whole))


@pytest.mark.full
@pytest.mark.parametrize("option", ["fp8_compute", "int8_compute"])
@every_family
def test_products_in_8_bits_train_alike(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, family: str, option: str
) -> None:
    """Losses of the first steps within a tenth of those in float32."""
    toy = toy_shelf.paths(family)
    runs = [train_toy(toy, images, tmp_path / name, **SHORT, **{name: True}) for name in ("sdpa", option)]
    plain, small = ([row["loss/current"] for row in read_metrics(run)] for run in runs)
    assert small != plain
    assert small == pytest.approx(plain, rel=0.1)


def test_a_gpu_without_float8_products_is_refused() -> None:
    check_float8_products((8, 9))
    check_float8_products((9, 0))
    with pytest.raises(UserError) as raised:
        check_float8_products((8, 6))
    assert raised.value.code == "float8-products-unsupported"


def test_a_number_that_float8_cannot_hold_is_refused(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    def make_large(weight: Tensor) -> Tensor:
        return weight.index_fill(0, torch.tensor([1]), -500)

    toy = toy_shelf.paths("flux")
    plan = plan_toy(toy, images, tmp_path / "out", fp8_base_unet=True)
    toy = write_meant(toy, plan, tmp_path / "large", make_large, text=False)
    for option, code in (("fp8_base_unet", "weights-overflow-float8"), ("fp8_scaled", "")):
        model = make_model(plan_toy(toy, images, tmp_path / "out", **{option: True}), torch.device("cpu"))
        if not code:
            model.parts["denoiser"].load()
            continue
        with pytest.raises(UserError) as raised:
            model.parts["denoiser"].load()
        assert raised.value.code == code
        assert ".weight has numbers up to 500" in raised.value.what


def round_q8_0(weight: Tensor) -> tuple[bytes, Tensor]:
    """Each 32 columns as ggml's Q8_0: the float16 nearest to the largest / 127, and 32 bytes; and what these mean."""
    blocks = weight.reshape(-1, 32)
    scales = (blocks.abs().amax(1, keepdim=True) / 127).half()
    numbers = (blocks / scales.float().clamp(min=1e-30)).round().clamp(-127, 127).to(torch.int8)
    content = torch.cat([scales.view(torch.uint8), numbers.view(torch.uint8)], 1)
    return content.numpy().tobytes(), (numbers.float() * scales.float()).reshape(weight.shape)


@pytest.mark.fast_for("flux")
@pytest.mark.parametrize("family", ["flux", "chroma", "lumina", "sd3"])
def test_a_gguf_file_trains_as_the_weights_that_it_means(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, family: str
) -> None:
    """Layers in the blocks stay as they are stored; the others, and what is stacked in another order, are decoded."""
    toy = toy_shelf.paths(family)
    folder = tmp_path / "toy"
    main = toy["pretrained_model_name_or_path"]
    shutil.copytree(main.parent, folder)
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in load_file(main).items():
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            content, meant[name] = round_q8_0(tensor)
            tensors[name] = ("Q8_0", tuple(tensor.shape), content)
        else:
            meant[name] = tensor
            tensors[name] = ("F32", tuple(tensor.shape), tensor.float().numpy().tobytes())
    small = {option: folder / path.name for option, path in toy.items()}
    save_file(meant, folder / main.name)
    whole = dict(small)
    small["pretrained_model_name_or_path"] = write_gguf(folder / f"{main.stem}.gguf", tensors)
    model = make_model(plan_toy(small, images, tmp_path / "out"), torch.device("cpu"))
    part = model.parts["denoiser"]
    part.load()
    kept = [name for name, each in part.module.named_parameters() if isinstance(each, QuantizedWeight)]
    assert kept == list(part.weight_formats)
    assert {own.label for own in part.weight_formats.values()} == {"GGUF's Q8_0"}
    runs = [train_toy(files, images, tmp_path / name, **SHORT) for name, files in (("a", small), ("b", whole))]
    losses = [[row["loss/current"] for row in read_metrics(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# llama.cpp's names of encoders' tensors, as its converter writes them: parts of names -> theirs.
T5_NAMES = [
    ("shared", "token_embd"), ("encoder.final_layer_norm", "enc.output_norm"), ("encoder.block.", "enc.blk."),
    ("layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"), ("layer.0.SelfAttention.", "attn_"),
    ("layer.0.layer_norm", "attn_norm"), ("layer.1.layer_norm", "ffn_norm"),
    ("layer.1.DenseReluDense.wi_0", "ffn_gate"), ("layer.1.DenseReluDense.wi_1", "ffn_up"),
    ("layer.1.DenseReluDense.wo", "ffn_down"),
]  # fmt: skip
GEMMA2_NAMES = [
    ("model.", ""), ("embed_tokens", "token_embd"), ("layers.", "blk."), ("self_attn.o_proj", "attn_output"),
    ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"), ("post_feedforward_layernorm", "post_ffw_norm"),
    ("self_attn.", "attn_"), ("mlp.", "ffn_"), ("_proj", ""),
]  # fmt: skip


def name_as_llama_cpp(name: str, pairs: list[tuple[str, str]]) -> str:
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    return "output_norm.weight" if name == "norm.weight" else name


@pytest.mark.parametrize(
    ("family", "part", "option", "names"),
    [("flux", "t5", "t5xxl", T5_NAMES), ("lumina", "gemma2", "gemma2", GEMMA2_NAMES)],
    ids=["t5", "gemma2"],
)
def test_a_gguf_file_of_an_encoder_encodes_as_the_weights_that_it_means(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, family: str, part: str, option: str, names: Any
) -> None:
    """llama.cpp's converter adds 1 to the norms of Gemma 2, which multiply by 1 more than their weights."""
    toy = toy_shelf.paths(family)
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in load_file(toy[option]).items():
        if name == "spiece_model":  # the tokenizer, which is in the file as texts
            continue
        is_layer = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        more = part == "gemma2" and name.endswith("norm.weight")
        plain = (tensor.float() + more).numpy().tobytes()
        content, meant[name] = round_q8_0(tensor) if is_layer else (plain, tensor)
        tensors[name_as_llama_cpp(name, names)] = ("Q8_0" if is_layer else "F32", tuple(tensor.shape), content)
    save_file(meant, tmp_path / "whole.safetensors")
    small = {**toy, option: write_gguf(tmp_path / "small.gguf", tensors, network=part)}
    whole = {**toy, option: tmp_path / "whole.safetensors"}
    hidden: list[Tensor] = []
    for paths in (small, whole):
        model = make_model(plan_toy(paths, images, tmp_path / "out"), torch.device("cpu"))
        encoder = model.parts[part]
        encoder.load()
        kept = [each for each in encoder.module.parameters() if isinstance(each, QuantizedWeight)]
        blocks = len(find_blocks(encoder.module, encoder.spec.blocks))
        assert len(kept) == (7 * blocks if paths is small else 0)
        (features,) = model.encode_text(part, ["a photo of a cat"])
        hidden.append(features["hidden"])
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-5, atol=1e-5)


@pytest.mark.full
@needs_rehearsal
@pytest.mark.parametrize("family", ["sd", "flux", "sd3", "lumina"])
def test_the_rehearsed_memory_falls(toy_shelf: ToyShelf, images: Path, tmp_path: Path, family: str) -> None:
    """By what the formats store; the bound from headers counts the same weights."""
    options = {"mixed_precision": "bf16", "cache_latents": True, "cache_text_encoder_outputs": True}
    options |= {"network_train_unet_only": True, "gradient_checkpointing": True}
    resident: dict[str, int] = {}
    for option in ("sdpa", "fp8_base", "nf4_base"):
        plan = plan_toy(toy_shelf.paths(family), images, tmp_path / "out", **options, **{option: True})
        step = next(stage for stage in rehearse_plan(plan, saves=False) if stage.name == STEP)
        part = make_model(plan, torch.device("meta")).parts["denoiser"]
        resident[option] = step.resident["denoiser"]
        assert 0 <= resident[option] - count_weight_bytes(part) < 0.1 * resident[option]  # buffers
        assert not step.waits
    assert resident["nf4_base"] < resident["fp8_base"] < resident["sdpa"]
