"""Text in images."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sfumato.track.charts.png import text_width, wrap_text


@given(st.text(st.characters(codec="latin-1", categories=("L", "Zs")), max_size=80), st.integers(40, 300))
def test_wrapped_lines_fit_and_lose_no_word(text: str, width: int) -> None:
    lines = wrap_text(text, 17, width)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert all(text_width(line, 17) <= width or len(line) == 1 for line in lines)
    if all(text_width(word, 17) <= width for word in text.split()):
        assert " ".join(lines).split() == text.split()


def test_names_of_files_are_broken_behind_marks() -> None:
    lines = wrap_text("network_weights robot-step00000020.safetensors", 18, 128)
    assert lines == ["network_", "weights robot-", "step00000020.", "safetensors"]
