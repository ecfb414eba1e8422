"""`sfumato lora inspect --html`: numbers are those of whole matrices, texts are escaped, tags are closed."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.cli.main import main

ALONE = {"meta", "link", "br", "rect", "path", "polyline", "!doctype"}
LAYERS = [f"lora_unet_double_blocks_{i}_img_mlp_{n}" for i in (0, 1, 10) for n in (0, 2)]


class TagReader(HTMLParser):
    """Collects the texts of table rows, and faults of nesting."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ALONE:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        if tag not in ALONE:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1].append(data)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for name in LAYERS:
        rows, columns = (16, 4) if name.endswith("0") else (4, 16)
        state[f"{name}.lora_down.weight"] = torch.randn(3, columns, generator=generator)
        state[f"{name}.lora_up.weight"] = torch.randn(rows, 3, generator=generator)
        state[f"{name}.alpha"] = torch.tensor(1.5)
    state[f"{LAYERS[-1]}.lora_up.weight"].zero_()
    save_file(state, tmp_path / "a.safetensors", {"modelspec.title": "<script>x</script>", "long": "b" * 900})
    return tmp_path / "a.safetensors"


def test_the_page(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "a.html"
    assert main(["lora", "inspect", str(file), "--family", "flux", "--html", str(page)]) == 0
    assert f"{page}: page written" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    reader = TagReader()
    reader.feed(text)
    assert not reader.open
    assert "<script>x" not in text
    assert "b" * 401 not in text
    assert "1 of 6 changes are 0" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text), "it needs no other file"
    from safetensors.torch import load_file

    state = load_file(file)
    wanted: dict[str, Tensor] = {
        name: 0.5 * state[f"{name}.lora_up.weight"] @ state[f"{name}.lora_down.weight"] for name in LAYERS
    }
    rows = {row[0]: row for row in reader.rows if len(row) > 2}
    for i in (0, 1, 10):
        norm = sum(float(wanted[name].norm() ** 2) for name in LAYERS if f"_blocks_{i}_" in name) ** 0.5
        assert rows[f"denoiser.transformer_blocks.{i}"][1:5] == ["2", "3", "1.5", f"{norm:.4g}"]
    for name in LAYERS[:-1]:
        largest = float(torch.linalg.svdvals(wanted[name])[0])
        assert rows[name][-1] == f"{largest:.4g}"
    bars = re.findall(r'<rect class="bar c\d" [^>]*data-name="denoiser.transformer_blocks"', text)
    assert len(bars) == 2 * 3  # norm and effective rank


@pytest.mark.parametrize("name", ["a.safetensors", "a", "folder.html"])
def test_what_is_no_page_is_never_written(name: str, file: Path, tmp_path: Path, codes: list[str]) -> None:
    (tmp_path / "folder.html").mkdir()
    before = file.read_bytes()
    assert main(["lora", "inspect", str(file), "--family", "flux", "--html", str(tmp_path / name)]) == 2
    assert codes == ["page-path"]
    assert file.read_bytes() == before


def test_layers_that_lycoris_alone_adapts(tmp_path: Path, capsys: pytest.CaptureFixture[str], codes: list[str]) -> None:
    """The embedding of timesteps, and norms with their biases, of which no low rank is made."""
    embedding, norm = "lora_unet_time_embedding_linear_2", "lora_unet_down_blocks_0_attentions_0_norm"
    matrices = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2), "alpha": torch.tensor(1.0)}
    save_file({f"{embedding}.{end}": tensor for end, tensor in matrices.items()}, tmp_path / "a.safetensors")
    norms = {f"{norm}.w_norm": torch.tensor([3.0, 0.0]), f"{norm}.b_norm": torch.ones(2)}
    save_file(norms, tmp_path / "b.safetensors")
    for name in ("a", "b"):
        assert main(["lora", "inspect", str(tmp_path / f"{name}.safetensors"), "--family", "sd"]) == 0
        assert "no problems found" in capsys.readouterr().out
    command = ["lora", "merge", str(tmp_path / "b.safetensors"), "--new_rank", "1", "--family", "sd", "--save_to"]
    assert main([*command, str(tmp_path / "c.safetensors")]) == 2
    assert codes == ["adapter-change-of-norm"]
