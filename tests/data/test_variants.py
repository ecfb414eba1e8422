"""Several captions of each kept in a cache of text: which they are, who draws which, and what is refused."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.common.seeds import python_random
from sfumato.data.cache.entries import ContentHashes, LatentNames, TensorCache, TextNames, fill_text
from sfumato.data.cache.store import MemoryStore
from sfumato.data.captions import CaptionRules, process
from sfumato.data.loader import Loader, TextFeatures
from sfumato.data.masks import MaskNames
from sfumato.data.order import Order
from sfumato.data.variants import captions_to_cache, chosen, variant
from sfumato.errors import UserError

SUBSET = "[[datasets.subsets]]\nimage_dir = '{root}/"
TAGS = "1girl, solo, long hair, smile, day, sky"
tags = st.lists(st.text("abcdef ", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=8)


@given(tags, st.integers(0, 20), st.integers(0, 3))
def test_a_variant_is_a_shuffle_that_leaves_the_fixed_tags(words, number, keep):
    text = ", ".join(words)
    rules = CaptionRules(shuffle_caption=True, keep_tokens=keep, caption_dropout_rate=0.9)
    found = variant(text, rules, number).split(", ")
    assert Counter(found) == Counter(words)
    assert found[:keep] == words[:keep]
    assert variant(text, rules, number).split(", ") == found


def test_variants_differ_and_more_only_adds():
    rules = CaptionRules(shuffle_caption=True)
    few, many = ({variant(TAGS, rules, i) for i in range(k)} for k in (4, 16))
    assert few <= many
    assert len(many) == 16


def test_tags_are_dropped_at_the_rate_asked_for():
    rules = CaptionRules(caption_tag_dropout_rate=0.25)
    kept = sum(len(variant(TAGS, rules, i).split(", ")) for i in range(2000))
    assert abs(kept / (2000 * 6) - 0.75) < 0.02


def test_wildcards_are_realised():
    rules = CaptionRules(enable_wildcard=True)
    assert {variant("a {red|blue} {cat|dog}", rules, i) for i in range(60)} == {
        f"a {colour} {animal}" for colour in ("red", "blue") for animal in ("cat", "dog")
    }


def test_each_sample_draws_one_of_them_evenly():
    rules = CaptionRules(shuffle_caption=True)
    drawn = Counter(chosen(TAGS, rules, variants=4, seed=3, sample=i, epoch=1) for i in range(4000))
    assert set(drawn) == {variant(TAGS, rules, i) for i in range(4)}
    assert all(abs(count / 4000 - 0.25) < 0.03 for count in drawn.values())


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 9))
def test_the_same_captions_are_left_out_as_without_a_cache(seed, sample, epoch):
    rules = CaptionRules(shuffle_caption=True, caption_dropout_rate=0.4, caption_dropout_every_n_epochs=4)
    cached = chosen(TAGS, rules, variants=3, seed=seed, sample=sample, epoch=epoch)
    generator = python_random(seed, "caption", sample)
    live = process(TAGS, rules, generator, epoch=epoch, step=0, max_train_steps=1)
    assert (cached == "") == (live == "")


def test_captions_to_cache(find, pictures, tmp_path):
    pictures(tmp_path / "a", 2)
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}a'\ncaption_prefix = 'photo'\ncaption_dropout_rate = 0.1\n"
    plain = ["", "photo tag0, cat, a", "photo tag1, cat, a"]
    assert captions_to_cache(find.toml(text)) == plain
    assert captions_to_cache(find.toml(text), variants=5) == plain
    plan = find.toml(text + "shuffle_caption = true\nkeep_tokens = 1\n")
    found = captions_to_cache(plan, variants=10)
    assert sorted(found) == sorted(
        [
            "", "photo tag0, a, cat", "photo tag0, cat, a", "photo tag1, a, cat", "photo tag1, cat, a",
        ]
    )  # fmt: skip


CACHE = "--cache_text_encoder_outputs"


def test_what_varies_is_refused_where_one_of_each_is_kept(find, pictures, tmp_path):
    pictures(tmp_path / "a", 2)
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}a'\nshuffle_caption = true\nenable_wildcard = true\n"
    find.toml(text)
    with pytest.raises(UserError) as caught:
        find.toml(text, CACHE)
    assert all(word in find.said[0] for word in ("subsets[0]", "shuffle_caption", "--text_cache_variants"))
    assert "enable_wildcard" in find.said[1]
    assert "2 problems" in str(caught.value)
    notes = find.toml(text, CACHE, "--text_cache_variants", 3).notes
    assert "text is cached in 3 variants of each caption, 6 in all; each sample draws one of its own" in notes


def test_a_warm_up_is_refused_in_any_case(find, pictures, tmp_path):
    pictures(tmp_path / "a", 1)
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}a'\ntoken_warmup_step = 4\n"
    with pytest.raises(UserError, match="token_warmup_step changes captions with the step"):
        find.toml(text, CACHE, "--text_cache_variants", 3)


def features(captions):
    return [{"words": torch.tensor([sum(map(ord, caption))])} for caption in captions]


def test_the_loader_asks_only_for_what_is_cached_and_gives_the_same_again(find, pictures, tmp_path):
    """All captions of 30 epochs are found; another start, other workers and a resumed run draw the same."""
    pictures(tmp_path / "a", 4)
    text = f"[[datasets]]\nresolution = 64\nbatch_size = 2\n{SUBSET}a'\nshuffle_caption = true\n"
    plan = find.toml(text + "caption_dropout_rate = 0.2\n")
    cache, names = TensorCache(MemoryStore()), TextNames(fingerprint="clip")
    fill_text(cache, names, captions_to_cache(plan, variants=3), features)
    hashes = LatentNames(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(MemoryStore()))

    masks = MaskNames(downscale=8, hashes=hashes.hashes)

    def captions(*, first=0, workers=0):
        text = {"clip": TextFeatures(cache=cache, names=names)}
        loader = Loader(
            Order(plan, seed=5), names=hashes, masks=masks, max_train_steps=60, text=text, variants=3, workers=workers
        )  # fmt: skip
        steps = islice(loader.steps(first), 60 - first)
        return [(batch.captions, batch.text["clip"]["words"].tolist()) for step in steps for batch in step.batches]

    once = captions()
    assert once == captions(workers=2)
    assert once[25:] == captions(first=25)
    seen = {caption for batch, _ in once for caption in batch}
    assert seen == set(captions_to_cache(plan, variants=3))
    assert all(words == [[sum(map(ord, caption))] for caption in batch] for batch, words in once)


def test_a_method_may_rewrite_captions(find, pictures, tmp_path):
    """The cache holds what the method makes of them, and is asked for that."""
    pictures(tmp_path / "a", 1)
    plan = find.toml(f"[[datasets]]\nresolution = 64\n{SUBSET}a'\n")
    cache, names = TensorCache(MemoryStore()), TextNames(fingerprint="clip")
    fill_text(cache, names, [caption.upper() for caption in captions_to_cache(plan)], features)
    text = {"clip": TextFeatures(cache=cache, names=names, rewrite=str.upper)}
    hashes = LatentNames(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(MemoryStore()))
    loader = Loader(
        Order(plan, seed=5),
        names=hashes,
        masks=MaskNames(downscale=8, hashes=hashes.hashes),
        max_train_steps=1,
        text=text,
        workers=0,
    )
    (batch,) = next(loader.steps()).batches
    assert batch.captions == ["tag0, cat, a"]
    assert batch.text["clip"]["words"].tolist() == [[sum(map(ord, "TAG0, CAT, A"))]]
