"""Autocast on the rehearsal device gives the dtypes that torch documents for CUDA."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rehearsing import needs_rehearsal, rehearsal
from sfumato.memory.rehearsal.autocast import FLOAT32, FLOAT32_OUTPUT, LOWER_PRECISION, WIDEST

__all__ = ["rehearsal"]
pytestmark = needs_rehearsal

BF16, F32 = torch.bfloat16, torch.float32
HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
# Recurrent cells, which no network here has; and the inner half of attention, whose outer half has a rule.
WITHOUT_RULE = r"_thnn_fused_\w+|lstm_cell|gru_cell|rnn_\w+_cell|_scaled_dot_product_flash_attention"


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        (lambda x, w: F.linear(x, w), BF16),
        (lambda x, w: x @ w, BF16),
        (lambda x, w: torch.einsum("ij,jk->ik", x, w), BF16),
        (lambda x, w: torch.addmm(x, x, w), BF16),
        (lambda x, w: torch.bmm(x[None], w[None]), BF16),
        (lambda x, w: F.conv2d(x.view(1, 4, 4, 4), x.view(4, 4, 2, 2)), BF16),
        (lambda x, w: F.conv_transpose2d(x.view(1, 4, 4, 4), x.view(4, 4, 2, 2)), BF16),
        (lambda x, w: F.scaled_dot_product_attention(*[x.view(1, 2, 4, 8)] * 3), BF16),
        (lambda x, w: F.layer_norm(x.bfloat16(), (8,)), F32),
        (lambda x, w: F.group_norm(x.bfloat16(), 2), F32),
        (lambda x, w: F.rms_norm(x.bfloat16(), (8,)), F32),
        (lambda x, w: F.softmax(x.bfloat16(), -1), F32),
        (lambda x, w: F.log_softmax(x.bfloat16(), -1), F32),
        (lambda x, w: F.softmax(x.bfloat16(), -1, dtype=BF16), BF16),
        (lambda x, w: F.mse_loss(x.bfloat16(), w.bfloat16()), F32),
        (lambda x, w: F.huber_loss(x.bfloat16(), w.bfloat16()), F32),
        (lambda x, w: F.l1_loss(x.bfloat16(), w.bfloat16()), F32),
        (lambda x, w: x.bfloat16().pow(2), F32),
        (lambda x, w: x.bfloat16().rsqrt(), F32),
        (lambda x, w: x.bfloat16().exp(), F32),
        (lambda x, w: x.bfloat16().sum(), F32),
        (lambda x, w: x.bfloat16().sum(1, keepdim=True), F32),
        (lambda x, w: torch.linalg.vector_norm(x.bfloat16()), F32),
        (lambda x, w: x.bfloat16().cumsum(0), F32),
        (lambda x, w: F.interpolate(x.bfloat16().view(1, 4, 4, 4), scale_factor=2.0), F32),
        (lambda x, w: torch.cat([x.bfloat16(), w]), F32),
        (lambda x, w: torch.stack([x.bfloat16(), w.bfloat16()]), BF16),
        (lambda x, w: torch.addcmul(x.bfloat16(), x, w), F32),
        (lambda x, w: x.bfloat16() + w, F32),  # no rule: torch's usual promotion
        (lambda x, w: F.gelu(x.bfloat16()), BF16),
        (lambda x, w: F.silu(x.bfloat16()), BF16),
        (lambda x, w: x.bfloat16().mean(), BF16),
        (lambda x, w: x.double() @ w.double(), torch.float64),
    ],
)
def test_the_documented_dtypes(rehearsal, op, dtype):
    x, w = torch.zeros(8, 8, device=rehearsal.device), torch.zeros(8, 8, device=rehearsal.device)
    with torch.autocast("rehearsal", BF16):
        assert op(x, w).dtype == dtype
        with torch.autocast("rehearsal", enabled=False):
            assert F.linear(x, w).dtype == F32
    assert F.linear(x, w).dtype == F32


def test_every_rule_of_cuda_is_there():
    """Against the tables in the header of the torch that is installed."""
    text = HEADER.read_text(encoding="utf-8")
    names: set[str] = set()
    for table in ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"):
        found = re.search(rf"#define AT_FORALL_{table}\(_\)((?:.*\\\n)*.*\n)", text)
        assert found, table
        for name, overload in re.findall(r"_\((\w+)(?:, (\w+))?\)", found[1]):
            if not re.fullmatch(WITHOUT_RULE, name):
                names.add(f"{name}.{overload}" if overload else name)
    assert len(names) > 90
    ours = {*LOWER_PRECISION, *FLOAT32, *FLOAT32_OUTPUT, *WIDEST}
    assert ours - names == {"cat", "stack", "norm.Scalar", "norm.ScalarOpt_dim"}  # registered elsewhere in torch
    assert names - ours == set()


def test_gradients_have_the_dtype_of_the_weights(rehearsal):
    weight = torch.zeros(8, 8, device=rehearsal.device, requires_grad=True)
    x = torch.zeros(3, 8, device=rehearsal.device)
    with torch.autocast("rehearsal", BF16):
        loss = F.linear(x, weight).float().pow(2).sum()
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == F32


@pytest.mark.parametrize("trained", [True, False])
def test_the_copy_of_a_weight_is_kept_until_autocast_ends(rehearsal, trained):
    """torch keeps the cast copy of a weight that trains, so that using it twice casts once."""
    weight = torch.zeros(64, 64, device=rehearsal.device, requires_grad=trained)
    x = torch.zeros(1, 64, device=rehearsal.device, dtype=BF16)
    with torch.no_grad(), torch.autocast("rehearsal", BF16):
        before = rehearsal.memory.allocated
        F.linear(x, weight)
        F.linear(x, weight)
        assert rehearsal.memory.allocated - before == (64 * 64 * 2 if trained else 0)
    assert rehearsal.memory.allocated == before
