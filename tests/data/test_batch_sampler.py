"""The order of samples: each exactly its repeats, the same for any number of processes, resumed without replay."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice, pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfumato.data.augment import ImageRules
from sfumato.data.batch_sampler import BatchSampler
from sfumato.data.buckets import Buckets
from sfumato.data.captions import CaptionRules
from sfumato.data.find.image_table import ImageRow, ImageTable
from sfumato.data.find.settings import DatasetSettings, SubsetSettings
from sfumato.data.plans import DataPlan, DatasetPlan, Items, SubsetPlan
from sfumato.track.image_list import iterate_training_images

SHAPES = ((128, 128), (256, 64), (64, 256))  # each a bucket of its own


def make_plan(datasets, *, batch_size: int = 2, processes: int = 1) -> DataPlan:
    """datasets: for each, for each subset, (repeats, number of images); the images take turns among three shapes."""
    found = []
    for d, subsets in enumerate(datasets):
        buckets = Buckets(resolution=(128, 128), shortest=64, longest=256)
        plans = []
        for s, (repeats, count) in enumerate(subsets):
            settings = SubsetSettings(
                where="",
                image_dir=Path(f"{d}{s}"),
                is_reg=False,
                class_tokens=None,
                num_repeats=repeats,
                caption_extension=".txt",
                caption_extension_given=True,
                conditioning_data_dir=None,
                reference_data_dirs=(),
                images=ImageRules(),
                validation_split=0.0,
                validation_seed=None,
                rules=CaptionRules(),
            )
            rows = [ImageRow(f"{d}/{s}/{i}.png", 0, 0, *SHAPES[i % 3], f"{d} {s} {i}") for i in range(count)]
            items = Items.from_images(ImageTable.from_rows(rows), buckets.choose)
            plans.append(SubsetPlan(settings=settings, items=items, repeats=(repeats,) * count))
        of_dataset = DatasetSettings(
            where="",
            batch_size=batch_size,
            buckets=buckets,
            network_multiplier=1.0,
            skip_image_resolution=None,
            subsets=tuple(each.settings for each in plans),
        )
        found.append(DatasetPlan(settings=of_dataset, subsets=tuple(plans)))
    return DataPlan(
        datasets=tuple(found), validation=(), processes=processes, prior_loss_weight=1.0, from_file=True, notes=()
    )


def take_epochs(sampler: BatchSampler, count: int = 1, first: int = 0):
    return list(islice(sampler.steps(first * sampler.steps_per_epoch), count * sampler.steps_per_epoch))


def list_samples(steps):
    samples = []
    for step in steps:
        for batch in step.batches:
            samples += batch.samples
    return samples


DATASETS = st.lists(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=3), min_size=1, max_size=3
)


@given(DATASETS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_every_sample_appears_exactly_its_repeats(datasets, batch_size, processes, accumulation, seed):
    plan = make_plan(datasets, batch_size=batch_size, processes=processes)
    expected = Counter[str]()
    captions = [row.caption for row in iterate_training_images(plan)]
    for d, subsets in enumerate(datasets):
        for s, (repeats, count) in enumerate(subsets):
            expected.update({f"{d} {s} {i}": repeats for i in range(count)})
    orders = [BatchSampler(plan, seed=seed, accumulation=accumulation, rank=rank) for rank in range(processes)]
    for epoch in range(2):
        ranks = [take_epochs(order, first=epoch) for order in orders]
        seen = list_samples(chain(*ranks))
        assert Counter(sample.item.image.caption for sample in seen if sample.real) == expected
        assert all(captions[sample.image_number] == sample.item.image.caption for sample in seen)
        ids = sorted(sample.id for sample in seen if sample.real)
        assert ids == list(range(epoch * plan.samples_per_epoch, (epoch + 1) * plan.samples_per_epoch))
        for steps in zip(*ranks, strict=True):
            real = sum(sample.real for sample in list_samples(steps))
            assert {step.real_samples for step in steps} == {real}
            for batches in zip(*(step.batches for step in steps), strict=True):
                assert len({len(batch.samples) for batch in batches}) == 1  # the same number for every process
                assert len({batch.bucket for batch in batches}) == 1
                for batch in batches:
                    assert {sample.item.choice.bucket for sample in batch.samples} == {batch.bucket}


@given(DATASETS, st.integers(0, 5))
def test_ids_and_order_do_not_depend_on_processes(datasets, seed):
    """One process with batch 4, two with batch 2, four with batch 1: the same global batches."""
    found = []
    for processes in (1, 2, 4):
        plan = make_plan(datasets, batch_size=4 // processes, processes=processes)
        ranks = [take_epochs(BatchSampler(plan, seed=seed, accumulation=2, rank=rank)) for rank in range(processes)]
        found.append([list_global_batches(steps) for steps in zip(*ranks, strict=True)])
    assert found[0] == found[1] == found[2]


def list_global_batches(steps):
    """(id, item) of the real samples of each global batch; steps: the same step of every process."""
    global_batches = []
    for batches in zip(*(step.batches for step in steps), strict=True):
        samples = chain(*(batch.samples for batch in batches))
        global_batches.append([(sample.id, sample.item) for sample in samples if sample.real])
    return global_batches


def test_a_single_process_has_no_padding_samples():
    plan = make_plan([[(1, 11)]], batch_size=4)
    assert all(sample.real for sample in list_samples(take_epochs(BatchSampler(plan, seed=0))))


def test_padding_samples_are_copies_of_a_sample_of_their_batch():
    plan = make_plan([[(1, 3)]], batch_size=4, processes=2)
    ranks = [take_epochs(BatchSampler(plan, seed=0, rank=rank)) for rank in range(2)]
    for steps in zip(*ranks, strict=True):
        samples = list_samples(steps)
        real = {sample.id: sample.item for sample in samples if sample.real}
        assert all(real[sample.id] == sample.item for sample in samples)


@pytest.mark.parametrize("first", [0, 1, 5, 7, 8, 23])
def test_starting_later_gives_the_tail(first):
    order = BatchSampler(make_plan([[(2, 7)], [(1, 5)]]), seed=3, accumulation=2)
    steps = list(islice(order.steps(), 30))
    assert list(islice(order.steps(first), 30 - first)) == steps[first:]


@pytest.mark.parametrize("first_step", [0, 3])
def test_images_are_found_by_their_ids(first_step):
    """Those that a later epoch really has, also where the data starts at another step than 0."""
    sampler = BatchSampler(make_plan([[(2, 3), (1, 4)]]), seed=5, first_step=first_step)
    step = next(sampler.steps(first_step + 2 * sampler.steps_per_epoch + 1))
    samples = [sample for batch in step.batches for sample in batch.samples]
    assert sampler.find_images([sample.id for sample in samples]) == [sample.item.image for sample in samples]


def test_the_last_step_of_an_epoch_takes_what_is_left():
    plan = make_plan([[(1, 9)]], batch_size=1)
    order = BatchSampler(plan, seed=0, accumulation=4)
    assert [len(step.batches) for step in islice(order.steps(), 6)] == [4, 4, 1, 4, 4, 1]
    assert [step.epoch for step in islice(order.steps(), 6)] == [0, 0, 0, 1, 1, 1]


def test_epochs_and_seeds_differ():
    plan = make_plan([[(3, 12)]])

    def captions(seed: int, epoch: int) -> list[str]:
        samples = list_samples(take_epochs(BatchSampler(plan, seed=seed), first=epoch))
        return [sample.item.image.caption for sample in samples]

    orders = [captions(0, 0), captions(0, 1), captions(1, 0), captions(1, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert captions(0, 1) == orders[1]


def test_buckets_come_mixed():
    plan = make_plan([[(10, 9)]])
    shapes = [step.batches[0].bucket for step in take_epochs(BatchSampler(plan, seed=0))]
    changes = sum(a != b for a, b in pairwise(shapes))
    assert changes > len(shapes) / 3  # in runs, it would be 2
