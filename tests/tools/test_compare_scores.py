"""The scores of `sfumato compare` against closed forms, and the rule that chooses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.tools.compare.choice import Judged, choose_checkpoint
from sfumato.tools.compare.scores import (
    References,
    Scores,
    find_copies,
    find_nearest_image,
    mean_similarity,
    mean_similarity_among,
    measure_drift,
    measure_learned,
    measure_pixel_change,
    measure_usual_copies,
)


def at(*degrees: float) -> Tensor:
    """Vectors in a plane at these angles, so that every cosine is known."""
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def cosine(degrees: float) -> float:
    return math.cos(math.radians(degrees))


def test_similarities_are_mean_cosines() -> None:
    found = mean_similarity(at(0, 90), at(30, 60))
    torch.testing.assert_close(found, torch.full((2,), (cosine(30) + cosine(60)) / 2, dtype=torch.float64))
    assert mean_similarity_among(at(0, 60, 90)) == pytest.approx((cosine(60) + cosine(90) + cosine(30)) / 3)
    assert mean_similarity(at(0), at()[:0].reshape(0, 2)).isnan().all()
    assert math.isnan(mean_similarity_among(at(0)))


def test_similarities_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(1)
    images, others = (F.normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (5, 7))
    expected = F.cosine_similarity(images[:, None], others[None], dim=2)
    torch.testing.assert_close(mean_similarity(images, others), expected.mean(1))
    distances, index = find_nearest_image(images, others)
    torch.testing.assert_close(distances, 1 - expected.max(1).values)
    assert torch.equal(index, expected.argmax(1))


def make_references(training: Tensor, base: Tensor, held_out: Tensor | None = None) -> References:
    nothing = training[:0]
    return References(
        training=training, held_out=nothing if held_out is None else held_out, base=base[:, None], base_neutral=base[:0]
    )


def test_learned_is_0_before_training_and_1_for_a_real_image() -> None:
    training, base = at(0, 20), at(90, 110)
    references = make_references(training, base)
    among = cosine(20)
    before = (cosine(90) + cosine(70) + cosine(110) + cosine(90)) / 4
    between = (mean_similarity(at(10), training) - before) / (among - before)
    torch.testing.assert_close(measure_learned(at(10), references), between)
    assert float(measure_learned(base, references).mean()) == pytest.approx(0, abs=1e-12)
    alike = (
        torch.acos(torch.tensor(among / cosine(10), dtype=torch.float64)).rad2deg() + 10
    )  # as like as one to another
    assert float(measure_learned(at(float(alike)), references)) == pytest.approx(1)


def test_learned_counts_held_out_images_where_there_are_any() -> None:
    references = make_references(at(0, 10), at(120), held_out=at(40))
    before, among = cosine(80), (cosine(40) + cosine(30)) / 2
    found = measure_learned(at(0), references)
    assert float(found) == pytest.approx((cosine(40) - before) / (among - before))


def test_learned_is_unknown_where_the_model_made_such_images_before() -> None:
    assert measure_learned(at(5), make_references(at(0, 90), at(44, 46))).isnan().all()


def test_copies_are_nearer_than_training_images_to_each_other() -> None:
    training = at(0, 10, 90)  # the nearest other one is at 10, 10 and 80 degrees
    assert find_copies(at(-9, -11, 19, 21, 60), training).tolist() == [1, 0, 1, 0, 1]
    assert find_copies(at(0), at(0)).isnan().all()


def test_new_images_have_as_many_copies_as_training_images_tell() -> None:
    """What the scale of `memorized` stands on: new images of the same distribution count as 0, copies as 1."""
    generator = torch.Generator().manual_seed(0)
    for width in (2, 8, 64):
        drawn = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (500, 2000))
        training, new = (F.normalize(each, dim=1) for each in drawn)
        usual = measure_usual_copies(training)
        assert float(find_copies(new, training).mean()) == pytest.approx(usual, abs=0.06)
        assert find_copies(training, training).mean() == 1
    assert measure_usual_copies(at(0, 10, 90)) == pytest.approx(2 / 3)  # the third's nearest has a nearer one
    assert math.isnan(measure_usual_copies(at(0, 10)))


def test_drift_is_0_for_other_seeds_and_1_for_another_prompt() -> None:
    base = torch.stack([at(0, 10), at(90, 100)])  # two prompts, two seeds
    usual, unrelated = cosine(10), (2 * cosine(90) + cosine(100) + cosine(80)) / 4
    assert measure_drift(base, base).tolist() == pytest.approx([0] * 4, abs=1e-12)
    swapped = measure_drift(base.flip(0), base)
    assert float(swapped.mean()) == pytest.approx(1)
    moved = torch.stack([at(30, 10), at(90, 100)])
    expected = (usual - cosine(20)) / (usual - unrelated)  # the image of seed 1 against the base's of seed 2
    assert measure_drift(moved, base).tolist() == pytest.approx([expected, 0, 0, 0], abs=1e-12)
    assert measure_drift(base[:, :1], base[:, :1]).isnan().all()
    assert measure_drift(base[:1], base[:1]).isnan().all()


def test_change_is_a_root_mean_square() -> None:
    image = torch.zeros(3, 2, 2)
    image[0] = 0.6
    assert measure_pixel_change(image, torch.zeros(3, 2, 2)) == pytest.approx(0.6 / math.sqrt(3))


def judge(step: int, learned: list[float], drift: list[float], *, copied: float = 0, loss: float = math.nan) -> Judged:
    nothing = torch.zeros(len(learned))
    copies = torch.zeros(len(learned))
    copies[: round(copied * len(learned))] = 1
    scores = Scores(
        to_training=nothing,
        to_held_out=nothing,
        nearest=nothing,
        nearest_index=nothing.long(),
        learned=torch.tensor(learned, dtype=torch.float32),
        copied=copies,
        usual_copies=0.5,
        drift=torch.tensor(drift, dtype=torch.float32),
    )
    return Judged(name=f"step{step}", step=step, scores=scores, validation_loss=loss)


def test_the_value_is_learned_less_drift_less_memorized() -> None:
    judged = judge(1, [0.5, 1.5, 0.9, 0.7], [0.1, -0.3], copied=0.75)
    assert judged.value == pytest.approx((0.5 + 1 + 0.9 + 0.7) / 4 - 0.05 - 0.5)


def test_the_highest_value_is_taken() -> None:
    under, good = judge(10, [0.2, 0.3, 0.2], [0, 0]), judge(100, [0.9, 0.9, 0.8], [0.1, 0])
    drifted, memorized = judge(400, [1, 1, 1], [0.8, 0.9]), judge(500, [1, 1, 1], [0, 0], copied=1)
    choice = choose_checkpoint([under, good, drifted, memorized])
    assert choice.index == 1
    assert "0.82" in choice.reasons[0]


def test_of_values_that_chance_explains_the_fewest_steps_are_taken() -> None:
    early, late = judge(100, [0.9, 0.5, 0.8], [0, 0]), judge(200, [0.6, 0.9, 0.8], [0, 0])
    choice = choose_checkpoint([early, late])  # the difference is 0.03, its standard error 0.20
    assert choice.index == 0
    assert "step 200" in choice.reasons[1]
    apart = judge(200, [0.95, 0.56, 0.85], [0, 0])  # less scattered: 0.053, the standard error is 0.003
    assert choose_checkpoint([early, apart]).index == 1


def test_without_an_encoder_the_validation_loss_decides() -> None:
    losses = [Judged(name=str(i), step=i, validation_loss=loss) for i, loss in enumerate((0.4, 0.2, math.nan, 0.3))]
    assert choose_checkpoint(losses).index == 1
    assert choose_checkpoint(losses[2:3]).index is None


def test_a_run_that_only_harms_has_no_checkpoint_to_take() -> None:
    choice = choose_checkpoint([judge(10, [0.1, 0.1], [0.4, 0.4]), judge(20, [0.5, 0.5], [0.9, 0.9])])
    assert choice.index is None
    assert "before training" in choice.reasons[0]
    assert choose_checkpoint([judge(10, [0.3, -0.2], [0, 0])]).index is None, "0.05, of which chance explains 0.25"
