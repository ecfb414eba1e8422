"""What tests of several families share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sentencepiece model made as Gemma's was: pairs merged by frequency, bytes for the rest."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    trainer: Any = sentencepiece.SentencePieceTrainer
    trainer.train(
        input=str(Path(__file__).parents[2] / "LICENSE"), model_prefix=str(folder / "tokenizer"), vocab_size=600,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", unk_piece="<unk>", minloglevel=2,
    )  # fmt: skip
    return folder
