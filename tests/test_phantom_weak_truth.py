"""A cohort that is known as RSNA 2022 is known: `CohortConfig.truth = "rsna"`."""

import json
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest

from cspine_helpers import labels, packed
from cspine_helpers.ct.masks import LabelMap, find_vertebrae
from cspine_helpers.labels import PATIENT, UID, VERTEBRAE
from cspine_helpers.packing.cohort import pack_cohort
from cspine_helpers.packing.crop import PackConfig
from cspine_helpers.phantom import cohort as phantom
from cspine_helpers.phantom.cohort import CohortConfig, draw_labels, true_labels
from cspine_helpers.phantom.rendering import generator, render_study
from cspine_helpers.phantom.scanner import export_cohort
from cspine_helpers.phantom.weak_truth import WeakTruth, framed, has_boxes, segmented, wrong_labels

PACK = PackConfig(slices=9, size=32)
FULL = CohortConfig(
    studies=3, seed=833, pack=PACK
)  # fractured with boxes, fractured with a wrong label, intact
WEAK = replace(FULL, truth="rsna")
EXACT = WeakTruth(failed_masks=0, border_mm=(0, 0), ragged_mm=0, shift_voxels=0)
NAMES = list(VERTEBRAE)


@pytest.fixture(scope="module")
def study():
    return render_study(5, 1, dict.fromkeys(VERTEBRAE, 0) | {"C4": 1})


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "weak"
    phantom.make_cohort(folder, WEAK, workers=1)
    return folder


def dice(one: np.ndarray, other: np.ndarray) -> list[float]:
    pairs = [(one == n, other == n) for n in range(1, 8)]
    return [2 * np.count_nonzero(a & b) / (a.sum() + b.sum()) for a, b in pairs]


def test_boxes_are_as_common_as_in_rsna_at_each_number_of_fractures():
    """The counts are those of RSNA's own tables; 235 of its 2,019 studies have boxes."""
    with_boxes, all_of = [103, 70, 34, 21, 6, 1], [623, 239, 64, 26, 7, 2]
    expected = sum(all_of[n - 1] * WeakTruth().boxed[min(n, 5) - 1] for n in range(1, 7))
    assert expected == pytest.approx(sum(with_boxes)) == pytest.approx(235)
    for count in range(8):
        its = {level: int(i < count) for i, level in enumerate(VERTEBRAE)}
        drawn = np.mean([has_boxes(its, WeakTruth(), np.random.default_rng(i)) for i in range(1500)])
        share = 0 if count == 0 else WeakTruth().boxed[min(count, 5) - 1]
        assert drawn == pytest.approx(share, abs=0.05)


def test_one_label_in_a_hundred_is_the_other_one():
    its = dict(zip(VERTEBRAE, (0, 1, 0, 0, 1, 0, 1), strict=True))
    rows = [wrong_labels(its, WeakTruth(), np.random.default_rng(i)) for i in range(3000)]
    wrong = pd.DataFrame(rows)[NAMES] != pd.Series(its)[NAMES]
    assert wrong.to_numpy().mean() == pytest.approx(0.01, abs=0.003)
    assert wrong.any().all()


@pytest.mark.slow
def test_true_labels_are_those_of_full_truth_and_few_of_the_table_differ():
    full, weak = (CohortConfig(studies=600, seed=3, truth=truth) for truth in ("full", "rsna"))
    pd.testing.assert_frame_equal(true_labels(weak), draw_labels(full))
    pd.testing.assert_frame_equal(true_labels(full), draw_labels(full))
    table = labels.validate_labels(draw_labels(weak))
    differ = (table != true_labels(weak))[NAMES].to_numpy()
    assert differ.mean() == pytest.approx(0.01, abs=0.005)
    assert (table[PATIENT] != true_labels(weak)[PATIENT]).any()
    boxed = [patient.is_boxed for patient in phantom._patients(weak)]
    assert np.mean(boxed) == pytest.approx(235 / 2019, abs=0.04)
    assert (table[PATIENT][boxed] == 1).all()


def test_a_mask_without_errors_is_the_true_one(study):
    np.testing.assert_array_equal(segmented(study, EXACT, np.random.default_rng(0)), study.label_map)


@pytest.mark.slow
def test_masks_have_the_errors_of_a_segmenter_one_by_one(study):
    rng, true = np.random.default_rng, study.label_map
    moved = segmented(study, replace(EXACT, shift_voxels=1.0), rng(1))
    for number in range(1, 8):
        ends = np.array([np.argwhere(one == number).mean(axis=0) for one in (true, moved)])
        assert np.abs(ends[1] - ends[0]).max() < 3.5
    assert min(dice(moved, true)) < 0.9
    large, small = (segmented(study, replace(EXACT, border_mm=(mm, 0)), rng(1)) for mm in (0.8, -0.8))
    inner = true == 3
    assert (small[inner] == 3).mean() < 0.9
    assert (large[inner] > 0).all()  # where vertebrae meet, the upper one keeps the voxel
    assert np.count_nonzero(large == 3) > 1.15 * np.count_nonzero(inner)
    ragged = segmented(study, replace(EXACT, ragged_mm=0.8), rng(1))
    assert 0.85 < np.mean(dice(ragged, true)) < 0.98
    changed = ragged != true
    assert (changed & (true > 0)).any() and (changed & (true == 0)).any()  # noqa: PT018


