"""What is particular to Lumina-Image 2.0: masks, the system prompt, files in several layouts, guidance that ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.toys import ToyShelf, in_pieces
from sfumato.compat.scripts import SCRIPTS
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.config.prompts import Prompt
from sfumato.data.batch import Extras, Sizes
from sfumato.demo import toy_lumina
from sfumato.diffusion.timesteps import make_density
from sfumato.errors import UserError
from sfumato.families import _vae, lumina, register_all
from sfumato.families._gemma2_tokenizer import from_folder
from sfumato.families.base import Family, find_family
from sfumato.families.encoding import encode_captions, live_text
from sfumato.families.saving import save_single_file
from sfumato.families.source import open_source
from sfumato.sample import conditioning, denoise, fill_in, generate, make_scheduler
from training import pictures, run, same, weights

CAPTIONS = ["a cat", "a red cup of coffee on a wooden table with a cat and a dog"]
SYSTEM = "you draw a (wide) picture"
CPU = torch.device("cpu")
Options = dict[str, str]


@pytest.fixture(scope="session")
def toy(toy_shelf: ToyShelf) -> Options:
    return {name: str(path) for name, path in toy_shelf.paths("lumina").items() if name != "tokenizer"}


@pytest.fixture(scope="session")
def tokenizer(toy_shelf: ToyShelf) -> tuple[str]:
    return (str(toy_shelf.paths("lumina")["tokenizer"]),)


def load(dtype: torch.dtype = torch.float32, noise: NoiseOptions | None = None, **options: Any) -> Family:
    register_all()
    model = ModelOptions(**options)
    source = open_source(model)
    family = find_family("lumina", source)
    loaded = family.load(family.read(source, model, noise or NoiseOptions()), model, dtype=dtype, device=CPU)
    loaded.freeze()
    return loaded


@torch.no_grad()
def prediction(model: Family, captions: list[str], *, spoil: float = 0.0, longer: int = 0) -> Tensor:
    """With `spoil` and `longer`, text beyond the mask is replaced by that value, and there is that much more of it."""
    features = live_text(model, "gemma2", captions)
    hidden = features["hidden"].masked_fill(~features["mask"][..., None], spoil)
    padded = {
        "hidden": torch.nn.functional.pad(hidden, (0, 0, 0, longer), value=spoil),
        "mask": torch.nn.functional.pad(features["mask"], (0, longer)),
    }
    given = model.condition({"gemma2": padded}, Sizes.plain(len(captions), 64, 64), None)
    x = torch.randn(len(captions), 16, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.predict(x, torch.full((len(captions),), 500.0), given)


def state(path: str) -> dict[str, Tensor]:
    return load_file(path)


# ---------------------------------------------------------------- text


def test_text_beyond_the_mask_changes_nothing(toy: Options) -> None:
    model = load(**toy)
    assert live_text(model, "gemma2", CAPTIONS)["mask"].sum(1).unique().numel() == 2
    clean = prediction(model, CAPTIONS)
    assert torch.equal(prediction(model, CAPTIONS, spoil=1000.0), clean)
    torch.testing.assert_close(prediction(model, CAPTIONS, spoil=9.0, longer=7), clean, rtol=0, atol=1e-5)
    torch.testing.assert_close(prediction(model, CAPTIONS[:1]), clean[:1], rtol=0, atol=1e-5)


def test_features_are_cut_to_the_captions_tokens_whatever_stands_beside(toy: Options) -> None:
    model = load(**toy)
    together = model.encode_text("gemma2", CAPTIONS)
    for caption, found in zip(CAPTIONS, together, strict=True):
        (alone,) = model.encode_text("gemma2", [caption])
        assert found["mask"].all()
        assert found["hidden"].shape == alone["hidden"].shape
        torch.testing.assert_close(found["hidden"], alone["hidden"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_features_equal_the_pipelines(toy: Options, toy_shelf: ToyShelf) -> None:
    """Which pads every caption to 256 tokens."""
    from diffusers import Lumina2Pipeline

    pipe = Lumina2Pipeline.from_pretrained(toy_shelf.paths("lumina", "diffusers")["pretrained_model_name_or_path"])
    hidden, mask = pipe._get_gemma_prompt_embeds(CAPTIONS)
    assert mask.shape == (2, 256)
    for found, theirs, real in zip(load(**toy).encode_text("gemma2", CAPTIONS), hidden, mask, strict=True):
        torch.testing.assert_close(found["hidden"], theirs[real.bool()], rtol=0, atol=1e-5)


def test_the_longest_caption(toy: Options) -> None:
    long = "cat " * 400
    assert len(load(**toy).encode_text("gemma2", [long])[0]["hidden"]) == 256
    assert len(load(**toy, gemma2_max_token_length=299).encode_text("gemma2", [long])[0]["hidden"]) == 299
    assert prediction(load(**toy, gemma2_max_token_length=299), [long]).isfinite().all()
    with pytest.raises(UserError, match="places for 299 tokens"):
        load(**toy, gemma2_max_token_length=300)


def test_a_system_prompt_stands_before_captions(toy: Options) -> None:
    """But not before a negative prompt, and not where there are no words. It is read as it is, brackets too."""
    plain, model = load(**toy), load(**toy, system_prompt=SYSTEM)

    def words(text: str, **how: bool) -> Tensor:
        return encode_captions(model, "gemma2", [text], **how)[0]["hidden"]

    def bare(text: str) -> Tensor:
        return encode_captions(plain, "gemma2", [text])[0]["hidden"]

    whole = f"{SYSTEM} <Prompt Start> a cat"
    assert torch.equal(words("a cat"), bare(whole))
    assert torch.equal(words("a cat", weighted=True), bare(whole))
    assert torch.equal(words("a cat", negative=True), bare("a cat"))
    assert torch.equal(words(""), bare(""))
    heavy, light = words("a (cat:2)", weighted=True), bare(whole)
    torch.testing.assert_close(heavy[-1], 2 * light[-1])
    assert torch.equal(heavy[:-1], light[:-1])
    assert model.text_fingerprint("gemma2") != plain.text_fingerprint("gemma2")


def test_training_with_a_system_prompt(toy: Options, tokenizer: tuple[str], tmp_path: Path) -> None:
    """Equals training on captions that begin with it; live, frozen and cached text agree."""
    images, longer = pictures(tmp_path / "images", 2), pictures(tmp_path / "longer", 2)
    for path in longer.glob("*/*.txt"):
        path.write_text("you draw <Prompt Start> " + path.read_text())
    options = {"max_train_steps": 2, "tokenizer": tokenizer[0], "network_train_unet_only": True}
    paths = {name: Path(path) for name, path in toy.items()}
    system = {"system_prompt": "you draw"}
    wanted = run(paths, longer, tmp_path / "wanted", **options)
    frozen = run(paths, images, tmp_path / "frozen", **options, **system)
    cache = {"cache_text_encoder_outputs_to_disk": True, "cache_dir": tmp_path / "cache"}
    cached = run(paths, images, tmp_path / "cached", **options, **system, **cache)
    without = run(paths, images, tmp_path / "without", **options, **cache)
    assert same(weights(wanted), weights(frozen))
    assert same(weights(wanted), weights(cached))
    assert not same(weights(wanted), weights(without))


# ---------------------------------------------------------------- files


def test_layouts_of_other_programs(toy: Options, tokenizer: tuple[str], tmp_path: Path) -> None:
    """A prefixed transformer with the norm that nothing uses; the text encoder without its level, and with its head."""
    expected = prediction(load(**toy), CAPTIONS)
    dit = {lumina.PREFIX + key: tensor for key, tensor in state(toy["pretrained_model_name_or_path"]).items()}
    dit[lumina.PREFIX + "norm_final.weight"] = torch.ones(96)
    save_file(dit, tmp_path / "dit.safetensors")
    gemma = {key.removeprefix("model."): tensor for key, tensor in state(toy["gemma2"]).items()}
    save_file(gemma | {"lm_head.weight": torch.ones(1)}, tmp_path / "gemma.safetensors")
    vae = {_vae.PREFIX + key: tensor for key, tensor in state(toy["ae"]).items()}
    save_file(vae, tmp_path / "vae.safetensors")
    other = load(
        pretrained_model_name_or_path=str(tmp_path / "dit.safetensors"), gemma2=str(tmp_path / "gemma.safetensors"),
        ae=str(tmp_path / "vae.safetensors"), tokenizer=tokenizer,
    )  # fmt: skip
    assert torch.equal(prediction(other, CAPTIONS), expected)
    assert same(other.vae.state_dict(), load(**toy).vae.state_dict())


def whole(toy: Options, path: Path) -> Path:
    """One file with everything, in the layout that other programs pass around."""
    tensors = {lumina.PREFIX + key: tensor for key, tensor in state(toy["pretrained_model_name_or_path"]).items()}
    tensors |= {lumina.TEXT_PREFIX + key: tensor for key, tensor in state(toy["gemma2"]).items()}
    tensors |= {lumina.VAE_PREFIX + key: tensor for key, tensor in state(toy["ae"]).items()}
    tensors["text_encoders.gemma2_2b.logit_scale"] = torch.ones(())
    save_file(tensors, path)
    return path


def test_a_file_that_holds_everything(toy: Options, tokenizer: tuple[str], tmp_path: Path) -> None:
    path = whole(toy, tmp_path / "whole.safetensors")
    model = load(pretrained_model_name_or_path=str(path), tokenizer=tokenizer)
    assert torch.equal(prediction(model, CAPTIONS), prediction(load(**toy), CAPTIONS))
    every = {name: part.module.state_dict().keys() for name, part in model.parts.items()}
    save_single_file(model, tmp_path / "again.safetensors", {}, changed=every)
    assert same(load_file(tmp_path / "again.safetensors"), load_file(path))
    parts = load(**toy | {"gemma2": str(path), "ae": str(path)})  # the options may name it, too
    assert torch.equal(prediction(parts, CAPTIONS), prediction(model, CAPTIONS))


def test_files_in_several_parts(toy: Options, toy_shelf: ToyShelf, tokenizer: tuple[str], tmp_path: Path) -> None:
    """The transformer by its index; the text encoder as a folder, without and with its configuration."""
    expected = prediction(load(**toy), CAPTIONS)
    dit = in_pieces(load_file(toy["pretrained_model_name_or_path"]), tmp_path / "dit", "model")
    gemma = in_pieces(load_file(toy["gemma2"]), tmp_path / "gemma", "model")
    options = toy | {"pretrained_model_name_or_path": str(dit), "gemma2": str(gemma.parent)}
    assert torch.equal(prediction(load(**options, tokenizer=tokenizer), CAPTIONS), expected)
    published = toy_shelf.paths("lumina", "diffusers")["pretrained_model_name_or_path"]
    shutil.copy(published / "text_encoder" / "config.json", gemma.parent)
    assert torch.equal(prediction(load(**options, tokenizer=tokenizer), CAPTIONS), expected)


def test_a_diffusers_folder_in_several_parts(toy_shelf: ToyShelf, toy: Options, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_shelf.paths("lumina", "diffusers")["pretrained_model_name_or_path"], tmp_path / "all")
    for network, name in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        index = in_pieces(load_file(folder / network / f"{name}.safetensors"), tmp_path / network, name)
        (folder / network / f"{name}.safetensors").unlink()
        for path in index.parent.iterdir():
            shutil.move(path, folder / network / path.name)
    model = load(pretrained_model_name_or_path=str(folder))
    torch.testing.assert_close(prediction(model, CAPTIONS), prediction(load(**toy), CAPTIONS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_stored_in_less(toy: Options, tokenizer: tuple[str], tmp_path: Path, kind: torch.dtype) -> None:
    """Equal to the model of the rounded weights in float32."""
    low, rounded = dict(toy), dict(toy)
    for name in ("pretrained_model_name_or_path", "gemma2"):
        tensors = {key: tensor.to(kind) for key, tensor in state(toy[name]).items()}
        low[name], rounded[name] = (str(tmp_path / f"{which}_{name}.safetensors") for which in ("low", "rounded"))
        save_file(tensors, low[name])
        save_file({key: tensor.float() for key, tensor in tensors.items()}, rounded[name])
    expected = prediction(load(**rounded, tokenizer=tokenizer), CAPTIONS)
    assert torch.equal(prediction(load(**low, tokenizer=tokenizer), CAPTIONS), expected)
    assert not torch.equal(prediction(load(**toy), CAPTIONS), expected)


@pytest.mark.parametrize("missing", ["gemma2", "ae"])
def test_missing_components_are_named(toy: Options, missing: str) -> None:
    with pytest.raises(UserError, match=f"--{missing} is missing"):
        load(**{name: path for name, path in toy.items() if name != missing})


def test_another_text_encoder_is_refused(toy: Options, toy_shelf: ToyShelf) -> None:
    with pytest.raises(UserError, match="no Gemma 2 text encoder"):
        load(**toy | {"gemma2": str(toy_shelf.paths("flux")["t5xxl"])})


def test_other_models_are_not_taken_for_it(toy: Options, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    register_all()
    for family in ("sd", "sdxl", "flux"):
        assert not lumina.Lumina.detect(open_source(toy_shelf.options(family)))
        assert not lumina.Lumina.detect(open_source(toy_shelf.options(family, "diffusers")))
    relative = {  # of the same line, with other modulation
        key.replace("adaLN_modulation.1", "adaLN_modulation.0"): tensor
        for key, tensor in state(toy["pretrained_model_name_or_path"]).items()
    }
    save_file(relative, tmp_path / "relative.safetensors")
    assert not lumina.Lumina.detect(
        open_source(ModelOptions(pretrained_model_name_or_path=str(tmp_path / "relative.safetensors")))
    )


# ---------------------------------------------------------------- tokenizers


def alone(toy: Options, folder: Path) -> Options:
    """The toy's files without the tokenizer beside them."""
    folder.mkdir(exist_ok=True)
    return {name: str(shutil.copy(path, folder)) for name, path in toy.items()}


