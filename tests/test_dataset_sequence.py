import pickle
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from toy_cohort import SIZE, SLICES, make_toy_cohort

from cspine_helpers.cohort import read_cohort
from cspine_helpers.dataset import sequence as batches_module
from cspine_helpers.dataset.augment import AugmentConfig
from cspine_helpers.dataset.sequence import (
    EpochBatches,
    SequenceDataset,
    batch_contents,
    collate,
    draw_probabilities,
    epoch_order,
    grouped_steps,
    load_batches,
    make_loader,
    steps_of,
)
from cspine_helpers.labels import UID
from cspine_helpers.packed import open_sequence, sequence_path, write_sequence

OFF = {"flip": 0.0, "affine": 0.0, "contrast": 0.0, "noise": 0.0, "dropout": 0.0}
MAPS = Path("/proc/self/maps")  # of Linux
LEVELS = np.arange(1000) % 7
ALWAYS = AugmentConfig(flip=1, affine=1, contrast=1, noise=1, dropout=1)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return read_cohort(make_toy_cohort(tmp_path_factory.mktemp("toy")))


def make(cohort, *, split="train", **options) -> SequenceDataset:
    options = {"manifest": cohort.manifest, **options}
    return SequenceDataset(cohort.samples[split], cohort.packed, slices=SLICES, size=SIZE, **options)


def test_an_item_is_the_packed_sequence_with_channels_first(cohort):
    dataset = make(cohort)
    samples = cohort.samples["train"]
    assert len(dataset) == len(samples)
    item = dataset[9]
    uid, vertebra, label = samples.iloc[9]
    on_disk = open_sequence(sequence_path(cohort.packed, uid, vertebra))
    assert item["sequence"].dtype == torch.uint8
    np.testing.assert_array_equal(item["sequence"].numpy(), on_disk.transpose(0, 3, 1, 2))
    assert (item["label"].item(), item["label"].dtype) == (label, torch.float32)
    assert (item["vertebra"].item(), item["vertebra"].dtype) == (int(vertebra[1]) - 1, torch.int64)
    assert (item["index"].item(), item["index"].dtype) == (9, torch.int64)
    named = SequenceDataset(samples, str(cohort.packed), slices=SLICES, size=SIZE)
    assert torch.equal(named[9]["sequence"], item["sequence"])


@pytest.mark.parametrize("augment", [None, ALWAYS])
def test_masks_of_0_and_1_make_the_items_of_masks_of_0_and_255(tmp_path, augment):
    cohort = read_cohort(make_toy_cohort(tmp_path))
    expected = make(cohort, augment=augment)[9]["sequence"].clone()
    path = sequence_path(cohort.packed, *cohort.samples["train"].iloc[9, :2])
    array = np.load(path)
    array[..., 5] = array[..., 5] > 127
    np.save(path, array)
    assert torch.equal(make(cohort, augment=augment)[9]["sequence"], expected)


def test_slice_truth_comes_from_the_manifest_and_is_nan_without_one(cohort):
    labels = cohort.samples["train"]["label"].to_numpy()
    dataset = make(cohort)
    expected = np.where(labels[:, None] == 1, [0, 1, 1, 0, 0], 0)
    np.testing.assert_array_equal(dataset.slice_truth, expected)
    np.testing.assert_array_equal(dataset[3]["slice_truth"].numpy(), expected[3])
    assert make(cohort, manifest=None)[3]["slice_truth"].isnan().all()


def test_samples_that_the_manifest_lacks_are_named(cohort):
    gone = cohort.samples["train"].iloc[4]
    short = cohort.manifest.query(f"not ({UID} == @gone.{UID} and vertebra == 'C5')")
    with pytest.raises(ValueError, match=f"1 samples are not in the manifest: '{gone[UID]} C5'"):
        make(cohort, manifest=short)


