"""Cache entries of text: one for each caption and encoder."""

from __future__ import annotations

import torch

from sfumato.data.cache.entries import TensorCache, TextKeys
from sfumato.data.cache.filling import fill_text
from sfumato.data.cache.store import DiskStore


def features(caption: str) -> dict[str, torch.Tensor]:
    length = len(caption.split()) + 2
    hidden = torch.arange(length * 4.0).reshape(length, 4) + sum(map(ord, caption))
    return {"hidden": hidden, "mask": torch.ones(length, dtype=torch.bool)}


class Encoder:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, captions):
        assert len(captions) == 1
        self.seen.extend(captions)
        return [features(caption) for caption in captions]


def test_text_is_encoded_once_for_each_caption(tmp_path):
    cache, encoder = TensorCache(DiskStore(tmp_path)), Encoder()
    text_keys = TextKeys(fingerprint="clip")
    captions = ["a cat", "a dog", "", "a cat"]
    assert fill_text(cache, text_keys, captions, encoder) == (0, 3)
    assert fill_text(cache, text_keys, captions, encoder) == (3, 0)
    assert encoder.seen == ["a cat", "a dog", ""]
    for caption in captions:
        entry = cache.get(text_keys.make_key(caption))
        assert entry is not None
        assert all(torch.equal(entry[name], tensor) for name, tensor in features(caption).items())
        assert entry["mask"].dtype == torch.bool


def test_captions_may_be_encoded_together(tmp_path):
    class Together(Encoder):
        def __call__(self, captions):
            self.batches = [*self.batches, len(captions)]
            return [features(caption) for caption in captions]

        batches: list[int] = []  # noqa: RUF012

    cache, encoder = TensorCache(DiskStore(tmp_path)), Together()
    text_keys = TextKeys(fingerprint="clip")
    captions = [f"a cat {i}" for i in range(7)]
    assert fill_text(cache, text_keys, captions, encoder, batch_size=3) == (0, 7)
    assert encoder.batches == [3, 3, 1]
    assert all(
        torch.equal(cache.get(text_keys.make_key(caption))["hidden"], features(caption)["hidden"])
        for caption in captions
    )


def test_one_letter_or_another_encoder_makes_new_text(tmp_path):
    cache = TensorCache(DiskStore(tmp_path))
    captions = ["a cat", "a dog", "a bird"]
    fill_text(cache, TextKeys(fingerprint="clip"), captions, Encoder())
    assert fill_text(cache, TextKeys(fingerprint="clip"), ["a cat", "a dot", "a bird"], Encoder()) == (2, 1)
    assert fill_text(cache, TextKeys(fingerprint="t5"), captions, Encoder()) == (0, 3)
    half = TextKeys(fingerprint="clip", dtype=torch.bfloat16)
    assert fill_text(cache, half, captions, Encoder()) == (0, 3)
    entry = cache.get(half.make_key("a cat"))
    assert entry is not None
    assert (entry["hidden"].dtype, entry["mask"].dtype) == (torch.bfloat16, torch.bool)
