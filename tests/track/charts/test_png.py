"""Text in images."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sfumato.track.charts.png import text_width, wrap_text


@given(st.text(st.characters(codec="latin-1", categories=("L", "Zs")), max_size=80), st.integers(40, 300))
def test_wrapped_lines_fit_and_lose_no_word(text: str, width: int) -> None:
    lines = wrap_text(text, 17, width)
    assert " ".join(lines).split() == text.split()
    assert all(text_width(line, 17) <= width or " " not in line for line in lines)