def test_samples_without_rows_or_columns_are_refused(cohort):
    samples = cohort.samples["train"]
    with pytest.raises(ValueError, match="no samples"):
        SequenceDataset(samples.iloc[:0], cohort.packed, slices=SLICES, size=SIZE)
    with pytest.raises(ValueError, match="'label'"):
        SequenceDataset(samples.drop(columns="label"), cohort.packed, slices=SLICES, size=SIZE)


def test_a_sequence_of_another_shape_is_refused_by_name(cohort):
    dataset = SequenceDataset(cohort.samples["train"], cohort.packed, slices=SLICES, size=48)
    with pytest.raises(ValueError, match=r"_1.npy .* expected \(5, 48, 48, 6\)"):
        dataset[0]


def test_the_same_seed_epoch_and_index_give_the_same_item_and_others_differ(cohort):
    one, two = (make(cohort, augment=ALWAYS, seed=3) for _ in range(2))
    first = one[4]["sequence"]
    assert not torch.equal(two[1, 4]["sequence"], first)
    assert torch.equal(two[4]["sequence"], first)
    assert torch.equal(two[0, 4]["sequence"], first)
    assert torch.equal(two[1, 4]["sequence"], one[1, 4]["sequence"])
    assert not torch.equal(make(cohort, augment=ALWAYS, seed=4)[4]["sequence"], first)


def test_a_slice_has_a_draw_of_its_own_for_its_seed_epoch_index_and_position(cohort):
    one, two = (make(cohort, augment=ALWAYS, seed=3) for _ in range(2))
    first = one.slice_at(4, 2)
    assert torch.equal(two.slice_at(4, 2, epoch=0), first)
    others = [two.slice_at(4, 2, epoch=1), two.slice_at(4, 3), one[4]["sequence"][2]]
    assert all(other.shape == first.shape == (6, SIZE, SIZE) for other in others)
    assert not any(torch.equal(other, first) for other in others)
    plain = make(cohort)
    assert torch.equal(plain.slice_at(4, 2, epoch=1), plain[4]["sequence"][2])


def test_validation_items_are_left_as_they_are_in_every_epoch(cohort):
    dataset = make(cohort, split="validation")
    assert torch.equal(dataset[7, 0]["sequence"], dataset[0]["sequence"])


@pytest.mark.parametrize("augment", [None, ALWAYS])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_items_stacked_with_channels_last_in_memory(cohort, augment, workers):
    dataset = make(cohort, augment=augment)
    keys = [[(1, 3), (1, 0), (1, 8)], [(2, 3)]]
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=collate)
    for batch, wanted in zip(loader, keys, strict=True):
        items = [dataset[key] for key in wanted]
        for name in items[0]:
            assert torch.equal(batch[name], torch.stack([item[name] for item in items]))
        assert batch["sequence"].shape == (len(wanted), SLICES, 6, SIZE, SIZE)
        assert batch["sequence"].permute(0, 1, 3, 4, 2).is_contiguous()
        assert items[0]["sequence"].permute(0, 2, 3, 1).is_contiguous()
        assert batch["sequence"].flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a CUDA device")
def test_pinned_batches_and_those_on_a_gpu_keep_their_layout_in_memory(cohort):
    dataset = make(cohort)
    for batch in DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=collate, pin_memory=True):
        pixels = batch["sequence"]
        assert pixels.is_pinned()
        assert pixels.permute(0, 1, 3, 4, 2).is_contiguous()
        assert pixels.to("cuda", non_blocking=True).stride() == pixels.stride()


def test_a_dataset_sent_to_a_worker_gives_the_same_items(cohort):
    dataset = make(cohort, augment=ALWAYS, seed=2)
    sent = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(sent[3, 5]["sequence"], dataset[3, 5]["sequence"])


