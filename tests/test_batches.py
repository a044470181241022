import numpy as np
import pandas as pd
import pytest
import torch
from toy_cohort import SIZE, SLICES, make_toy_cohort

from cspine_helpers.augment import AugmentConfig
from cspine_helpers.batches import EpochBatches, epoch_order, make_loader, steps_of
from cspine_helpers.cohort import read_cohort
from cspine_helpers.dataset import SequenceDataset
from cspine_helpers.labels import UID
from cspine_helpers.packed import write_sequence

ALWAYS = AugmentConfig(flip=1, affine=1, contrast=1, noise=1, dropout=1)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return read_cohort(make_toy_cohort(tmp_path_factory.mktemp("toy")))


def make(cohort, **options) -> SequenceDataset:
    samples = cohort.samples["train"]
    return SequenceDataset(
        samples, cohort.packed, slices=SLICES, size=SIZE, manifest=cohort.manifest, **options
    )


def batches(cohort, epochs, *, sampling, **options) -> list[dict[str, torch.Tensor]]:
    dataset = make(cohort, augment=ALWAYS, seed=1)
    loader = make_loader(dataset, batch_size=16, seed=1, sampling=sampling, **options)
    found = []
    for epoch in epochs:
        if sampling is not None:
            loader.batch_sampler.set_epoch(epoch)
        found += list(loader)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [None, "shuffle", "balanced"])
def test_batches_do_not_depend_on_the_number_of_workers(cohort, sampling):
    alone = batches(cohort, (0, 1), sampling=sampling)
    for workers in (1, 2):
        shared = batches(cohort, (0, 1), sampling=sampling, workers=workers)
        for one, other in zip(alone, shared, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_workers_do_not_repeat_each_others_draws(tmp_path):
    y, x = np.mgrid[:64, :64]
    picture = np.broadcast_to((x + y)[None, :, :, None], (15, 64, 64, 6)).astype(np.uint8).copy()
    picture[:, 20:40, 20:40, 5] = 255
    uids = ["1.1", "1.2", "1.3", "1.4"]
    for uid in uids:
        write_sequence(tmp_path, uid, "C1", picture)
    samples = pd.DataFrame({UID: uids, "vertebra": "C1", "label": 0})
    dataset = SequenceDataset(samples, tmp_path, slices=15, size=64, augment=ALWAYS)
    loader = make_loader(dataset, batch_size=1, workers=2, sampling="shuffle")
    sequences = [batch["sequence"] for batch in loader]
    loader.batch_sampler.set_epoch(1)
    sequences += [batch["sequence"] for batch in loader]
    for i, one in enumerate(sequences):
        assert not any(torch.equal(one, other) for other in sequences[i + 1 :])


def test_a_pass_leaves_the_global_random_state_alone(cohort):
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002  # the global one
    batches(cohort, (0,), sampling="balanced")
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002


def test_shuffle_takes_each_sample_once_in_an_order_of_its_epoch():
    labels = np.zeros(50)
    orders = [epoch_order(labels, "shuffle", seed=5, epoch=epoch).tolist() for epoch in (0, 1, 0)]
    assert sorted(orders[0]) == list(range(50))
    assert orders[0] == orders[2] != orders[1]


def test_balanced_sampling_draws_both_classes_equally_often():
    labels = np.zeros(1000, dtype=int)
    labels[:40] = 1
    drawn = epoch_order(labels, "balanced", seed=2, epoch=0)
    assert len(drawn) == 1000
    assert 0.45 < labels[drawn].mean() < 0.55
    assert len(set(drawn)) < 1000  # with replacement
    assert not np.array_equal(drawn, epoch_order(labels, "balanced", seed=2, epoch=1))


def test_sampling_that_cannot_be_is_refused_when_the_loader_is_made(cohort):
    dataset = make(cohort)
    with pytest.raises(ValueError, match="found 'weighted'"):
        make_loader(dataset, batch_size=4, sampling="weighted")
    dataset.labels = np.zeros(42)
    with pytest.raises(ValueError, match="found 0 of 42 fractured"):
        make_loader(dataset, batch_size=4, sampling="balanced")


@pytest.mark.parametrize(("samples", "batch_size"), [(1519, 16), (7, 8), (100, 1), (33, 8), (7, 1)])
@pytest.mark.parametrize(("accumulate", "processes"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_processes_see_every_sample_once_in_batches_of_nearly_one_size(
    samples, batch_size, accumulate, processes
):
    order = np.random.default_rng(0).permutation(samples)
    shares = [
        EpochBatches(
            lambda _: order,
            batch_size=batch_size,
            accumulate=accumulate,
            process=process,
            processes=processes,
        )
        for process in range(processes)
    ]
    seen = [index for share in shares for batch in share for _, index in batch]
    assert sorted(seen) == list(range(samples))
    assert len({len(list(share)) for share in shares}) == 1
    assert all(len(share) == len(list(share)) for share in shares)
    sizes = {len(batch) for share in shares for batch in share}
    assert max(sizes) <= batch_size + (batch_size == 1)
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 2
    assert sum(shares[0].step_sizes) == samples


def test_the_batches_of_a_step_are_the_same_accumulated_or_shared():
    order = np.arange(50)
    accumulated = steps_of(order, batch_size=4, accumulate=2)
    shared = steps_of(order, batch_size=4, processes=2)
    for one, other in zip(accumulated, shared, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_too_few_samples_for_the_processes_are_refused():
    with pytest.raises(ValueError, match=r"5 samples cannot fill the 6 batches .*Use fewer processes"):
        steps_of(np.arange(5), batch_size=8, accumulate=2, processes=3)


def test_evaluation_deals_out_the_same_batches_whatever_the_processes(cohort):
    dataset = make(cohort)
    alone = [batch["index"].tolist() for batch in make_loader(dataset, batch_size=8)]
    dealt = [
        [batch["index"].tolist() for batch in make_loader(dataset, batch_size=8, process=p, processes=3)]
        for p in range(3)
    ]
    assert sorted(alone) == sorted(batch for share in dealt for batch in share)
    assert sum(alone, []) == list(range(42))  # noqa: RUF017  # a short list
