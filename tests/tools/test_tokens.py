"""`sfumato lora tokens` and networks/lora_interrogator.py: the order is that of transformers' own outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from families.toys import ToyShelf
from others.models import load_toy
from sfumato.cli.main import main
from sfumato.compat.launch import main as run_script
from tools.adapter_cases import MODEL, draw_adapter, load_files, make_merge_command

ROW = re.compile(r" +(\d+) +([\d.e+-]+) +(\d+)  (\S+)")


def read_rows(text: str) -> list[tuple[int, float, str]]:
    """Id, change and text of each line."""
    found = [match for line in text.splitlines() if (match := ROW.fullmatch(line))]
    assert [int(match[1]) for match in found] == list(range(1, len(found) + 1))
    return [(int(match[3]), float(match[2]), match[4]) for match in found]


@pytest.mark.full
@pytest.mark.parametrize("clip_skip", [None, 2])
def test_the_most_changed(
    clip_skip: int | None, toy_shelf: ToyShelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the outputs of the model before and after a merge of the same file."""
    model = load_toy(toy_shelf, "sd")
    file = draw_adapter(model, tmp_path / "a.safetensors", network_train_text_encoder_only=True)
    assert main(make_merge_command(toy_shelf, "sd", [file], tmp_path / "out")) == 0
    merged = load_files(toy_shelf, "sd", files={MODEL: tmp_path / "out" / toy_shelf.paths("sd")[MODEL].name})
    tokenizer: Any = model.tokenizers["clip"]
    count = len(tokenizer)
    rows = torch.tensor([[tokenizer.bos_token_id, i, tokenizer.eos_token_id] for i in range(count)])
    outputs: list[torch.Tensor] = []
    for each in (model, merged):
        with torch.no_grad():
            states = each.parts["clip"].module(input_ids=rows, output_hidden_states=True)
        chosen = states.last_hidden_state if clip_skip is None else states.hidden_states[-clip_skip]
        outputs.append(chosen[:, 1])
    changes = (outputs[1] - outputs[0]).abs().mean(1)
    capsys.readouterr()
    source = str(toy_shelf.paths("sd")[MODEL])
    skip = ["--clip_skip", str(clip_skip)] if clip_skip else []
    tokenizers = ["--tokenizer", str(toy_shelf.paths("sd")["tokenizer"])]
    command = ["lora", "tokens", str(file), "--model", source, *skip, *tokenizers, "--top", "20"]
    assert main(command) == 0
    found = read_rows(capsys.readouterr().out)
    expected = changes.sort(descending=True)
    assert len(found) == 20
    for i, (number, change, text) in enumerate(found):
        assert change == pytest.approx(float(expected.values[i]), rel=1e-3)
        assert changes[number] == pytest.approx(change, rel=1e-3)
        assert tokenizer.convert_tokens_to_ids(text) == number


def test_an_adapter_of_the_denoiser_alone(toy_shelf: ToyShelf, tmp_path: Path, codes: list[str]) -> None:
    model = load_toy(toy_shelf, "sd")
    file = draw_adapter(model, tmp_path / "a.safetensors", network_train_unet_only=True)
    paths = toy_shelf.paths("sd")
    words = ["lora", "tokens", str(file), "--model", str(paths[MODEL]), "--tokenizer", str(paths["tokenizer"])]
    assert main(words) == 2
    assert codes == ["tokens-without-text-encoder"]
    assert run_script(["networks/lora_interrogator.py", "--model", str(file)]) == 2