def test_files_are_only_read(cohort):
    paths = sorted(cohort.packed.iterdir())
    before = [path.read_bytes() for path in paths]
    for augment in (None, AugmentConfig(**OFF), ALWAYS):
        item = make(cohort, augment=augment)[0]["sequence"]
        item += 1
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.skipif(not MAPS.is_file(), reason="the system does not list its mapped files")
def test_files_are_held_no_longer_than_an_item_is_made(cohort):
    file = sequence_path(cohort.packed, cohort.samples["train"][UID].iloc[0], "C1")
    mapped = open_sequence(file)
    assert str(file) in MAPS.read_text()
    del mapped
    for augment in (None, AugmentConfig(**OFF), ALWAYS):
        dataset = make(cohort, augment=augment)
        _batch = dataset.__getitems__([0, 1, 2]), dataset.slice_at(0, 1)
        assert str(cohort.packed) not in MAPS.read_text()


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
    orders = [
        epoch_order(labels, LEVELS[:50], "shuffle", seed=5, epoch=epoch).tolist() for epoch in (0, 1, 0)
    ]
    assert sorted(orders[0]) == list(range(50))
    assert orders[0] == orders[2] != orders[1]
    assert epoch_order(labels, LEVELS[:50], "shuffle", seed=6, epoch=0).tolist() != orders[0]
    assert orders[0] != list(range(50))


def test_balanced_sampling_draws_both_classes_equally_often():
    labels = np.zeros(1000, dtype=int)
    labels[:40] = 1
    drawn = epoch_order(labels, LEVELS[:1000], "balanced", seed=2, epoch=0)
    assert len(drawn) == 1000
    assert 0.45 < labels[drawn].mean() < 0.55
    assert len(set(drawn)) < 1000  # with replacement
    for other in ({"seed": 2, "epoch": 1}, {"seed": 3, "epoch": 0}):
        assert not np.array_equal(drawn, epoch_order(labels, LEVELS[:1000], "balanced", **other))
    numbers = np.bincount(
        np.concatenate([epoch_order(labels, LEVELS[:1000], "balanced", seed=2, epoch=e) for e in range(40)])
    )
    assert len(numbers) == 1000  # each sample has its turn, as often as the others of its class
    assert numbers[:40].std() / numbers[:40].mean() < 0.1
    assert 12 < numbers[40:].var() < 30  # Poisson: 40 · 500 / 960 = 20.8


def test_weighted_sampling_draws_both_classes_of_each_vertebra_equally_often_as_torch_does():
    rng = np.random.default_rng(0)
    labels, levels = (rng.random(700) < 0.1 * (1 + LEVELS[:700])).astype(int), LEVELS[:700]
    groups = 2 * levels + labels
    weights = 1 / np.bincount(groups)[groups]  # as in every recipe for a WeightedRandomSampler
    np.testing.assert_allclose(draw_probabilities(labels, levels, "weighted"), weights / weights.sum())
    drawn = np.concatenate([epoch_order(labels, levels, "weighted", seed=2, epoch=e) for e in range(30)])
    sampler = WeightedRandomSampler(weights.tolist(), 21_000, generator=torch.Generator().manual_seed(0))
    for found in (drawn, np.fromiter(sampler, int)):
        np.testing.assert_allclose(np.bincount(groups[found]), 1500, rtol=0.1)
    assert not np.array_equal(drawn[:700], drawn[700:1400])


def test_sampling_that_cannot_be_is_refused_when_the_loader_is_made(cohort):
    dataset = make(cohort)
    with pytest.raises(ValueError, match="shuffle, balanced, weighted; found 'all'"):
        make_loader(dataset, batch_size=4, sampling="all")
    for label, missing in enumerate(("fractured", "intact")):
        dataset.labels = np.full(42, label)
        with pytest.raises(ValueError, match=f"found none that are {missing} among 42. Use"):
            make_loader(dataset, batch_size=4, sampling="balanced")
    dataset.labels = ((np.arange(42) < 21) & ~np.isin(dataset.vertebrae, (1, 6))).astype(int)
    with pytest.raises(
        ValueError, match="of every vertebra; found none that are fractured of C2, fractured of C7"
    ):
        make_loader(dataset, batch_size=4, sampling="weighted")


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
    given = [[len(batch) for batch in share] for share in shares]
    steps = np.sum(given, axis=0).reshape(-1, accumulate).sum(axis=1)
    assert all(share.step_sizes == steps.tolist() for share in shares)


