"""Images and texts in columns."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sfumato.data.find.image_table import ImageRow, ImageTable, TextColumn

SIDES = st.integers(8, 10**6)


IMAGE_ROWS = st.lists(
    st.tuples(st.text(min_size=1), st.integers(0, 2**40), st.integers(0, 2**62), SIDES, SIDES, st.text()).map(
        lambda row: ImageRow(*row)
    )
)


@given(IMAGE_ROWS, st.data())
def test_a_table_holds_its_rows(rows, data):
    table = ImageTable.from_rows(rows)
    assert list(table) == rows
    assert table == ImageTable.from_rows(rows)
    wanted = data.draw(st.lists(st.sampled_from(range(len(rows))))) if rows else []
    assert list(table.take(np.array(wanted, np.int64))) == [rows[i] for i in wanted]
    sizes, size_index = table.sizes()
    assert [sizes[i] for i in size_index] == [(row.width, row.height) for row in rows]


@given(st.lists(st.text(st.characters(exclude_categories=[]))))
def test_texts_are_read_back(texts):
    """Lone surrogates, too, which undecodable file names have."""
    assert list(TextColumn.encode(texts)) == texts
    assert [TextColumn.encode(texts)[i] for i in range(len(texts))] == texts
