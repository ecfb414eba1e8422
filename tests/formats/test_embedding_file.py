"""Files of textual inversion as other programs write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sfumato.errors import UserError
from sfumato.formats.embedding_file import bundle_vectors, name_file, read_bundled_embeddings, read_embedding_file
from sfumato.formats.hashed_file import write_hashed_file

ROWS = torch.arange(8.0).reshape(2, 4)
WIDE = torch.ones(2, 6)


@pytest.mark.parametrize(("name", "content"), [
    ("webui.pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": ROWS}, "name": "cup", "step": 3}),
    ("sd_scripts.pt", {"emb_params": ROWS}),
    ("diffusers.bin", {"<cup>": ROWS}),
    ("one_vector.bin", {"<cup>": ROWS[0]}),
    ("sd_scripts.safetensors", {"emb_params": ROWS.half()}),
])  # fmt: skip
def test_one_encoder(name: str, content: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(content, path)  # type: ignore[arg-type]
    else:
        torch.save(content, path)
    found = read_embedding_file(path).select_vectors({"clip": "emb_params"}, {"clip": 4})
    assert torch.equal(found["clip"], ROWS[:1] if "one" in name else ROWS)


def test_several_encoders(tmp_path: Path) -> None:
    """As sd-scripts names them, and T5 as OneTrainer does."""
    save_file({"clip_l": ROWS, "t5": WIDE}, tmp_path / "a.safetensors")
    names = {"clip_l": "clip_l", "t5": "t5xxl"}
    file = read_embedding_file(tmp_path / "a.safetensors")
    found = file.select_vectors(names, {"clip_l": 4, "t5": 6})
    assert torch.equal(found["clip_l"], ROWS)
    assert torch.equal(found["t5"], WIDE)
    for widths in ({"clip_l": 4, "t5": 5}, {"clip_l": 6, "t5": 6}):
        with pytest.raises(UserError) as error:
            file.select_vectors(names, widths)
        assert error.value.code == "embedding-of-other-model"
    save_file({"clip_l": ROWS, "t5": WIDE[:1]}, tmp_path / "b.safetensors")
    with pytest.raises(UserError) as error:
        read_embedding_file(tmp_path / "b.safetensors").select_vectors(names, {"clip_l": 4, "t5": 6})
    assert error.value.code == "embedding-counts-differ"


@pytest.mark.parametrize(("tensor", "code"), [
    (torch.full((1, 4), torch.nan), "embedding-not-finite"),
    (torch.ones(1, 2, 3), "embedding-file-kind"),
    (torch.ones(1, 4, dtype=torch.int32), "embedding-file-kind"),
])  # fmt: skip
def test_what_is_none(tensor: torch.Tensor, code: str, tmp_path: Path) -> None:
    save_file({"emb_params": tensor}, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as error:
        read_embedding_file(tmp_path / "a.safetensors")
    assert error.value.code == code


def test_beside_adapters(tmp_path: Path) -> None:
    """Words with dots, and the names that web UIs know."""
    tensors = {**bundle_vectors("v1.cup", {"emb_params": ROWS}), **bundle_vectors("pan", {"emb_params": ROWS + 1})}
    assert set(tensors) == {"bundle_emb.v1.cup.string_to_param.*", "bundle_emb.pan.string_to_param.*"}
    save_file({**tensors, "lora_unet_a.alpha": torch.ones(())}, tmp_path / "a.safetensors")
    found = read_bundled_embeddings(tmp_path / "a.safetensors")
    assert {word: file.vectors.keys() for word, file in found.items()} == {
        "v1.cup": {"emb_params"}, "pan": {"emb_params"}
    }  # fmt: skip
    assert torch.equal(found["pan"].vectors["emb_params"], ROWS + 1)
    assert read_bundled_embeddings(tmp_path) == {}


def test_a_pickled_file_is_a_plain_dict(tmp_path: Path) -> None:
    write_hashed_file(tmp_path / "a.pt", {"emb_params": ROWS}, {"a": "b"}, torch.float16)
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert {name: tensor.dtype for name, tensor in state.items()} == {"emb_params": torch.float16}


@pytest.mark.parametrize(("words", "names"), [
    (["<cup>", "pan"], ["cup", "pan"]), (["<a>", "a"], ["a1", "a2"]), (["<>", "b"], ["1", "b"]),
])  # fmt: skip
def test_names_of_files(words: list[str], names: list[str]) -> None:
    assert [name_file(word, words) for word in words] == names