@pytest.mark.slow
def test_a_failed_mask_is_cut_and_its_part_lost_or_its_neighbours(study):
    failing = replace(EXACT, failed_masks=1.0)
    true, lost, taken = study.label_map, 0, 0
    for seed in range(3):
        found = segmented(study, failing, np.random.default_rng(seed))
        for number in range(1, 8):
            now = found[true == number]
            assert 0.05 < (now == number).mean() < 0.8
            others = {*np.unique(now)} - {number}
            assert others <= {0, max(number - 2, 1), number - 1, number + 1, min(number + 2, 7)}
            lost, taken = lost + (0 in others), taken + bool(others - {0})
    assert min(lost, taken) >= 5


@pytest.mark.slow
def test_packing_takes_every_vertebra_of_such_masks(study):
    """It refuses those of which less than a cubic centimetre is left, and labels out of order."""
    box = tuple((0, n) for n in study.label_map.shape)
    for seed in range(3):
        found = segmented(study, replace(WeakTruth(), failed_masks=0.5), np.random.default_rng(seed))
        vertebrae = find_vertebrae(LabelMap(found, box, box), framed(study))
        assert [*vertebrae] == NAMES
        assert not any(its.problem for its in vertebrae.values())


@pytest.mark.slow
def test_masks_agree_with_the_truth_as_those_of_segmenters_do():
    scores = []
    for index in range(3):
        study = render_study(9, index, dict.fromkeys(VERTEBRAE, 0))
        scores += dice(segmented(study, WeakTruth(), generator(9, index, 3)), study.label_map)
    assert 0.78 < np.median(scores) < 0.92


@pytest.mark.slow
def test_the_cohort_knows_what_rsnas_tables_know(weak):
    table, manifest = labels.read_labels(weak / "train.csv"), packed.read_manifest(weak / "packed")
    boxes = labels.read_boxes(weak / "train_bounding_boxes.csv")
    packed.check_sequences(weak / "packed", labels.expand(table, table[UID]), slices=9, size=32)
    assert [*boxes[UID].unique()] == [table[UID][0]]
    assert table[PATIENT].tolist() == [1, 1, 0]
    rows = manifest.merge(labels.expand(table, table[UID]), on=[UID, "vertebra"])
    assert (rows["slice_truth"][rows["label"] == 0] == "." * 9).all()
    fractured = rows[rows["label"] == 1]
    is_known = fractured[UID] == table[UID][0]
    assert fractured["slice_truth"][is_known].str.contains("x").all()
    assert fractured["slice_truth"][~is_known].isna().all()
    record = json.loads((weak / "cohort.json").read_text())
    assert record["config"]["truth"] == "rsna"
    assert record["weak_truth"] == json.loads(json.dumps(asdict(WeakTruth())))


@pytest.mark.slow
def test_the_pixels_are_those_of_full_truth_and_what_is_true_is_asked_of_the_phantom(weak):
    uid = labels.read_labels(weak / "train.csv")[UID][0]
    known = phantom.study_of(weak, uid)
    full = render_study(FULL.seed, 0, true_labels(WEAK).loc[0, NAMES].to_dict())
    np.testing.assert_array_equal(known.volume_hu, full.volume_hu)
    np.testing.assert_array_equal(known.fracture_map, full.fracture_map)
    assert 0.6 < np.mean(dice(known.label_map, full.label_map)) < 0.95
    truth = phantom.true_slice_truth(weak, [uid], workers=1)
    assert truth["vertebra"].tolist() == NAMES
    true = true_labels(WEAK).loc[0, NAMES].to_numpy() == 1
    assert (truth["slice_truth"].str.contains("x") <= true).all()
    manifest = packed.read_manifest(weak / "packed")
    boxed = manifest[manifest[UID] == uid].reset_index(drop=True)
    both = boxed["slice_truth"].notna() & true
    agree = [a == b for one, other in zip(boxed["slice_truth"][both], truth["slice_truth"][both], strict=True)
             for a, b in zip(one, other, strict=True)]  # fmt: skip
    assert np.mean(agree) > 0.8


@pytest.mark.slow
def test_a_single_process_makes_what_two_make(weak, tmp_path):
    phantom.make_cohort(tmp_path / "weak", WEAK, workers=2)
    for path in weak.rglob("*.*"):
        assert (tmp_path / "weak" / path.relative_to(weak)).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_slice_truth_and_masks_are_those_of_packing_its_scans(weak, tmp_path):
    """The cohort's own code against CT and mask files, packed as those of RSNA 2022 are."""
    uid = labels.read_labels(weak / "train.csv")[UID][0]
    export_cohort(weak, tmp_path / "ct", [uid])
    config = replace(PACK, window_hu=phantom.study_of(weak, uid).window_hu)
    pack_cohort(tmp_path / "ct", config=config, workers=1)
    ours, theirs = (packed.read_manifest(folder / "packed") for folder in (weak, tmp_path / "ct"))
    ours = ours[ours[UID] == uid].reset_index(drop=True)
    assert theirs["vertebra"].tolist() == NAMES
    assert theirs["slice_truth"].tolist() == ours["slice_truth"].tolist()
    for level in VERTEBRAE:
        pair = (
            np.load(packed.sequence_path(folder / "packed", uid, level)) for folder in (weak, tmp_path / "ct")
        )
        mine, its = (array[..., packed.MASK] for array in pair)
        np.testing.assert_array_equal(mine, its)


def test_an_unknown_truth_is_refused():
    with pytest.raises(ValueError, match="truth is one of full, rsna; found 'none'"):
        CohortConfig(studies=1, seed=1, truth="none")
