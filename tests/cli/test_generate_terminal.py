"""Prompts that are typed on a terminal: a greeting, lines that can be edited, and its end."""

from __future__ import annotations

import io

import pytest

from sfumato.cli.generate_terminal import GREETING, Terminal


class FakeTerminal(io.StringIO):
    """Standard input that is no file."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_is_asked_until_its_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["a cat --d 3", "", "a --ss none", "a dog"])
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin", FakeTerminal())
    monkeypatch.setattr("builtins.input", answer)
    found = [prompt for (prompt,) in Terminal(carried=("seed",)).read()]
    assert [(prompt.prompt, prompt.seed) for prompt in found] == [("a cat", 3), ("a dog", 3)]
    assert asked == ["prompt: "] * 5
    said = capsys.readouterr().err
    assert said.startswith(GREETING)
    assert "unknown sampler 'none'" in said
    assert said.endswith("\n")
