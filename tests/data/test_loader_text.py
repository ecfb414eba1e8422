"""Captions and text features of batches."""

from __future__ import annotations

from itertools import chain, islice

import pytest
import torch

from data.loaders import SUBSET, features, make_loader, plan_maker
from sfumato.data.batch import pad_stack
from sfumato.data.cache.entries import TensorCache, TextKeys
from sfumato.data.cache.filling import fill_text
from sfumato.data.cache.store import DiskStore, MemoryStore
from sfumato.data.caches import TextFeatures
from sfumato.errors import UserError


@pytest.fixture
def plan(find, write_images, tmp_path):
    return plan_maker(find, write_images, tmp_path)


def test_text_encoders_are_dropped_by_chance_and_sample(plan):
    """Each encoder with its dropout rate, independently, and the same for a sample however the steps are cut."""
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}b'\nnum_repeats = 300\n"
    found: dict[int, dict[tuple[int, str], bool]] = {}
    for accumulation in (1, 3):
        loader = make_loader(
            plan(text), cached=True, accumulation=accumulation, text_dropout={"first": 0.25, "second": 0.5}
        )
        drops = found.setdefault(accumulation, {})
        for step in islice(loader.steps(), loader.sampler.steps_per_epoch):
            for batch in step.batches:
                for name, dropped in batch.text_dropped.items():
                    assert dropped.dtype == torch.bool
                    for sample, is_dropped in zip(batch.ids.tolist(), dropped.tolist(), strict=True):
                        drops[sample, name] = is_dropped
    shared = found[1].keys() & found[3].keys()
    assert len(shared) > 1000
    assert all(found[1][key] == found[3][key] for key in shared)
    ids = {sample for sample, _ in found[1]}
    first = {sample for sample in ids if found[1][sample, "first"]}
    second = {sample for sample in ids if found[1][sample, "second"]}
    assert abs(len(first) / len(ids) - 0.25) < 0.05
    assert abs(len(second) / len(ids) - 0.5) < 0.06
    assert abs(len(first & second) / len(ids) - 0.125) < 0.04


def test_captions_change_with_the_epoch_not_with_history(plan):
    text = (
        f"[[datasets]]\nresolution = 64\n{SUBSET}a'\ncaption_dropout_every_n_epochs = 2\ncaption_extension = '.txt'\n"
    )
    loader = make_loader(plan(text), accumulation=1)
    per_epoch = loader.sampler.steps_per_epoch
    for step in islice(loader.steps(), 4 * per_epoch):
        captions = chain(*(batch.captions for batch in step.batches))
        empty = {caption == "" for caption in captions}
        assert empty == {step.epoch % 2 == 1}  # epochs count from 1 for captions


def test_the_warmup_counts_optimizer_steps(plan):
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}a'\ntoken_warmup_step = 4\ncaption_extension = '.txt'\n"
    loader = make_loader(plan(text), accumulation=2)
    lengths = []
    for step in islice(loader.steps(), 6):
        captions = chain(*(batch.captions for batch in step.batches))
        lengths.append({len(caption.split(", ")) for caption in captions})
    assert lengths == [{1}, {1}, {2}, {2}, {3}, {3}]


def test_cached_text_is_padded_and_stacked(plan, tmp_path):
    text = f"[[datasets]]\nresolution = 64\nbatch_size = 3\n{SUBSET}a'\ncaption_extension = '.txt'\n"
    text += "caption_dropout_rate = 0.3\n"
    plan = plan(text)
    names = TextKeys(fingerprint="clip")
    cache = TensorCache(DiskStore(tmp_path / "text"))
    captions = [item.image.caption for item in plan.datasets[0].subsets[0].items]
    fill_text(cache, names, ["", *captions], features)
    loader = make_loader(plan, text={"clip": TextFeatures(cache=cache, keys=names)}, workers=2)
    for step in islice(loader.steps(), 5):
        for batch in step.batches:
            assert list(batch.text) == ["clip"]
            expected = pad_stack([entry["hidden"] for entry in features(batch.captions)])
            assert torch.equal(batch.text["clip"]["hidden"], expected)


def test_missing_text_features_are_an_error(plan):
    cache = TensorCache(MemoryStore())
    loader = make_loader(plan(), text={"clip": TextFeatures(cache=cache, keys=TextKeys(fingerprint="clip"))})
    with pytest.raises(UserError) as error:
        next(loader.steps())
    assert error.value.code == "cache-entry-unreadable"
    assert "text features" in str(error.value)
