"""Which keys of no place may be passed over, and how they are named."""

from __future__ import annotations

import pytest

from sfumato.families.foreign_keys import find_conflicts, is_redundant, summarize_keys

KNOWN = ["layers.0.attn.qkv.weight", "layers.1.attn.qkv.weight", "layers.1.attn.qkv.bias", "norm.weight", "scale"]


@pytest.mark.parametrize("key", [
    "layers.2.attn.qkv.weight",  # a further block
    "layers.0.attn.qkv.bias", "layers.0.attn.qkv.lora_A.weight", "layers.0.attn.qkv.weight.absmax", "norm.bias",
])  # fmt: skip
def test_what_would_change_the_result(key: str) -> None:
    assert find_conflicts([key, "loss.logvar"], KNOWN) == [key]


@pytest.mark.parametrize(
    "key", ["loss.logvar", "layers.0.attn.extra.weight", "position_ids", "bundle_emb.a.b", "scales"]
)
def test_what_changes_nothing(key: str) -> None:
    assert find_conflicts([key], KNOWN) == []


def test_keys_are_named_by_what_they_begin_with() -> None:
    keys = ["loss.a", "loss.b.c", "logit_scale", "model_ema.x", "model_ema.y", "bundle_emb.style.string_to_param.*"]
    assert summarize_keys(keys) == (
        "bundle_emb.style.string_to_param.*, logit_scale, loss.* (2), model_ema.* (2, averaged weights)"
    )
    assert summarize_keys([f"{letter}.x" for letter in "abcdefgh"]).endswith(" and 2 more")


@pytest.mark.parametrize(
    "key", ["betas", "alphas_cumprod_prev", "v_pred", "denoiser.sigmas", "a.embeddings.position_ids"]
)
def test_tables_that_need_no_name(key: str) -> None:
    assert is_redundant(key)
    assert not is_redundant("bundle_emb.style.betas")
