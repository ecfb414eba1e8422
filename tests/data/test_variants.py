"""Caption variants in the text cache: which they are, which sample gets which, and what is refused."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.loaders import make_caches
from sfumato.common.seeds import python_random
from sfumato.data.batch_sampler import BatchSampler
from sfumato.data.cache.entries import TensorCache, TextKeys
from sfumato.data.cache.filling import fill_text
from sfumato.data.cache.store import MemoryStore
from sfumato.data.caches import TextFeatures
from sfumato.data.captions import CaptionRules, process_caption
from sfumato.data.loader import Loader, LoaderSettings
from sfumato.data.variants import choose_variant, list_captions_to_cache, make_variant
from sfumato.errors import UserError

SUBSET = "[[datasets.subsets]]\nimage_dir = '{root}/"
TAGS = "1girl, solo, long hair, smile, day, sky"
tags = st.lists(st.text("abcdef ", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=8)


@given(tags, st.integers(0, 20), st.integers(0, 3))
def test_a_variant_is_a_shuffle_that_leaves_the_fixed_tags(words, number, keep):
    text = ", ".join(words)
    rules = CaptionRules(shuffle_caption=True, keep_tokens=keep, caption_dropout_rate=0.9)
    found = make_variant(text, rules, number).split(", ")
    assert Counter(found) == Counter(words)
    assert found[:keep] == words[:keep]
    assert make_variant(text, rules, number).split(", ") == found


def test_variants_differ_and_more_only_adds():
    rules = CaptionRules(shuffle_caption=True)
    few = {make_variant(TAGS, rules, i) for i in range(4)}
    many = {make_variant(TAGS, rules, i) for i in range(16)}
    assert few <= many
    assert len(many) == 16


def test_tags_are_dropped_at_the_dropout_rate():
    rules = CaptionRules(caption_tag_dropout_rate=0.25)
    kept = sum(len(make_variant(TAGS, rules, i).split(", ")) for i in range(2000))
    assert abs(kept / (2000 * 6) - 0.75) < 0.02


def test_wildcards_are_expanded():
    rules = CaptionRules(enable_wildcard=True)
    assert {make_variant("a {red|blue} {cat|dog}", rules, i) for i in range(60)} == {
        "a red cat",
        "a red dog",
        "a blue cat",
        "a blue dog",
    }


def test_each_sample_draws_one_variant_uniformly():
    rules = CaptionRules(shuffle_caption=True)
    drawn = Counter(choose_variant(TAGS, rules, variants=4, seed=3, sample=i, epoch=1) for i in range(4000))
    assert set(drawn) == {make_variant(TAGS, rules, i) for i in range(4)}
    assert all(abs(count / 4000 - 0.25) < 0.03 for count in drawn.values())


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 9))
def test_the_same_captions_are_dropped_as_without_a_cache(seed, sample, epoch):
    rules = CaptionRules(shuffle_caption=True, caption_dropout_rate=0.4, caption_dropout_every_n_epochs=4)
    cached = choose_variant(TAGS, rules, variants=3, seed=seed, sample=sample, epoch=epoch)
    generator = python_random(seed, "caption", sample)
    live = process_caption(TAGS, rules, generator, epoch=epoch, step=0, max_train_steps=1)
    assert (cached == "") == (live == "")


def test_captions_to_cache(find, write_images, tmp_path):
    write_images(tmp_path / "a", 2)
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}a'\ncaption_prefix = 'photo'\ncaption_dropout_rate = 0.1\n"
    plain = ["", "photo tag0, cat, a", "photo tag1, cat, a"]
    assert list_captions_to_cache(find.toml(text)) == plain
    assert list_captions_to_cache(find.toml(text), variants=5) == plain
    plan = find.toml(text + "shuffle_caption = true\nkeep_tokens = 1\n")
    found = list_captions_to_cache(plan, variants=10)
    assert sorted(found) == sorted(
        [
            "", "photo tag0, a, cat", "photo tag0, cat, a", "photo tag1, a, cat", "photo tag1, cat, a",
        ]
    )  # fmt: skip


CACHE = "--cache_text_encoder_outputs"


def test_varying_captions_are_refused_with_one_variant(find, write_images, tmp_path):
    write_images(tmp_path / "a", 2)
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}a'\nshuffle_caption = true\nenable_wildcard = true\n"
    find.toml(text)
    with pytest.raises(UserError):
        find.toml(text, CACHE)
    assert find.codes == ["varying-captions-cached"] * 2
    assert all(word in find.messages[0] for word in ("subsets[0]", "shuffle_caption", "--text_cache_variants"))
    assert "enable_wildcard" in find.messages[1]
    notes = find.toml(text, CACHE, "--text_cache_variants", 3).notes
    assert any("3 variants of each caption, 6 in total" in note for note in notes)


def test_token_warmup_is_always_refused(find, write_images, tmp_path):
    write_images(tmp_path / "a", 1)
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}a'\ntoken_warmup_step = 4\n"
    with pytest.raises(UserError, match="token_warmup_step") as error:
        find.toml(text, CACHE, "--text_cache_variants", 3)
    assert error.value.code == "step-dependent-captions-cached"


def features(captions):
    return [{"words": torch.tensor([sum(map(ord, caption))])} for caption in captions]


def test_the_loader_asks_only_for_what_is_cached_and_gives_the_same_again(find, write_images, tmp_path):
    """All captions of 30 epochs are found; another start, other workers and a resumed run draw the same."""
    write_images(tmp_path / "a", 4)
    text = f"[[datasets]]\nresolution = 64\nbatch_size = 2\n{SUBSET}a'\nshuffle_caption = true\n"
    plan = find.toml(text + "caption_dropout_rate = 0.2\n")
    cache, text_keys = TensorCache(MemoryStore()), TextKeys(fingerprint="clip")
    fill_text(cache, text_keys, list_captions_to_cache(plan, variants=3), features)

    def captions(*, first=0, workers=0):
        caches = make_caches(text={"clip": TextFeatures(cache=cache, keys=text_keys)})
        settings = LoaderSettings(max_train_steps=60, variants=3, workers=workers)
        loader = Loader(BatchSampler(plan, seed=5), caches, settings)
        steps = islice(loader.steps(first), 60 - first)
        batches = chain.from_iterable(step.batches for step in steps)
        return [(batch.captions, batch.text["clip"]["words"].tolist()) for batch in batches]

    once = captions()
    assert once == captions(workers=2)
    assert once[25:] == captions(first=25)
    seen = set(chain(*(captions_of_batch for captions_of_batch, _ in once)))
    assert seen == set(list_captions_to_cache(plan, variants=3))
    for captions_of_batch, words in once:
        assert words == [[sum(map(ord, caption))] for caption in captions_of_batch]


def test_a_method_can_rewrite_captions(find, write_images, tmp_path):
    """The cache holds what the method makes of them, and is asked for that."""
    write_images(tmp_path / "a", 1)
    plan = find.toml(f"[[datasets]]\nresolution = 64\n{SUBSET}a'\n")
    cache, text_keys = TensorCache(MemoryStore()), TextKeys(fingerprint="clip")
    fill_text(cache, text_keys, [caption.upper() for caption in list_captions_to_cache(plan)], features)
    text = {"clip": TextFeatures(cache=cache, keys=text_keys, rewrite=str.upper)}
    settings = LoaderSettings(max_train_steps=1, workers=0)
    loader = Loader(BatchSampler(plan, seed=5), make_caches(text=text), settings)
    (batch,) = next(loader.steps()).batches
    assert batch.captions == ["tag0, cat, a"]
    assert batch.text["clip"]["words"].tolist() == [[sum(map(ord, "TAG0, CAT, A"))]]