def test_a_missing_tokenizer_says_what_to_put_where(
    toy: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="no Gemma tokenizer") as caught:
        load(**alone(toy, tmp_path))
    assert "--tokenizer" in caught.value.fix


def test_a_tokenizer_in_the_hub_cache(
    toy: Options, tokenizer: tuple[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--Alpha-VLLM--Lumina-Image-2.0"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(tokenizer[0], repository / "snapshots" / "abc" / "tokenizer")
    model = load(**alone(toy, tmp_path / "alone"))
    assert torch.equal(prediction(model, CAPTIONS), prediction(load(**toy), CAPTIONS))


def test_a_tokenizer_beside_the_text_encoder(toy: Options, tokenizer: tuple[str], tmp_path: Path) -> None:
    """As the published folder of Gemma 2 has it."""
    options = alone(toy, tmp_path)
    folder = in_pieces(load_file(toy["gemma2"]), tmp_path / "gemma", "model").parent
    shutil.copy(Path(tokenizer[0]) / "tokenizer.json", folder)
    model = load(**options | {"gemma2": str(folder)})
    assert torch.equal(prediction(model, CAPTIONS), prediction(load(**toy), CAPTIONS))


@pytest.mark.parametrize("everything", [False, True])
def test_a_tokenizer_inside_the_weights(toy: Options, pieces: Path, tmp_path: Path, everything: bool) -> None:
    """Published files of the text encoder, and of the whole model, carry theirs along."""
    networks = toy_lumina.make_networks(600, seed=1)
    files = toy_lumina.single_files(networks)
    carried = torch.frombuffer(bytearray((pieces / "tokenizer.model").read_bytes()), dtype=torch.uint8)
    options = alone(toy, tmp_path)
    save_file(files["gemma2"] | {"spiece_model": carried}, options["gemma2"])
    if everything:
        path = whole(options, tmp_path / "whole.safetensors")
        tensors = load_file(path)
        del tensors[lumina.TEXT_PREFIX + "spiece_model"]
        save_file(tensors | {"text_encoders.spiece_model": carried}, path)
        options = {"pretrained_model_name_or_path": str(path)}
    model: Any = load(**options)
    text = "the Licensor grants You"
    assert model.tokenizer.ids(text, 99) == from_folder(pieces).ids(text, 99)
    assert len(model.encode_text("gemma2", [text])[0]["hidden"]) == len(from_folder(pieces).ids(text, 99))


def test_a_tokenizer_of_another_model_is_refused(toy: Options, pieces: Path) -> None:
    with pytest.raises(UserError, match="the tokenizer knows 600 tokens"):
        load(**toy, tokenizer=(str(pieces),))


# ---------------------------------------------------------------- timesteps and previews


def test_without_options_timesteps_are_as_the_script_draws_them(toy: Options) -> None:
    """`sfumato train` knows the family's density and shift, which the field's script sets as its defaults."""
    preset = SCRIPTS["lumina_train_network"].presets
    names = ("timestep_sampling", "discrete_flow_shift", "model_prediction_type")
    told = NoiseOptions(**{name: preset[name] for name in names})
    for noise in (NoiseOptions(), told):
        model = load(noise=noise, **toy)
        density, other = (make_density(each, model.objective) for each in (noise, told))
        u = torch.arange(20, dtype=torch.float64) / 20
        assert torch.equal(*(each(u, (16, 64, 64), model.latents) for each in (density, other)))
        assert model.blueprint.metadata["ss_timestep_sampling"] == "shift"
        assert model.blueprint.metadata["ss_discrete_flow_shift"] == 6.0
        assert model.blueprint.metadata["ss_model_prediction_type"] == "raw"


@pytest.mark.parametrize("shift", [None, 3.0])
def test_the_time_grid_of_previews(toy: Options, shift: float | None) -> None:
    """That of diffusers' scheduler with the published shift, or with --discrete_flow_shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    model = load(noise=NoiseOptions(discrete_flow_shift=shift), **toy)
    ours = make_scheduler("ddim", model.objective)
    model.objective.set_timesteps(ours, 7, model.latents, (1, 16, 8, 8))
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift or 6.0)
    theirs.set_timesteps(sigmas=[1 - i / 7 for i in range(7)])
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)


class Counting:
    """The model as it is, with a note of each call: t, and how many tokens its text has."""

    live_text: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.asked: list[tuple[float, int]] = []

    def caption(self, text: str) -> str:
        return text

    def begin(self, model: Family, extras: Extras) -> None: ...

    def predict(self, model: Family, noisy: Tensor, t: Tensor, text: Any, extras: Extras) -> Tensor:
        self.asked.append((float(t[0]), text["encoder_attention_mask"].shape[1]))
        return model.predict(noisy, t, text)


def test_guidance_ends_as_the_prompt_says(toy: Options) -> None:
    """By default while the model's time, 1 - sigma, is below 0.25: sigma above 0.75."""
    model, steps, shift = load(**toy), 8, 6.0
    even = [1 - i / steps for i in range(steps)]
    sigmas = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]
    for ratio, limit in ((None, 0.75), (0.6, 0.4), (1.0, -1.0)):
        method: Any = Counting()
        prompt = Prompt(
            prompt="a cat", negative_prompt="a red dog", width=64, height=64, sample_steps=steps, cfg_trunc_ratio=ratio
        )
        generate(model, method, fill_in(prompt, model, sampler="ddim", seed=1))
        words = [len(encode_captions(model, "gemma2", [text])[0]["hidden"]) for text in ("a cat", "a red dog")]
        assert words[0] != words[1]
        asked = [t / 1000 for t, length in method.asked if length == words[1]]
        assert asked == pytest.approx([sigma for sigma in sigmas if sigma > limit])
        assert len(method.asked) == steps + len(asked)


@pytest.mark.parametrize("system", ["", SYSTEM])
def test_a_prompt_equals_the_pipelines(toy: Options, toy_shelf: ToyShelf, system: str) -> None:
    """Both texts from words on: the system prompt before the one, nothing before the other."""
    from diffusers import Lumina2Pipeline

    model, method = load(**toy, system_prompt=system), Counting()
    pipe = Lumina2Pipeline.from_pretrained(toy_shelf.paths("lumina", "diffusers")["pretrained_model_name_or_path"])
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(3))
    given: dict[str, Any] = {"prompt": "a cat", "system_prompt": system}
    if not system:  # the pipeline joins an empty one, too; nothing is joined here
        hidden, mask = pipe._get_gemma_prompt_embeds("a cat")
        empty, nothing = pipe._get_gemma_prompt_embeds("")
        given = {
            "prompt_embeds": hidden, "prompt_attention_mask": mask, "negative_prompt_embeds": empty,
            "negative_prompt_attention_mask": nothing,
        }  # fmt: skip
    theirs = pipe(
        **given, width=96, height=64, num_inference_steps=3, guidance_scale=4.0, cfg_normalization=False, latents=x,
        output_type="latent",
    ).images  # fmt: skip
    sizes, plain = Sizes.plain(1, 64, 96), {"steps": 3, "scale": 4.0}
    anything: Any = method
    ours = denoise(
        model, anything, make_scheduler("ddim", model.objective), x, conditioning(model, ["a cat"], sizes, None),
        conditioning(model, [""], sizes, None, negative=True), extras=Extras(), generator=torch.Generator(), **plain,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_previews_know_the_system_prompt(toy: Options, tokenizer: tuple[str], tmp_path: Path) -> None:
    """The same picture as of a prompt that begins with it, whether text is cached or not."""
    paths = {name: Path(path) for name, path in toy.items()}
    images, options = pictures(tmp_path / "images", 2), {"max_train_steps": 1, "sample_at_first": True}
    options |= {"tokenizer": tokenizer[0], "network_train_unet_only": True}

    def preview(name: str, prompt: str, **more: Any) -> bytes:
        file = tmp_path / f"{name}.txt"
        file.write_text(f"{prompt} --n a dog --w 64 --h 64 --s 2 --d 5 --l 3")
        out = run(paths, images, tmp_path / name, sample_prompts=file, **options, **more)
        (path,) = (out / "sample").iterdir()
        return Image.open(path).tobytes()

    system = {"system_prompt": "you draw"}
    wanted = preview("wanted", "you draw <Prompt Start> a cat")
    assert preview("system", "a cat", **system) == wanted
    assert preview("cached", "a cat", **system, cache_text_encoder_outputs=True) == wanted
    assert preview("without", "a cat") != wanted


def metadata(path: Path) -> Mapping[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_metadata_is_that_of_the_field(toy: Options, tokenizer: tuple[str], tmp_path: Path) -> None:
    golden = json.loads((Path(__file__).parents[1] / "goldens" / "metadata_keys.json").read_text())
    case = next(each for each in find(golden, lambda each: each.get("case") == "lumina2 lora"))
    paths = {name: Path(path) for name, path in toy.items()}
    options = {"max_train_steps": 1, "tokenizer": tokenizer[0], "network_module": "networks.lora_lumina"}
    found = metadata(run(paths, pictures(tmp_path / "images", 2), tmp_path / "out", **options) / "lora.safetensors")
    for name in ("architecture", "implementation"):
        assert found[f"modelspec.{name}"] == case["metadata"][f"modelspec.{name}"]
    assert found["ss_base_model_version"] == "lumina2"
    assert found["ss_network_module"] == "networks.lora_lumina"
    (only,) = (each["lumina"] for each in find(golden, lambda each: isinstance(each.get("lumina"), list)))
    assert set(only) <= set(found)


def find(content: Any, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Every table inside nested JSON that is as wanted."""
    if isinstance(content, list):
        return [each for part in content for each in find(part, wanted)]
    if not isinstance(content, dict):
        return []
    inner = [each for part in content.values() for each in find(part, wanted)]
    return [*([content] if wanted(content) else []), *inner]
