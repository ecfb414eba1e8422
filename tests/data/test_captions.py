"""Caption processing against recorded results of sd-scripts, and its properties."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.data.captions import CaptionRules, parse_caption_file, process_caption

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "captions.json").read_text(encoding="utf-8"))
SEPARATOR = "|||"
LATE = {"epoch": 1, "step": 100, "max_train_steps": 100}


def make_rules(row) -> CaptionRules:
    return CaptionRules(**GOLDENS["option_sets"][row["options"]])


def without_separator(text: str) -> str:
    """The documented difference: a keep_tokens_separator never reaches the encoder; it separates tags like a comma."""
    tags = []
    for part in text.split(SEPARATOR):
        if part.strip(", "):
            tags += [tag.strip() for tag in part.strip(", ").split(",")]
    return ", ".join(tags)


def expected(row, text: str) -> str:
    given_separator = GOLDENS["option_sets"][row["options"]].get("keep_tokens_separator")
    return without_separator(text) if given_separator and SEPARATOR in text else text


def test_deterministic_results_are_the_recorded_ones():
    different = 0
    for row in GOLDENS["deterministic"]:
        got = process_caption(row["caption"], make_rules(row), Random(0), **LATE)
        assert got == expected(row, row["result"]), row
        different += got != row["result"]
    assert different == 15  # the documented difference touches these and no more


def test_the_same_generator_gives_the_recorded_sequences():
    """Draw for draw: 5 results in a row from one seeded generator."""
    for row in GOLDENS["seeded_sequences"]:
        rng = Random(row["seed"])
        got = [process_caption(row["caption"], make_rules(row), rng, **LATE) for _ in range(5)]
        assert got == [expected(row, each) for each in row["first5"]], row


def distance(ours: Counter[str], theirs: Counter[str]) -> float:
    """Half the sum of the differences of two distributions: 0 where they are the same, 1 where they share nothing."""
    return sum(abs(ours[each] / ours.total() - theirs[each] / theirs.total()) for each in {*ours, *theirs}) / 2


@pytest.mark.parametrize("options", sorted({row["options"] for row in GOLDENS["random"]}))
def test_random_results_are_distributed_as_recorded(options):
    """Results with one outcome are equal, others as likely; of very many, their first tags and numbers of tags are."""
    for row in (row for row in GOLDENS["random"] if row["options"] == options):
        got = Counter(process_caption(row["caption"], make_rules(row), Random(i), **LATE) for i in range(400))
        if "counts" in row:
            recorded = Counter[str]()
            for text, count in row["counts"].items():
                recorded[expected(row, text)] += count
            assert len(recorded) > 1 or set(got) == set(recorded), row
            assert distance(got, recorded) < 0.05 + 0.04 * len(recorded) ** 0.5, row
        else:
            assert len(got) > 24, row
            first, numbers = Counter[str](), Counter[str]()
            for text, count in got.items():
                first[text.split(", ")[0]] += count
                numbers[str(len(text.split(", ")))] += count
            assert distance(first, Counter(row["first_token_counts"])) < 0.2, row
            assert distance(numbers, Counter(row["comma_space_token_count_distribution"])) < 0.2, row


@pytest.mark.parametrize("row", GOLDENS["token_warmup"], ids=lambda row: f"{row['token_warmup_step']}")
def test_warmup(row):
    names = ("token_warmup_step", "token_warmup_min", "keep_tokens")
    rules = CaptionRules(**{name: row[name] for name in names})
    for step, result in row["result_by_current_step"].items():
        got = process_caption(
            row["caption"], rules, Random(0), epoch=1, step=int(step), max_train_steps=row["max_train_steps"]
        )
        assert got == result


@pytest.mark.parametrize("every", GOLDENS["dropout_every_n_epochs"])
def test_dropout_every_n_epochs(every):
    rules = CaptionRules(caption_dropout_every_n_epochs=int(every))
    for epoch, result in GOLDENS["dropout_every_n_epochs"][every].items():
        assert process_caption("a, b", rules, Random(0), epoch=int(epoch), step=0, max_train_steps=1) == result


TAGS = st.lists(st.text("abcdefgh ", min_size=1, max_size=6).map(str.strip).filter(bool), min_size=1, max_size=12)


@given(TAGS, st.integers(0, 5), st.integers())
def test_shuffling_keeps_every_tag_and_the_first_ones_in_place(tags, keep, seed):
    rules = CaptionRules(shuffle_caption=True, keep_tokens=keep)
    got = process_caption(", ".join(tags), rules, Random(seed), **LATE).split(", ")
    assert sorted(got) == sorted(tags)
    assert got[:keep] == tags[:keep]


@given(TAGS, st.floats(0, 1), st.integers(0, 5), st.integers())
def test_dropout_removes_and_never_adds_or_reorders(tags, rate, keep, seed):
    numbered = [f"{i} {tag}" for i, tag in enumerate(tags)]
    rules = CaptionRules(caption_tag_dropout_rate=rate, keep_tokens=keep)
    got = process_caption(", ".join(numbered), rules, Random(seed), **LATE)
    left = got.split(", ") if got else []
    assert left == [tag for tag in numbered if tag in left]
    assert left[: len(tags[:keep])] == numbered[:keep]


@given(TAGS, TAGS, TAGS, st.integers())
def test_fixed_parts_stay_at_the_ends(first, middle, last, seed):
    text = f" {SEPARATOR} ".join(", ".join(part) for part in (first, middle, last))
    rules = CaptionRules(shuffle_caption=True, caption_tag_dropout_rate=0.5, keep_tokens_separator=SEPARATOR)
    got = process_caption(text, rules, Random(seed), **LATE).split(", ")
    assert got[: len(first)] == first
    assert got[len(got) - len(last) :] == last
    assert not Counter(got[len(first) : len(got) - len(last)]) - Counter(middle)


@given(TAGS, st.integers())
def test_the_warmup_ends_with_every_tag(tags, seed):
    rules = CaptionRules(token_warmup_step=0.5, shuffle_caption=True)
    counts = [
        len(process_caption(", ".join(tags), rules, Random(seed), epoch=1, step=step, max_train_steps=40).split(", "))
        for step in range(25)
    ]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert set(counts[20:]) == {len(tags)}


@given(st.text(max_size=60), st.integers())
def test_any_text_passes_and_depends_on_the_generator_alone(text, seed):
    rules = CaptionRules(
        shuffle_caption=True, enable_wildcard=True, caption_tag_dropout_rate=0.3, secondary_separator=";;;"
    )
    assert process_caption(text, rules, Random(seed), **LATE) == process_caption(text, rules, Random(seed), **LATE)


@given(st.text(max_size=60))
def test_without_rules_one_line_stays_as_it_is(text):
    line = text.split("\n")[0]
    assert process_caption(text, CaptionRules(), Random(0), **LATE) == line


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("a cat\n", "a cat"),
        ("  a cat \r\nsecond\r\n\r\n third ", "a cat\nsecond\nthird"),
        ("\nsecond", "second"),
        ("old\rmac", "old\nmac"),
        ("", ""),
        (" \r\n\t\n", ""),
    ],
)
def test_caption_files(content, lines):
    assert parse_caption_file(content) == lines


@pytest.mark.parametrize(
    ("text", "separator", "options", "result"),
    [
        ("a box; red, round; on grass", ";", {"token_warmup_step": 10}, "a box; red, round; on grass"),
        ("a box;red ||| on grass", ";", {"keep_tokens_separator": "|||"}, "a box; red; on grass"),
        ("a | b | c", " | ", {"token_warmup_step": 10}, "a | b | c"),
        ("a|b|c", "|", {"caption_tag_dropout_rate": 1.0, "keep_tokens": 2}, "a| b"),
        ("a b c", " ", {"token_warmup_step": 10}, "a b c"),
        ("a,b", ",", {"token_warmup_step": 10}, "a, b"),
        ("a+b; c", ";", {"secondary_separator": "+", "token_warmup_step": 10}, "a;b; c"),
    ],
)
def test_tags_are_joined_with_the_separator_that_parts_them(text, separator, options, result):
    rules = CaptionRules(caption_separator=separator, **options)
    assert process_caption(text, rules, Random(0), **LATE) == result


@given(TAGS, st.sampled_from([";", "|", " / ", "。", "//"]), st.integers())
def test_shuffling_keeps_every_tag_whatever_parts_them(tags, separator, seed):
    rules = CaptionRules(shuffle_caption=True, caption_separator=separator)
    got = process_caption(separator.join(tags), rules, Random(seed), **LATE).split(separator)
    assert sorted(tag.strip() for tag in got) == sorted(tags)


LINES = st.text(st.characters(exclude_characters="\n\r{}|,", exclude_categories=["Cs"]), max_size=8)
NAMES = st.text("abcdef", min_size=1, max_size=4)


@given(LINES, NAMES, NAMES)
def test_prefix_and_suffix_stand_around_the_caption_with_one_space(text, prefix, suffix):
    rules = CaptionRules(caption_prefix=prefix, caption_suffix=suffix)
    assert process_caption(text, rules, Random(0), **LATE) == f"{prefix} {text} {suffix}"


@given(st.lists(st.text("abc ", min_size=1, max_size=5), min_size=1, max_size=6), st.integers())
def test_one_line_of_several_is_chosen(lines, seed):
    got = process_caption("\n".join(lines), CaptionRules(enable_wildcard=True), Random(seed), **LATE)
    assert got in lines


@given(st.lists(st.lists(NAMES, min_size=1, max_size=4), min_size=1, max_size=4), st.integers())
def test_each_choice_is_one_of_its_alternatives(groups, seed):
    text = " ".join("{" + "|".join(group) + "}" for group in groups)
    got = process_caption(text, CaptionRules(enable_wildcard=True), Random(seed), **LATE).split(" ")
    assert all(word in group for word, group in zip(got, groups, strict=True))


@given(NAMES, st.lists(NAMES, min_size=2, max_size=5), st.integers())
def test_tags_that_are_glued_together_stay_together(first, glued, seed):
    rules = CaptionRules(shuffle_caption=True, secondary_separator=";;;")
    got = process_caption(f"{first}, {';;;'.join(glued)}, z", rules, Random(seed), **LATE)
    assert ",".join(glued) in got.replace(", ", "\n").split("\n")


@given(TAGS, TAGS, TAGS, st.integers())
def test_the_separator_fixes_both_ends(first, middle, last, seed):
    rules = CaptionRules(shuffle_caption=True, caption_tag_dropout_rate=0.5, keep_tokens_separator=SEPARATOR)
    text = SEPARATOR.join(", ".join(tags) for tags in (first, middle, last))
    got = process_caption(text, rules, Random(seed), **LATE).split(", ")
    assert got[: len(first)] == first
    assert got[len(got) - len(last) :] == last
    assert not Counter(got[len(first) : len(got) - len(last)]) - Counter(middle)


@given(st.floats(0.01, 0.99), st.integers())
def test_a_caption_is_dropped_completely_or_not_at_all(rate, seed):
    rules = CaptionRules(caption_dropout_rate=rate, caption_prefix="p", secondary_separator=";")
    assert process_caption("a;b", rules, Random(seed), **LATE) in ("", "p a,b")


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.7, 1.0])
def test_captions_are_dropped_at_the_dropout_rate(rate):
    rules = CaptionRules(caption_dropout_rate=rate)
    share = sum(process_caption("a", rules, Random(i), **LATE) == "" for i in range(4000)) / 4000
    assert abs(share - rate) < 0.03


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_tags_are_dropped_at_the_dropout_rate_independently(rate):
    rules = CaptionRules(caption_tag_dropout_rate=rate, keep_tokens=1)
    counts = Counter()
    for i in range(3000):
        counts.update(process_caption("a, b, c, d", rules, Random(i), **LATE).split(", "))
    assert counts["a"] == 3000
    assert all(abs(counts[tag] / 3000 - (1 - rate)) < 0.03 for tag in "bcd")


@pytest.mark.parametrize("options", [{"shuffle_caption": True}, {"caption_tag_dropout_rate": 0.5}, {"keep_tokens": 1}])
def test_without_a_separator_commas_separate(options):
    text = "a, b, c, d"
    results = [
        process_caption(
            text, CaptionRules(caption_separator=separator, **options), Random(3), epoch=1, step=0, max_train_steps=10
        )
        for separator in ("", ",")
    ]
    assert results[0] == results[1]
