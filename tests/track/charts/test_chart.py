"""Tick marks and thinned curves."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sfumato.track.charts.chart import choose_ticks, thin_curve


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=3000), st.integers(10, 400))
def test_thinning_keeps_the_extremes(values, most):
    y = np.array(values)
    x, thin = thin_curve(np.arange(len(y), dtype=float), y, most)
    assert len(thin) <= most or len(y) <= most
    assert (thin.min(), thin.max()) == (y.min(), y.max())
    assert (np.diff(x) > 0).all()
    assert (y[x.astype(int)] == thin).all()


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_within(low, width):
    ticks = choose_ticks(low, low + width, most=6)
    assert 1 <= len(ticks) <= 6
    assert all(low - 1e-6 * abs(low) - 1e-9 * width <= tick <= low + width + 1e-6 * abs(low) + width for tick in ticks)


@given(st.floats(1e-6, 1e6), st.integers(4, 12))
def test_ticks_from_zero_are_round(high: float, most: int) -> None:
    ticks = choose_ticks(0.0, high, most=most)
    assert 2 <= len(ticks) <= most
    assert ticks[0] == 0
    assert ticks[-1] + ticks[1] > high
    digits = f"{ticks[1]:.6e}"
    assert digits[0] in "125"
    assert digits[1:8] == ".000000"