def test_the_batches_of_a_step_are_the_same_accumulated_or_shared():
    order = np.arange(50)
    accumulated = steps_of(order, batch_size=4, accumulate=2)
    shared = steps_of(order, batch_size=4, processes=2)
    for one, other in zip(accumulated, shared, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_the_batches_of_all_steps_follow_the_order():
    order = np.random.default_rng(3).permutation(50)
    dealt = [batch for step in steps_of(order, batch_size=4, accumulate=2, processes=3) for batch in step]
    np.testing.assert_array_equal(np.concatenate(dealt), order)
    assert len(dealt) == 3 * 2 * 3
    assert [len(step) for step in steps_of(order, batch_size=50)] == [
        1
    ]  # one batch alone, unless asked for more


@pytest.mark.parametrize(("accumulate", "processes"), [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.97, 1.0])
def test_grouped_batches_hold_one_group_and_every_epoch_has_as_many(accumulate, processes, share):
    rng, sizes = np.random.default_rng(0), {"accumulate": accumulate, "processes": processes}
    groups = (np.arange(400) < share * 400).astype(int)
    groups[[0, -1]] = 1, 0  # both are there, whichever are drawn
    numbers = set()
    for _ in range(20):
        order = rng.choice(400, size=101, replace=False)
        steps = grouped_steps(order, groups, batch_size=8, **sizes)
        numbers.add(len(steps))
        batches = [batch for step in steps for batch in step]
        assert {len(step) for step in steps} == {accumulate * processes}
        assert sorted(np.concatenate(batches)) == sorted(order)
        assert all(len(set(groups[batch])) == 1 for batch in batches)
        assert max(map(len, batches)) <= 8
        assert min(map(len, batches)) >= 1
        for batch in batches:  # in the order that was drawn
            assert (np.diff([np.flatnonzero(order == index)[0] for index in batch]) > 0).all()
    assert len(numbers) == 1
    if share == 0.3:  # the groups take turns
        kinds = [groups[batch[0]] for batch in batches]
        assert 1 in kinds[: len(kinds) // 2]
        assert 1 in kinds[len(kinds) // 2 :]


def test_too_few_samples_for_the_groups_batches_are_refused():
    groups = np.array([0, 1, 2, 2])
    with pytest.raises(ValueError, match=r"3 samples of 3 groups cannot fill 2 batches, each of one group"):
        grouped_steps(np.arange(3), groups, batch_size=8, accumulate=2)
    with pytest.raises(ValueError, match=r"3 samples cannot fill the 4 batches .*Use fewer processes"):
        grouped_steps(np.arange(3), groups, batch_size=8, accumulate=4)


@pytest.mark.parametrize("sampling", ["shuffle", "balanced", "weighted"])
def test_training_deals_the_seeds_order_out_to_the_processes_of_each_step(cohort, sampling):
    dataset = make(cohort)
    options = {"batch_size": 4, "sampling": sampling, "seed": 9}
    order = epoch_order(dataset.labels, dataset.vertebrae, sampling, seed=9, epoch=2)
    steps = steps_of(order, batch_size=4, accumulate=2, processes=3)
    for process in range(3):
        loader = make_loader(dataset, accumulate=2, process=process, processes=3, **options)
        loader.batch_sampler.set_epoch(2)
        found = [batch["index"].tolist() for batch in loader]
        assert found == [batch.tolist() for step in steps for batch in step[process::3]]
        assert loader.batch_sampler.accumulate == 2
        assert loader.batch_sampler.epoch == 2
    (alone,) = {tuple(map(len, make_loader(dataset, **options).batch_sampler)) for _ in range(2)}
    assert sum(alone) == len(dataset)


class Threads(Dataset):
    """Tells how many threads OpenCV may use where the item is made."""

    def __getitem__(self, key):
        return cv2.getNumThreads()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize(
    ("asked", "cores", "processes", "used"),
    [(0, 8, None, 0), (5, 8, None, 5), (5, 3, None, 3), (5, 8, 4, 2), (1, 8, 4, 1), (5, 1, 4, 1)],
)
def test_there_are_no_more_workers_than_cores_for_each_process_here(
    monkeypatch, asked, cores, processes, used
):
    monkeypatch.setattr(batches_module, "_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    loader = load_batches(Threads(), [[0]], workers=asked, seed=0)
    assert (loader.num_workers, loader.persistent_workers) == (used, used > 0)
    assert loader.pin_memory == torch.cuda.is_available()


def test_a_worker_has_one_thread(monkeypatch):
    monkeypatch.setattr(batches_module, "_cores", lambda: 1)
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        assert list(load_batches(Threads(), [[0]], workers=1, seed=0, collate_fn=list)) == [[1]]
        assert list(load_batches(Threads(), [[0]], workers=0, seed=0, collate_fn=list)) == [[3]]
    finally:
        cv2.setNumThreads(before)


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    assert batches_module._cores() == 3
    monkeypatch.delattr("os.sched_getaffinity")
    for count, found in ((6, 6), (None, 1)):
        monkeypatch.setattr("os.cpu_count", lambda count=count: count)
        assert batches_module._cores() == found


def test_too_few_samples_for_the_processes_are_refused():
    with pytest.raises(ValueError, match=r"5 samples cannot fill the 6 batches .*Use fewer processes"):
        steps_of(np.arange(5), batch_size=8, accumulate=2, processes=3)
    assert len(steps_of(np.arange(6), batch_size=8, accumulate=2, processes=3)) == 1


def test_evaluation_deals_out_the_same_batches_whatever_the_processes(cohort):
    dataset = make(cohort)
    alone = [batch["index"].tolist() for batch in make_loader(dataset, batch_size=8)]
    dealt = [
        [batch["index"].tolist() for batch in make_loader(dataset, batch_size=8, process=p, processes=3)]
        for p in range(3)
    ]
    assert sorted(alone) == sorted(batch for share in dealt for batch in share)
    assert sum(alone, []) == list(range(42))  # noqa: RUF017  # a short list


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": -3}, {"batch_size": 1, "workers": -1}])
def test_a_batch_without_a_sequence_or_fewer_workers_than_none_are_refused(wrong):
    with pytest.raises(ValueError, match=r"A batch holds 1 sequence or more, and 0 workers or more load it"):
        make_loader([], **wrong)


def test_contents_of_batches_are_those_that_the_loader_hands_out(cohort):
    dataset = make(cohort, manifest=cohort.manifest)
    dataset.slice_truth[dataset.labels == 1] = np.nan  # of fractured ones nothing is known, but of the first
    dataset.slice_truth[np.flatnonzero(dataset.labels == 1)[0]] = [0, 1, 1, 0, 0][: dataset.slices]
    options = {"batch_size": 4, "sampling": "balanced", "seed": 3, "accumulate": 2}
    loader = make_loader(dataset, **options)
    loader.batch_sampler.set_epoch(2)
    found = batch_contents(dataset, epoch=2, **options)
    for (_, row), batch in zip(found.iterrows(), loader, strict=True):
        truth = batch["slice_truth"]
        counts = [
            len(truth),
            batch["label"].sum(),
            (truth == 0).sum(),
            (truth == 1).sum(),
            truth.isnan().sum(),
        ]
        assert row.tolist() == [int(count) for count in counts]
    assert found["unknown"].sum() > 0
    assert found["known_fractured"].sum() > 0
