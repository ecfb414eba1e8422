"""Tags and their order, by worked examples: every option alone, and those that meet in one list in pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato.cli.dataset_tag import TagOptions, make_rules, make_writing
from sfumato.errors import UserError
from sfumato.tools.tag_choice import TagChooser, append_tags
from sfumato.tools.tag_table import parse_replacements, read_tag_table, write_tags

CSV = """tag_id,name,category,count
1,general,9,9
2,sensitive,9,9
10,1girl,0,9
11,long_hair,0,9
12,^_^,0,9
13,red_eyes,0,9
14,tail,0,9
20,nami_(one_piece),4,9
21,saber_(maid)_(fate),4,9
22,unknown,1,9
"""
#                general sensitive 1girl long_hair ^_^  red_eyes tail nami saber unknown
PROBABILITIES = (0.2, 0.7, 0.99, 0.5, 0.4, 0.36, 0.1, 0.9, 0.6, 1.0)
MAPPING = {
    "0": {"tag": "safe", "category": "Rating"},
    "1": {"tag": "explicit", "category": "Rating"},
    "2": {"tag": "best_quality", "category": "Quality"},
    "3": {"tag": "bad_quality", "category": "Quality"},
    "4": {"tag": "1girl", "category": "General"},
    "5": {"tag": "long_hair", "category": "General"},
    "6": {"tag": "nami_(one_piece)", "category": "Character"},
    "7": {"tag": "one_piece", "category": "Copyright"},
    "8": {"tag": "oda", "category": "Artist"},
    "9": {"tag": "highres", "category": "Meta"},
    "11": {"tag": "some_model", "category": "Model"},
}  # 10 has no tag
#                   safe exp  best bad  1girl hair nami piece oda highres -  model
MAPPING_NUMBERS = (0.9, 0.1, 0.8, 0.2, 0.7, 0.95, 0.6, 0.65, 0.5, 0.45, 1.0, 0.4)


def choose(tmp_path: Path, is_mapping: bool = False, **given: Any) -> str:
    path = tmp_path / ("tag_mapping.json" if is_mapping else "selected_tags.csv")
    path.write_text(json.dumps(MAPPING) if is_mapping else CSV)
    options = TagOptions.model_construct(**given)
    table = write_tags(read_tag_table(path), make_writing(options))
    chooser = TagChooser(table, make_rules(options, is_mapping=is_mapping))
    numbers = MAPPING_NUMBERS if is_mapping else PROBABILITIES
    return options.caption_separator.join(chooser.choose(np.array(numbers, np.float32)))


PLAIN = "1girl, long_hair, ^_^, red_eyes, nami_(one_piece), saber_(maid)_(fate)"
SPACED = "1girl, long hair, ^_^, red eyes, nami (one piece), saber (maid) (fate)"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, PLAIN),
        ({"thresh": 0.5}, "1girl, long_hair, nami_(one_piece), saber_(maid)_(fate)"),
        ({"general_threshold": 0.9}, "1girl, nami_(one_piece), saber_(maid)_(fate)"),
        ({"general_threshold": 2.0}, "nami_(one_piece), saber_(maid)_(fate)"),
        ({"character_threshold": 0.8}, "1girl, long_hair, ^_^, red_eyes, nami_(one_piece)"),
        ({"thresh": 0.05, "character_threshold": 1.1}, "1girl, long_hair, ^_^, red_eyes, tail"),
        ({"remove_underscore": True}, SPACED),
        ({"caption_separator": " "}, PLAIN.replace(", ", " ")),
        ({"undesired_tags": "1girl,red_eyes, saber_(maid)_(fate)"}, "long_hair, ^_^, nami_(one_piece)"),
        ({"undesired_tags": "long_hair", "remove_underscore": True}, SPACED),
        ({"undesired_tags": "long hair", "remove_underscore": True}, SPACED.replace("long hair, ", "")),
        ({"character_tag_expand": True},
         "1girl, long_hair, ^_^, red_eyes, nami, one_piece, saber_(maid), fate"),
        ({"character_tag_expand": True, "remove_underscore": True},
         "1girl, long hair, ^_^, red eyes, nami, one piece, saber (maid), fate"),
        ({"character_tags_first": True}, "saber_(maid)_(fate), nami_(one_piece), 1girl, long_hair, ^_^, red_eyes"),
        ({"character_tags_first": True, "use_rating_tags": True},
         "sensitive, saber_(maid)_(fate), nami_(one_piece), 1girl, long_hair, ^_^, red_eyes"),
        ({"use_rating_tags": True}, f"sensitive, {PLAIN}"),
        ({"use_rating_tags_as_last_tag": True}, f"{PLAIN}, sensitive"),
        ({"use_rating_tags": True, "use_rating_tags_as_last_tag": True}, f"sensitive, {PLAIN}"),
        ({"use_rating_tags": True, "undesired_tags": "sensitive"}, PLAIN),
        ({"use_quality_tags": True}, PLAIN),
        ({"tag_replacement": "1girl,solo girl;^_^,smile"}, PLAIN.replace("1girl", "solo girl").replace("^_^", "smile")),
        ({"tag_replacement": "long hair,hair", "remove_underscore": True}, SPACED.replace("long hair", "hair")),
        ({"tag_replacement": r"1girl,a\, b\;c"}, PLAIN.replace("1girl", "a, b;c")),
        ({"tag_replacement": r"nami\, one_piece,nami", "character_tag_expand": True},
         "1girl, long_hair, ^_^, red_eyes, nami, saber_(maid), fate"),
        ({"tag_replacement": "1girl,x", "undesired_tags": "x"}, PLAIN.replace("1girl, ", "")),
        ({"tag_replacement": "1girl,"}, PLAIN.replace("1girl, ", "")),
        ({"always_first_tags": "red_eyes,^_^,absent"},
         "^_^, red_eyes, 1girl, long_hair, nami_(one_piece), saber_(maid)_(fate)"),
        ({"always_first_tags": "1girl", "use_rating_tags": True}, f"1girl, sensitive, {PLAIN.removeprefix('1girl, ')}"),
        ({"always_first_tags": "1girl", "character_tags_first": True},
         "1girl, saber_(maid)_(fate), nami_(one_piece), long_hair, ^_^, red_eyes"),
    ],
)  # fmt: skip
def test_a_table_of_wd14(tmp_path: Path, given: dict[str, Any], expected: str) -> None:
    assert choose(tmp_path, **given) == expected


SORTED = "long_hair, 1girl, one_piece, nami_(one_piece), oda, highres, some_model"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, SORTED),
        ({"character_tags_first": True}, "nami_(one_piece), long_hair, 1girl, one_piece, oda, highres, some_model"),
        ({"copyright_threshold": 0.7, "artist_threshold": 2.0, "meta_threshold": 0.5, "model_threshold": 0.5},
         "long_hair, 1girl, nami_(one_piece)"),
        ({"use_quality_tags": True}, f"best_quality, {SORTED}"),
        ({"use_quality_tags_as_last_tag": True}, f"{SORTED}, best_quality"),
        ({"use_quality_tags": True, "use_rating_tags": True}, f"safe, best_quality, {SORTED}"),
        ({"use_quality_tags_as_last_tag": True, "use_rating_tags_as_last_tag": True}, f"{SORTED}, best_quality, safe"),
        ({"use_rating_tags": True, "use_rating_tags_as_last_tag": True}, f"{SORTED}, safe"),
        ({"character_tag_expand": True, "remove_underscore": True},
         "long hair, 1girl, one piece, nami, one piece, oda, highres, some model"),
        ({"tag_replacement": "nami_(one_piece),x_(y)", "character_tag_expand": True},
         "long_hair, 1girl, one_piece, x, y, oda, highres, some_model"),
    ],
)  # fmt: skip
def test_a_mapping(tmp_path: Path, given: dict[str, Any], expected: str) -> None:
    assert choose(tmp_path, is_mapping=True, **given) == expected


def test_what_is_there_stays_before_what_is_new() -> None:
    assert append_tags(["a", "b"], ["b", "c", "a", "d"]) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("text", ["a", "a,b,c", ",b", "a,b;c"])
def test_replacements_that_are_no_pairs(text: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_replacements(text)
    assert raised.value.code == "tag-replacement-invalid"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", ""),
        ("a.csv", "one,two\n1,2\n"),
        ("a.json", "{"),
        ("a.json", "[]"),
        ("a.json", '{"x": {"tag": "a"}}'),
        ("a.json", '{"99999999999999999999999999": {"tag": "a"}}'),
        ("a.json", '{"0": "a"}'),
    ],
)
def test_files_that_are_no_tables(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as raised:
        read_tag_table(tmp_path / name)
    assert raised.value.code == "tag-table-invalid"
