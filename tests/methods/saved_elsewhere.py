"""What other programs make of the files that methods save: diffusers, PEFT, transformers, or a structure written out.

Each reader has their code put a file's content into a model, or encode text with it, and gives what comes out.
"""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AddedToken

from methods.lllite_written_out import TRUNK, changed_inputs, find_change
from methods.method_cells import WORD
from others.models import CPU, attached_by_diffusers
from sfumato.data.batch import ImageInput
from sfumato.families.base import Family
from sfumato.families.control_net import CONTROL_NET

Outputs = dict[str, Tensor]
CAPTION = f"a photo of {WORD}, sitting"
PUBLISHED_WIDTHS = {  # that diffusers' converters know: class -> of the published model, what they are of another
    "FluxTransformer2DModel": ((3072, lambda config: config["num_attention_heads"] * config["attention_head_dim"]),),
    "ChromaTransformer2DModel": ((3072, lambda config: config["num_attention_heads"] * config["attention_head_dim"]),),
    "Lumina2Transformer2DModel": (
        (2304, lambda config: config["hidden_size"]),
        (768, lambda config: config["hidden_size"] // config["num_attention_heads"] * config["num_kv_heads"]),
    ),
}


@dataclass(frozen=True)
class Saved:
    """A file, the plain model that it belongs to, and the same model as a folder of diffusers."""

    file: Path
    model: Family
    folder: Path
    compute: Callable[[], Outputs]  # what is compared
    control: ImageInput  # the control image as pixels and as latents

    @property
    def scratch(self) -> Path:
        return self.file.parent


def read_adapter(saved: Saved) -> Outputs:
    """PEFT's layers in the denoiser, from an export; the text encoders have ours."""
    with attached_by_diffusers(saved.model, saved.file, saved.scratch / "exported.safetensors"):
        return saved.compute()


def read_whole_model(saved: Saved) -> Outputs:
    """diffusers' own conversion of the single file, in the denoiser's place."""
    part = saved.model.parts["denoiser"]
    source = saved.folder / saved.model.components["denoiser"].folder / "config.json"
    config = json.loads(source.read_text()) | {
        name: part.network.config[name] for name in ("in_channels", "out_channels") if name in part.network.config
    }  # which are others where a model sees a mask
    folder = saved.scratch / "denoiser"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    name = config["_class_name"]
    library: Any = diffusers
    with toy_widths(name, config):
        theirs = getattr(library, name).from_single_file(str(saved.file), config=str(folder))
    part.module.load_state_dict(theirs.state_dict())
    return saved.compute()


def read_every_network(saved: Saved) -> Outputs:
    """The same, and the text encoders: of a U-Net as diffusers' pipeline reads them, else transformers, since that
    pipeline puts an identity in the place of CLIP-L's projection.
    """
    library: Any = diffusers
    model, blueprint = saved.model, saved.model.blueprint
    kind = getattr(library, json.loads((saved.folder / "model_index.json").read_text())["_class_name"])
    pipe = (
        kind.from_single_file(str(saved.file), config=str(saved.folder))
        if model.components["denoiser"].folder == "unet"
        else None
    )
    for part in model.text_parts:
        folder, weights = model.components[part].folder, blueprint.networks[part].weights
        if pipe is not None:
            theirs = getattr(pipe, folder)
        else:
            beside = f"lora_{blueprint.networks[part].option}.safetensors"
            file = saved.file if blueprint.in_file(part) else saved.file.with_name(beside)
            theirs = read_with_transformers(file, weights.prefix, saved.folder / folder, saved.scratch / folder)
        model.parts[part].module.load_state_dict(theirs.state_dict())
    return read_whole_model(saved)


def read_with_transformers(file: Path, prefix: str, config: Path, folder: Path) -> Any:
    """A text encoder whose tensors have transformers' names after a prefix."""
    shutil.copytree(config, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    own = {name.removeprefix(prefix): tensor for name, tensor in load_file(file).items() if name.startswith(prefix)}
    save_file(own, folder / "model.safetensors", {"format": "pt"})
    (name,) = json.loads((config / "config.json").read_text())["architectures"]
    encoder, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return encoder


@contextmanager
def toy_widths(name: str, config: Mapping[str, Any]) -> Iterator[None]:
    """A context in which diffusers' converter splits layers at a toy's widths instead of the published model's."""
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name]
    convert = entry["checkpoint_mapping_fn"]
    widths = {published: find(config) for published, find in PUBLISHED_WIDTHS.get(name, ())}

    def replaced(code: types.CodeType) -> types.CodeType:
        constants: list[Any] = []
        for value in code.co_consts:
            is_inner = isinstance(value, types.CodeType)
            constants.append(replaced(value) if is_inner else widths.get(value, value) if type(value) is int else value)
        return code.replace(co_consts=tuple(constants))

    own = types.FunctionType(replaced(convert.__code__), convert.__globals__, name, convert.__defaults__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(entry, "checkpoint_mapping_fn", own)
        yield


def read_control_net(saved: Saved) -> Outputs:
    """diffusers' class, of a folder with the file and the configuration that it carries, in our ControlNet's place."""
    ours, folder, library = saved.model.parts[CONTROL_NET], saved.scratch / "control_net", diffusers
    folder.mkdir()
    with safe_open(saved.file, "pt") as opened:
        config = json.loads(opened.metadata()["sfumato.config"])[CONTROL_NET]
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(saved.file, folder / "diffusion_pytorch_model.safetensors")
    theirs = getattr(library, type(ours.module).__name__).from_pretrained(folder)
    assert type(theirs).__module__.startswith("diffusers.")
    ours.module.load_state_dict(theirs.state_dict())
    return saved.compute()


def read_lllite(saved: Saved) -> Outputs:
    """The file's layers as they are written out in functions of torch."""
    list_layers = type(saved.model).list_controlled_layers
    assert list_layers is not None
    tensors, text = load_file(saved.file), saved.compute()["encoder_hidden_states"].shape[1]
    names = {name.partition(".")[0] for name in tensors}
    layers = {name: layer for name, layer in list_layers(saved.model.blueprint).items() if name in names}
    assert len(layers) >= len(names) - 1  # all but the trunk
    pixels, latents = saved.control.pixels, saved.control.latents
    assert pixels is not None
    assert latents is not None
    size = (pixels.shape[-2], pixels.shape[-1])
    change = find_change(tensors, latents if f"{TRUNK}.lat_conv1.weight" in tensors else pixels, size)
    with changed_inputs(saved.model.denoiser, layers, change, size, text):
        return saved.compute()


def read_words(saved: Saved) -> Outputs:
    """Text with the word as the pipeline encodes it, once its tokenizers and text encoders have the file's vectors."""
    library: Any = diffusers
    more = {"safety_checker": None} if (saved.folder / "safety_checker").exists() else {}
    pipe = library.DiffusionPipeline.from_pretrained(saved.folder, **more)
    vectors = load_file(saved.file)
    for number, part in enumerate(saved.model.text_parts):
        ending = f"_{number + 1}" if number else ""
        tokenizer, encoder = (getattr(pipe, f"{name}{ending}") for name in ("tokenizer", "text_encoder"))
        rows = vectors[saved.model.parts[part].spec.embedding_name]
        if hasattr(pipe, "load_textual_inversion"):
            whole = str(saved.file) if len(vectors) == 1 else {WORD: rows}
            pipe.load_textual_inversion(whole, WORD, text_encoder=encoder, tokenizer=tokenizer)
        else:
            add_rows(tokenizer, encoder, rows)
    replaces_words = hasattr(pipe, "maybe_convert_prompt")
    prompt = CAPTION if replaces_words else CAPTION.replace(WORD, " ".join(list_words(len(rows))))
    return ENCODE[saved.model.name](pipe, prompt)


def list_words(count: int) -> list[str]:
    """One for each vector, as diffusers calls them."""
    return [WORD, *(f"{WORD}_{i}" for i in range(1, count))]


def add_rows(tokenizer: Any, encoder: Any, rows: Tensor) -> None:
    """New rows of transformers' table, with a word for each."""
    words = list_words(len(rows))
    tokenizer.add_tokens([AddedToken(word, lstrip=True, normalized=False) for word in words])
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(words)] = rows


def encode_sd(pipe: Any, prompt: str) -> Outputs:
    return {"encoder_hidden_states": pipe.encode_prompt(prompt, CPU, 1, False)[0]}


def encode_sdxl(pipe: Any, prompt: str) -> Outputs:
    hidden, _, pooled, _ = pipe.encode_prompt(prompt, device=CPU, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": hidden, "text_embeds": pooled}


def encode_sd3(pipe: Any, prompt: str) -> Outputs:
    hidden, _, pooled, _ = pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


def encode_flux(pipe: Any, prompt: str) -> Outputs:
    hidden, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=512)
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


def encode_chroma(pipe: Any, prompt: str) -> Outputs:
    hidden, _, mask, *_ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
    return {"encoder_hidden_states": hidden[:, : int(mask.sum())]}


def encode_lumina(pipe: Any, prompt: str) -> Outputs:
    hidden, mask = pipe._get_gemma_prompt_embeds(prompt)  # encode_prompt always adds a system prompt
    return {"encoder_hidden_states": hidden[:, : int(mask.sum())]}


ENCODE: Mapping[str, Callable[[Any, str], Outputs]] = {
    "sd": encode_sd, "sdxl": encode_sdxl, "sd3": encode_sd3, "flux": encode_flux, "flux_kontext": encode_flux,
    "chroma": encode_chroma, "lumina": encode_lumina,
}  # fmt: skip
READERS: Mapping[str, Callable[[Saved], Outputs]] = {  # method -> who reads its files
    "adapter": read_adapter,
    "full": read_whole_model,
    "full_text": read_every_network,
    "textual_inversion": read_words,
    "control_net": read_control_net,
    "lllite": read_lllite,
    "lllite_version_2": read_lllite,
    "lllite_latents": read_lllite,
    "leco": read_adapter,
    "inpainting": read_adapter,
    "inpainting_full": read_whole_model,
    "inpainting_words": read_words,
}
