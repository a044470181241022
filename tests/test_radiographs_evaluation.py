import json

import numpy as np
import pandas as pd
import pytest
from conftest import REAL_DATA
from PIL import Image, ImageOps
from radiograph_folders import radiograph_cohort
from scipy.special import expit
from sklearn import metrics as sk

from cspine_helpers.evaluation.intervals import bootstrap
from cspine_helpers.evaluation.resampling import effective_cases, patient_weights, score_interval
from cspine_helpers.files.tables import write_table
from cspine_helpers.labels import UID
from cspine_helpers.predictions import validate_predictions
from cspine_helpers.radiographs import evaluation
from cspine_helpers.radiographs.annotations import rasterise
from cspine_helpers.radiographs.evaluation import (
    ablation,
    compare,
    evaluate,
    examples,
    froc,
    shortcut,
    study_metrics,
    study_scores,
    subgroups,
)
from cspine_helpers.radiographs.image_table import read_images, read_regions
from cspine_helpers.radiographs.mask_cases import (
    MaskCases,
    dice,
    dice_pos,
    judged_images,
    resized,
)

FRACATLAS = REAL_DATA / "fracatlas"
SHAPE = (40, 30)


def square(top, left, size, shape=SHAPE):
    mask = np.zeros(shape, dtype=bool)
    mask[top : top + size, left : left + size] = True
    return mask


def images(labels, probabilities=None, patients=None, **columns):
    names = [f"i{number}" for number in range(len(labels))]
    table = pd.DataFrame({"image": names, "patient": patients or names, "label": labels})
    return table.assign(probability=0.5 if probabilities is None else probabilities, **columns)


def made(seed=0, many=120, skill=1.0):
    """Images in groups, a lesion or two where fractured, marks that find some; the seed leaves the truth."""
    truth_rng, rng = np.random.default_rng(7), np.random.default_rng(seed)
    truth, predicted, rows = {}, {}, []
    for number in range(many):
        name, label = f"i{number}", int(truth_rng.random() < 0.4)
        lesions = [square(*truth_rng.integers(0, 20, 2), 8) for _ in range(truth_rng.integers(1, 3))]
        truth[name] = lesions if label else []
        probability = np.zeros(SHAPE)
        for lesion in truth[name]:
            if rng.random() < 0.6:
                shifted = np.roll(lesion, rng.integers(-3, 4, 2), (0, 1))
                probability[shifted] = rng.uniform(0.5, 1)
        for _ in range(rng.poisson(0.5)):
            probability[square(*rng.integers(0, 28, 2), 3)] = rng.uniform(0.5, 0.9)
        predicted[name] = probability
        score = expit(rng.normal(skill * (2 * label - 1)))
        metal = int(truth_rng.random() < (0.4 if label else 0.05))
        view = ("frontal", "lateral", "frontal+lateral", "")[truth_rng.integers(4)]
        rows.append((name, f"p{number // (1 + number % 3)}", label, score, "hand", view, metal))
    names = ["image", "patient", "label", "probability", "part", "view", "hardware"]
    return pd.DataFrame(rows, columns=names), truth, predicted


@pytest.fixture(scope="module")
def cases():
    table, truth, predicted = made()
    return MaskCases.of(table, truth=truth, predicted=predicted)


@pytest.fixture(scope="module")
def other():
    table, truth, predicted = made(seed=1, skill=0.3)
    return MaskCases.of(table, truth=truth, predicted=predicted)


# ------------------------------------------------------------------------------------------------- Dice
@pytest.mark.parametrize(
    ("truth", "predicted", "expected"),
    [
        ([[1, 1, 0, 0]], [[1, 0, 1, 0]], (2 * 1 + 1e-6) / (2 + 2 + 1e-6)),
        ([[0, 0]], [[0, 0]], 1.0),
        ([[1, 1, 1]], [[0, 0, 0]], 1e-6 / (3 + 1e-6)),
        ([[1, 1, 0]], [[0.2, 0.3, 0.3]], (2 * 1 + 1e-6) / (2 + 2 + 1e-6)),  # at the threshold is in the mask
    ],
)
def test_dice_is_the_benchmarks_worked_by_hand(truth, predicted, expected):
    assert dice(truth, predicted, threshold=0.3) == pytest.approx(expected, rel=1e-12)


def test_dice_pos_is_the_mean_over_images_with_a_true_pixel():
    truth = [[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]]]
    predicted = [[[0.9, 0.1, 0.1, 0.1]], [[0.9, 0.9, 0.9, 0.9]], [[0.1, 0.9, 0.1, 0.1]]]
    assert dice_pos(truth, predicted) == pytest.approx((2 / 3 + 0) / 2, abs=1e-6)
    with pytest.raises(ValueError, match="No image has a fracture outlined"):
        dice_pos([[[0]]], [[[0.9]]])


@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        ([[1, 0]], "differ in shape"),
        ([[0, 255, 0]], "Divide by 255"),
        ([[np.nan, 0.1, 0.2]], "neither 0/1 nor probabilities"),
        ([-1.5, 0.2, 3.0], r"array \(H, W\)"),
        (np.zeros((0, 3)), r"array \(H, W\)"),
    ],
)
def test_masks_that_are_none_are_refused(predicted, message):
    with pytest.raises(ValueError, match=message):
        dice([[1, 0, 0]], predicted)


@pytest.mark.parametrize("frame", [(384, 384), (17, 50), (40, 30)])
def test_masks_are_resized_as_pillow_does_by_the_nearest_pixel(frame):
    mask = (np.random.default_rng(0).random((97, 61)) < 0.5).astype(np.uint8)
    theirs = Image.fromarray(mask).resize(frame[::-1], Image.Resampling.NEAREST)
    np.testing.assert_array_equal(resized(mask, *frame), np.asarray(theirs))


def test_dice_at_the_frame_and_at_native_pixels_are_both_kept():
    truth, predicted = square(0, 0, 20), square(0, 10, 20)
    found = MaskCases.of(images([1]), truth={"i0": truth}, predicted={"i0": predicted}, frame=(4, 6)).images
    assert found["dice"][0] == pytest.approx(dice(truth, predicted))
    small = [resized(mask, 4, 6) for mask in (truth, predicted)]
    assert found["dice_frame"][0] == pytest.approx(dice(*small))
    assert found["true_frame"][0] == small[0].sum()


# --------------------------------------------------------------------------------------- lesions and marks
def test_rules_of_a_hit_differ_where_they_should():
    lesion = square(0, 0, 10)
    marks = {"i0": square(8, 8, 10)}  # 4 pixels in common of 196; centre outside
    hit = {
        rule: MaskCases.of(images([1]), truth={"i0": lesion}, predicted=marks, rule=rule)
        for rule in ("iou", "overlap", "centre")
    }
    assert {rule: int(found.images["lesions_hit"][0]) for rule, found in hit.items()} == {
        "iou": 0,
        "overlap": 1,
        "centre": 0,
    }
    assert {rule: int(found.images["false_marks"][0]) for rule, found in hit.items()} == {
        "iou": 1,
        "overlap": 0,
        "centre": 1,
    }
    small = MaskCases.of(images([1]), truth={"i0": lesion}, predicted={"i0": square(4, 4, 2)}, rule="centre")
    assert small.images["lesions_hit"][0] == 1  # in the lesion, with an intersection over union of 0.04
    exact = {"truth": {"i0": lesion}, "predicted": {"i0": square(0, 0, 5)}}  # 25 of 100
    assert MaskCases.of(images([1]), **exact, least_iou=0.25).images["lesions_hit"][0] == 1
    assert MaskCases.of(images([1]), **exact, least_iou=0.26).images["lesions_hit"][0] == 0
    with pytest.raises(ValueError, match="Unknown rule 'any'"):
        MaskCases.of(images([1]), **exact, rule="any")


def test_lesions_are_those_given_or_components_that_may_touch_by_corners():
    touching = square(0, 0, 4) | square(4, 4, 4)
    as_mask = MaskCases.of(images([1]), truth={"i0": touching}, predicted={"i0": touching})
    as_list = MaskCases.of(
        images([1]), truth={"i0": [square(0, 0, 4), square(4, 4, 4)]}, predicted={"i0": touching}
    )
    assert as_mask.images["lesions"][0] == 1
    assert as_list.images[["lesions", "lesions_hit", "marks", "false_marks"]].iloc[0].tolist() == [2, 2, 1, 0]
    assert as_list.lesions["area"].tolist() == [16, 16]


def test_polygons_are_lesions_and_their_union_is_the_truth():
    left, right = [(2, 3), (12, 3), (12, 13), (2, 13)], [(7, 3), (17, 3), (17, 13), (7, 13)]  # 50 in common
    marks = {"i0": square(3, 2, 10)}
    cases = MaskCases.of(images([1]), truth={"i0": [np.array(left), np.array(right)]}, predicted=marks)
    assert cases.lesions["area"].tolist() == [100, 100]
    assert cases.images[["true", "overlap", "lesions_hit"]].iloc[0].tolist() == [150, 100, 2]
    assert np.isfinite(cases.lesions["score"]).all()


def test_predictions_meet_the_image_table_by_image():
    predictions = pd.DataFrame({"StudyInstanceUID": ["b", "a", "c"], "split": ["test", "test", "train"]})
    predictions = predictions.assign(vertebra="image", label=[1, 0, 0], probability=[0.9, 0.1, 0.2])
    table = pd.DataFrame({"image": ["a", "b", "c"], "patient": ["p", "q", "r"], "label": [0, 1, 0]})
    table = table.assign(part=["hand", "leg", "hip"], hardware=[0, 1, np.nan])
    found = judged_images(predictions, table, split="test")
    assert found["image"].tolist() == ["b", "a"]
    assert found[["patient", "part", "hardware"]].to_numpy().tolist() == [["q", "leg", 1], ["p", "hand", 0]]
    assert judged_images(predictions.assign(patient="x"), table, split="test")["patient"].unique() == ["x"]
    with pytest.raises(ValueError, match="no image of the split 'validation'; found 'test', 'train'"):
        judged_images(predictions, table, split="validation")
    with pytest.raises(ValueError, match="1 predicted images are not in the image table: 'b'"):
        judged_images(predictions, table[table["image"] != "b"], split="test")
    with pytest.raises(ValueError, match="1 images are labelled otherwise in the image table: 'a'"):
        judged_images(predictions.assign(label=1), table, split="test")


def test_two_marks_on_one_lesion_are_one_hit_with_the_better_score_and_no_false_mark():
    probability = square(0, 0, 5) * 0.6 + square(0, 7, 5) * 0.8 + square(30, 20, 4) * 0.7
    cases = MaskCases.of(images([1]), truth={"i0": square(0, 0, 12)}, predicted={"i0": probability})
    assert cases.images[["lesions_hit", "marks", "false_marks"]].iloc[0].tolist() == [1, 3, 1]
    assert cases.lesions["score"].tolist() == [0.8]
    assert sorted(zip(cases.marks["score"], cases.marks["false"], strict=True)) == [
        (0.6, 0),
        (0.7, 1),
        (0.8, 0),
    ]


def test_a_mark_of_a_mask_without_probabilities_has_the_images_score():
    cases = MaskCases.of(images([0], [0.37]), truth={}, predicted={"i0": square(0, 0, 3).astype(np.uint8)})
    assert cases.marks[["score", "false", "area"]].iloc[0].tolist() == [0.37, 1, 9]


def test_metrics_are_counted_by_hand_on_three_images():
    truth = {"i0": square(0, 0, 10), "i1": square(0, 0, 10)}
    predicted = {"i0": square(0, 5, 10), "i1": square(30, 20, 5), "i2": square(10, 10, 3)}
    cases = MaskCases.of(images([1, 1, 0]), truth=truth, predicted=predicted)
    found = evaluate(cases, threshold=0.5, keep_undefined=True).set_index("metric")
    value = {
        "dice_pos": (0.5 + 0) / 2,
        "dice": (0.5 + 0 + 0) / 3,
        "pixel_precision": 50 / (100 + 25 + 9),
        "pixel_recall": 50 / 200,
        "lesion_recall": 1 / 2,
        "false_marks": 2 / 3,
        "missed_whole": 1 / 2,
        "intact_marked": 1.0,
    }
    assert found["value"][[*value]].to_dict() == pytest.approx(value, abs=1e-6)
    n = {"dice_pos": 2, "dice": 3, "pixel_precision": 134, "pixel_recall": 200, "lesion_recall": 2}
    n |= {"false_marks": 3, "missed_whole": 2, "intact_marked": 1, "recall": 2, "specificity": 1, "auroc": 3}
    assert found["n"][[*n]].to_dict() == n


def test_numbers_equal_those_of_a_slow_count_on_made_images(cases):
    table, truth, predicted = made()
    masks = {name: np.logical_or.reduce([np.zeros(SHAPE, bool), *truth[name]]) for name in table["image"]}
    found = evaluate(cases, threshold=0.5, resamples=50).set_index("metric")["value"]
    p = {name: predicted[name] >= 0.5 for name in masks}
    both = sum((masks[name] & p[name]).sum() for name in masks)
    assert found["pixel_precision"] == pytest.approx(both / sum(each.sum() for each in p.values()))
    assert found["pixel_recall"] == pytest.approx(both / sum(each.sum() for each in masks.values()))
    assert found["dice_pos"] == pytest.approx(dice_pos(masks.values(), p.values()))
    small = [[resized(each[name], 384, 384) for name in masks] for each in (masks, predicted)]
    assert found["dice_pos_frame"] == pytest.approx(dice_pos(*small))
    missed = [not (masks[name] & p[name]).any() for name in masks if masks[name].any()]
    assert found["missed_whole"] == pytest.approx(np.mean(missed))
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(table["label"], table["probability"]))
    ap = sk.average_precision_score(table["label"], table["probability"])
    assert found["average_precision"] == pytest.approx(ap)


# ----------------------------------------------------------------------------------------------- intervals
def test_every_number_has_an_interval_around_it_and_groups_of_images_are_what_is_resampled(cases):
    found = evaluate(cases, threshold=0.5, resamples=300)
    assert ((found["low"] < found["value"]) & (found["value"] < found["high"])).all()
    assert (found["groups"] <= cases.images["patient"].nunique()).all()
    ours = found.set_index("metric").loc["auroc", ["low", "high"]].tolist()
    theirs = bootstrap(cases.presence, threshold=0.5, resamples=300).set_index("metric")
    assert ours == theirs.loc["auroc", ["low", "high"]].tolist()


def test_images_of_one_patient_widen_intervals():
    table, truth, predicted = made(many=60)
    again = pd.concat([table.assign(image=table["image"] + suffix) for suffix in ("", "a", "b", "c")])
    fourfold = [
        {name + suffix: each[name] for name in each for suffix in ("", "a", "b", "c")}
        for each in (truth, predicted)
    ]
    apart = again.assign(patient=again["image"])
    widths = []
    for rows in (table, again, apart):
        cases = MaskCases.of(rows, truth=fourfold[0], predicted=fourfold[1])
        found = evaluate(cases, threshold=0.5, resamples=200).set_index("metric")
        widths.append((found["high"] - found["low"])[["dice_pos", "lesion_recall", "false_marks", "auroc"]])
    once, same, independent = widths
    assert (np.abs(same / once - 1) < 0.35).all()  # copies of the same patients teach nothing
    assert (independent < 0.7 * same).all()


def test_all_alike_gives_no_interval_of_no_width():
    many = 30
    truth = {f"i{n}": square(0, 0, 5) for n in range(many)}
    table = images([1] * many + [0] * many, [0.9] * many + [0.1] * many)
    predicted = truth | {f"i{n}": np.zeros(SHAPE, bool) for n in range(many, 2 * many)}
    found = evaluate(MaskCases.of(table, truth=truth, predicted=predicted), threshold=0.5, resamples=50)
    found = found.set_index("metric")
    for name in ("dice_pos", "lesion_recall", "pixel_precision", "pixel_recall", "dice"):
        assert found.loc[name, "high"] == 1
        assert 0.8 < found.loc[name, "low"] < 1
    assert found.loc["false_marks", ["value", "low"]].tolist() == [0, 0]
    assert found.loc["false_marks", "high"] == pytest.approx(-np.log(0.025) / (2 * many))
    assert found.loc["missed_whole", "value"] == 0
    assert 0 < found.loc["missed_whole", "high"] < 0.2


def test_undefined_numbers_are_refused_or_kept_as_such():
    table = images([1, 1, 0], [0.9, 0.8, 0.2])
    truth = {"i0": square(0, 0, 4), "i1": square(0, 0, 4)}
    empty = MaskCases.of(table, truth=truth, predicted=dict.fromkeys(table["image"], np.zeros(SHAPE, bool)))
    with pytest.raises(ValueError, match="pixel_precision of 0 predicted pixels"):
        evaluate(empty, threshold=0.5)
    kept = evaluate(empty, threshold=0.5, keep_undefined=True).set_index("metric")
    assert kept.loc["pixel_precision", ["value", "low", "high"]].isna().all()
    with pytest.raises(ValueError, match="auroc of 2 images"):
        evaluate(MaskCases.of(images([1, 1]), truth={}), threshold=0.5)
    with pytest.raises(ValueError, match="1 patient or group"):
        evaluate(MaskCases.of(images([1, 0], patients=["p", "p"]), truth={}), threshold=0.5)
    with pytest.raises(ValueError, match="confidence"):
        evaluate(empty, threshold=0.5, confidence=2)


# --------------------------------------------------------------------------------------------------- input
def test_bad_input_is_refused_in_one_sentence_that_names_it():
    one = {"truth": {"i0": square(0, 0, 4)}, "predicted": {"i0": square(0, 0, 4)}}
    with pytest.raises(ValueError, match="1 images have no predicted mask: 'i1'"):
        MaskCases.of(images([1, 0]), **one)
    with pytest.raises(ValueError, match="1 intact images have a lesion in the truth: 'i0'"):
        MaskCases.of(images([0]), **one)
    with pytest.raises(ValueError, match="1 fractured images have no lesion in the truth: 'i0'"):
        MaskCases.of(images([1]), truth={}, predicted=one["predicted"])
    with pytest.raises(ValueError, match="truth of i0 is of shape"):
        MaskCases.of(images([1]), truth=one["truth"], predicted={"i0": np.zeros((10, 10))})
    with pytest.raises(ValueError, match="1 images twice: 'i0'"):
        MaskCases.of(pd.concat([images([1])] * 2), **one)
    with pytest.raises(ValueError, match="no rows"):
        MaskCases.of(images([1]).iloc[:0], **one)
    with pytest.raises(ValueError, match="lacks the column"):
        MaskCases.of(images([1]).drop(columns="patient"), **one)
    with pytest.raises(ValueError, match="mixes the splits 'test', 'validation'"):
        MaskCases.of(images([1, 0], split=["test", "validation"]), truth={})
    for column, wrong, message in (
        ("patient", "", "rows whose patient is empty"),
        ("label", 2, "labels that are neither 0 nor 1"),
        ("probability", 1.5, r"probabilities that are no numbers in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskCases.of(images([1, 0]).assign(**{column: wrong}), truth={})
    with pytest.raises(ValueError, match="of i0 holds values from 0 to 255"):
        MaskCases.of(images([1]), truth=one["truth"], predicted={"i0": np.uint8(255) * square(0, 0, 4)})


# ---------------------------------------------------------------------------------------------------- FROC
def slow_froc(cases, weights, point):
    """Recall at the lowest score whose false marks an image are no more than the point, one by one."""
    weight = dict(zip(cases.population, weights, strict=True))
    image_weight = cases.images["patient"].map(weight)
    lesion_weight, mark_weight = cases.lesions["patient"].map(weight), cases.marks["patient"].map(weight)
    best = 0.0
    for score in [*cases.marks["score"], 2.0]:
        false = mark_weight[(cases.marks["score"] >= score) & (cases.marks["false"] == 1)].sum()
        if false / image_weight.sum() <= point:
            found = lesion_weight[cases.lesions["score"] >= score].sum() / lesion_weight.sum()
            best = max(best, found)
    return best


def test_the_froc_curve_is_that_of_a_slow_count_and_its_band_of_the_same_resamples(cases):
    at = [0.0, 0.1, 0.25, 5.0]
    found = froc(cases, at=at, resamples=200)
    ones = np.ones(len(cases.population))
    assert found["lesion_recall"].tolist() == pytest.approx([slow_froc(cases, ones, point) for point in at])
    assert found["reached"].tolist() == [1, 1, 1, 0]
    assert (np.diff(found["lesion_recall"]) >= 0).all()
    assert ((found["low"] < found["lesion_recall"]) & (found["lesion_recall"] < found["high"])).all()
    end = evaluate(cases, threshold=0.5, resamples=50).set_index("metric")["value"]["lesion_recall"]
    assert found["lesion_recall"].iloc[-1] == pytest.approx(end)
    weights = np.concatenate(list(patient_weights(len(ones), 25, 0, rows=len(cases))), axis=1)
    draws = np.array([slow_froc(cases, drawn, 0.25) for drawn in weights.T])
    few = froc(cases, at=[0.25], resamples=25)
    groups = cases.lesions["patient"].nunique()
    independent = effective_cases(few["lesion_recall"][0], draws, len(cases.lesions), groups)
    limits = score_interval(few["lesion_recall"][0], independent, freedom=groups - 1)
    assert few[["low", "high"]].iloc[0].tolist() == pytest.approx([float(each) for each in limits])


def test_froc_refuses_what_has_no_curve(cases):
    with pytest.raises(ValueError, match="needs predicted masks"):
        froc(MaskCases.of(images([1, 0]), truth={}))
    with pytest.raises(ValueError, match="0 or more; found -1"):
        froc(cases, at=[-1])


# ----------------------------------------------------------------------------------------------- subgroups
def test_subgroups_have_their_numbers_and_n_and_small_ones_are_flagged(cases):
    found = subgroups(cases, threshold=0.5, by=("part", "view", "hardware"), resamples=100)
    frontal = cases.images["view"].str.contains("frontal").to_numpy()
    rows = found[found["subgroup"] == "frontal"].set_index("metric")
    part = cases.where(frontal)
    whole = evaluate(part, threshold=0.5, resamples=100).set_index("metric")
    shown = rows["few"] == 0
    pd.testing.assert_series_equal(rows["value"], whole["value"])
    pd.testing.assert_series_equal(rows["low"][shown], whole["low"][shown])
    assert rows["images"].unique().tolist() == [frontal.sum()]
    assert rows["fractured"].unique().tolist() == [cases.images["label"][frontal].sum()]
    assert found["subgroup"].unique().tolist() == [
        "hand",
        "frontal",
        "lateral",
        "view not stated",
        "without hardware",
        "with hardware",
    ]
    metal = found[(found["subgroup"] == "with hardware")].set_index("metric")
    assert metal.loc["auroc", "few"] == 1  # nearly all are fractured
    assert metal.loc["auroc", ["low", "high"]].isna().all()
    assert metal.loc["recall", "few"] == 0
    with pytest.raises(ValueError, match="lacks the column"):
        subgroups(cases, threshold=0.5, by=["side"])


def test_any_column_makes_subgroups_and_flags_read_as_words():
    table = images([1, 1, 0, 0] * 3, np.tile([0.9, 0.4, 0.6, 0.1], 3)).assign(
        leaks=[0, 1] * 6, scanner=[*"AB"] * 6
    )
    cases = MaskCases.of(table, truth={})
    found = subgroups(cases, threshold=0.5, by=["leaks", "scanner"], resamples=20)
    assert found["subgroup"].unique().tolist() == ["without leaks", "with leaks", "A", "B"]
    part = found[(found["subgroup"] == "with leaks") & (found["metric"] == "recall")]
    assert part[["value", "n"]].to_numpy().tolist() == [[0, 3]]
    mixed = MaskCases.of(table.assign(leaks=["", 1, "0", 1] * 3), truth={})
    found = subgroups(mixed, threshold=0.5, by=["leaks"], resamples=20)
    assert found["subgroup"].unique().tolist() == ["without leaks", "with leaks", "leaks not stated"]
    with pytest.raises(ValueError, match="columns that are counted here: 'dice'"):
        MaskCases.of(table.assign(dice=1), truth={})


def test_a_subgroup_of_one_image_is_flagged_and_not_refused():
    table = images([1, 1, 0, 0], [0.9, 0.8, 0.2, 0.1], part=["hip", "leg", "leg", "leg"])
    found = subgroups(MaskCases.of(table, truth={}), threshold=0.5, by=["part"], resamples=20)
    hip = found[found["subgroup"] == "hip"].set_index("metric")
    assert np.isnan(hip.loc["auroc", "value"])
    assert hip.loc["recall", ["value", "n", "few"]].tolist() == [1, 1, 1]


# ------------------------------------------------------------------------------------------ the shortcut
def test_the_hardware_shortcut_is_measured_with_without_and_alone(cases):
    found = shortcut(cases, resamples=200).set_index("what")
    assert set(found["sign"]) == {"with hardware"}
    table = cases.images
    bare = table[table["hardware"] == 0]
    assert found["value"]["all images"] == pytest.approx(
        sk.roc_auc_score(table["label"], table["probability"])
    )
    assert found["value"]["without"] == pytest.approx(sk.roc_auc_score(bare["label"], bare["probability"]))
    assert found["value"]["alone"] == pytest.approx(sk.roc_auc_score(table["label"], table["hardware"]))
    change = found.loc["without − all"]
    assert change["value"] == pytest.approx(found["value"]["without"] - found["value"]["all images"])
    wide = found["high"] - found["low"]
    assert wide["without − all"] < 0.6 * wide["without"]  # the pair shares its images
    assert found["images"].tolist() == [len(table), len(bare), len(table), len(table)]


def test_images_whose_hardware_is_not_stated_are_left_out_of_the_shortcut():
    table = images([1, 0, 1, 0, 1], [0.9, 0.2, 0.4, 0.3, 0.8], hardware=[0, 0, 1, np.nan, np.nan])
    found = shortcut(MaskCases.of(table, truth={}), resamples=50)
    assert found["images"].tolist() == [3, 2, 3, 3]
    with pytest.raises(ValueError, match='0 of 5 images are "with hardware"'):
        shortcut(MaskCases.of(table.assign(hardware=0), truth={}))
    with pytest.raises(ValueError, match="lacks the column"):
        shortcut(MaskCases.of(table.drop(columns="hardware"), truth={}))
    with pytest.raises(ValueError, match="only where both classes occur"):
        shortcut(MaskCases.of(table.assign(label=[1, 1, 0, 0, 0]), truth={}))


def test_any_subgroup_may_be_the_sign_of_a_shortcut(cases):
    table = images([1, 0, 1, 0, 0], [0.9, 0.2, 0.4, 0.3, 0.8], part=["leg", "leg+hip", "hip", "leg", "leg"])
    found = shortcut(MaskCases.of(table, truth={}), by="part", resamples=50)
    assert set(found["sign"]) == {"hip"}  # the rarest
    assert found[["images", "fractured"]].to_numpy().tolist() == [[5, 2], [3, 1], [5, 2], [5, 2]]
    named = shortcut(cases, by="hardware", subgroup="without hardware", resamples=50).set_index("what")
    metal = cases.images[cases.images["hardware"] == 1]
    assert named.loc["without", ["images", "fractured"]].tolist() == [len(metal), metal["label"].sum()]
    alone = shortcut(cases, resamples=50).set_index("what").loc["alone", "value"]
    assert named.loc["alone", "value"] == pytest.approx(1 - alone)


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([454, 454, 512], ["up to 454 pixels", "up to 454 pixels", "over 454 pixels"]),
        ([512, 512, 300], ["512 pixels", "512 pixels", "under 512 pixels"]),
        ([512, 512, 512], ["512 pixels"] * 3),
    ],
)
def test_images_are_of_two_sizes_at_most(lengths, sizes):
    table = images([1, 0, 1], [0.9, 0.1, 0.4])
    predictions = table.rename(columns={"image": "StudyInstanceUID"}).assign(vertebra="image", split="test")
    found = judged_images(predictions, table.assign(height=lengths, width=100), split="test")
    assert found["size"].tolist() == sizes


# --------------------------------------------------------------------------------------------- comparisons
def test_a_paired_difference_is_that_of_the_numbers_and_shorter_than_two_unpaired_intervals(cases, other):
    found = compare(cases, other, threshold=0.5, other_threshold=0.4, resamples=300).set_index("metric")
    first = evaluate(cases, threshold=0.5, resamples=300).set_index("metric")
    second = evaluate(other, threshold=0.4, resamples=300).set_index("metric")
    pd.testing.assert_series_equal(found["difference"], second["value"] - first["value"], check_names=False)
    assert ((found["low"] < found["difference"]) & (found["difference"] < found["high"])).all()
    same = compare(cases, cases, threshold=0.5, resamples=50)
    assert (same["difference"] == 0).all()
    rates = same["metric"].isin(["recall", "specificity", "precision"])  # of which single cases may differ
    assert np.allclose((same["high"] - same["low"])[~rates], 0)
    shuffled = cases.where(np.ones(len(cases), bool))
    order = np.random.default_rng(0).permutation(len(cases))
    moved = MaskCases(other.images.iloc[order].reset_index(drop=True), other.lesions, other.marks, other.rule)
    pd.testing.assert_frame_equal(
        compare(shuffled, moved, threshold=0.5, other_threshold=0.4, resamples=300), found.reset_index()
    )


def test_pairs_that_show_no_spread_or_have_no_value_say_so():
    table = images([1, 1, 1, 0, 0, 0], [0.9, 0.8, 0.7, 0.3, 0.2, 0.1])
    truth = {f"i{n}": square(0, 0, 4) for n in range(3)}
    empty = dict.fromkeys(table["image"], np.zeros(SHAPE, bool))
    runs = [MaskCases.of(table, truth=truth, predicted=each) for each in (empty | truth, empty)]
    same = compare(runs[0], runs[0], threshold=0.5, resamples=20).set_index("metric")
    assert same.loc["missed_whole", "difference"] == 0
    assert same.loc["missed_whole", "low"] == -same.loc["missed_whole", "high"] < -0.3
    found = compare(*runs, threshold=0.5, resamples=20).set_index("metric")
    assert found.loc["missed_whole", ["value", "other", "difference"]].tolist() == [0, 1, 1]
    assert found.loc["pixel_precision", ["other", "difference", "low", "high"]].isna().all()


def test_a_paired_interval_of_dice_is_students_of_the_groups_differences():
    """Where every image is its own group, the interval is the plain one of paired differences."""
    from scipy import stats

    table, truth, predicted = made()
    again = made(seed=3)[2]
    table = table.assign(patient=table["image"])
    pair = [MaskCases.of(table, truth=truth, predicted=each) for each in (predicted, again)]
    found = compare(*pair, threshold=0.5, resamples=50).set_index("metric").loc["dice_pos"]
    fractured = table["label"] == 1
    change = (pair[1].images["dice"] - pair[0].images["dice"])[fractured]
    low, high = stats.t.interval(0.95, len(change) - 1, change.mean(), stats.sem(change))
    assert found["difference"] == pytest.approx(change.mean())
    assert found["low"] == pytest.approx(low, abs=0.01)
    assert found["high"] == pytest.approx(high, abs=0.01)


def test_runs_on_other_images_or_with_other_truth_are_not_compared(cases):
    with pytest.raises(ValueError, match="1 images are not in the second run's predictions: 'i0'"):
        compare(cases, cases.where(cases.images["image"].to_numpy() != "i0"), threshold=0.5)
    changed = MaskCases(
        cases.images.assign(patient="p" + cases.images["patient"]), cases.lesions, cases.marks, cases.rule
    )
    with pytest.raises(ValueError, match="images differ in patient, label, true"):
        compare(cases, changed, threshold=0.5)


def test_the_ablation_table_sets_each_run_beside_the_reference(cases, other):
    presence = MaskCases.of(other.images[["image", "patient", "label", "probability"]], truth={})
    found = ablation(
        {"full": cases, "weaker": other, "no mask": presence},
        reference="full",
        thresholds={"full": 0.5, "weaker": 0.4, "no mask": 0.4},
        resamples=100,
    ).set_index(["run", "metric"])
    change = compare(cases, other, threshold=0.5, other_threshold=0.4, resamples=100).set_index("metric")
    assert found["difference"]["weaker"].to_dict() == change["difference"].to_dict()
    assert found.loc["full", "difference"].isna().all()
    assert "dice_pos" not in found.loc["no mask"].index
    assert found.loc[("no mask", "auroc"), "difference"] == change["difference"]["auroc"]
    with pytest.raises(ValueError, match="Unknown reference 'best'"):
        ablation({"full": cases}, reference="best")
    with pytest.raises(ValueError, match="No threshold for 'weaker'"):
        ablation({"full": cases, "weaker": other}, reference="full", thresholds={"full": 0.5})


def test_examples_are_of_each_kind_and_spread_over_the_measure(cases):
    found = examples(cases, threshold=0.5, measure="dice", each=3)
    assert found["kind"].value_counts().to_dict() == dict.fromkeys(
        ("hit", "miss", "false alarm", "cleared"), 3
    )
    hits = cases.images[(cases.images["label"] == 1) & (cases.images["probability"] >= 0.5)]
    shown = found[found["kind"] == "hit"]["dice"]
    assert [shown.min(), shown.max()] == [hits["dice"].min(), hits["dice"].max()]
    assert found["image"].is_unique
    with pytest.raises(ValueError, match="lacks the column"):
        examples(cases, threshold=0.5, measure="beauty")
    with pytest.raises(ValueError, match="from 1; found 0"):
        examples(cases, threshold=0.5, each=0)


# ---------------------------------------------------------------------------------------------------- MURA
@pytest.fixture(scope="module")
def views():
    rng = np.random.default_rng(0)
    many = np.repeat(np.arange(150), rng.integers(1, 5, 150))
    label = (rng.random(150) < 0.45).astype(int)[many]
    columns = {"study": [f"s{n}" for n in many], "patient": [f"p{n // 2}" for n in many], "label": label}
    return pd.DataFrame(columns).assign(probability=expit(rng.normal(2 * label - 1)), split="validation")


@pytest.mark.parametrize("how", ["mean", "max"])
def test_studies_are_scored_by_their_views_as_scikit_learn_would(views, how):
    found = study_scores(views, how)
    expected = views.groupby("study", sort=False)["probability"].agg(how)
    assert found["probability"].tolist() == pytest.approx(expected.tolist())
    assert found["images"].sum() == len(views)
    pd.testing.assert_frame_equal(validate_predictions(found), found.drop(columns="images"))
    scores = study_metrics(found, threshold=0.5, resamples=200).set_index("metric")
    called = found["probability"] >= 0.5
    assert scores.loc["kappa", "value"] == pytest.approx(sk.cohen_kappa_score(found["label"], called))
    assert scores.loc["auroc", "value"] == pytest.approx(
        sk.roc_auc_score(found["label"], found["probability"])
    )
    assert scores.loc["kappa", ["n", "groups"]].tolist() == [150, 75]
    assert ((scores["low"] < scores["value"]) & (scores["value"] < scores["high"])).all()


def test_kappa_without_a_wrong_study_still_has_an_interval():
    views = pd.DataFrame({"study": [f"s{n}" for n in range(40)], "label": [0, 1] * 20})
    views = views.assign(patient=views["study"], probability=0.1 + 0.8 * views["label"], split="test")
    kappa = study_metrics(study_scores(views), threshold=0.5, resamples=50).set_index("metric").loc["kappa"]
    assert kappa[["value", "high"]].tolist() == [1, 1]
    assert 0.7 < kappa["low"] < 1


def test_kappa_of_a_threshold_that_calls_no_study_is_none(views):
    scores = study_metrics(study_scores(views), threshold=1.0, resamples=50).set_index("metric")
    assert scores.loc["kappa", ["value", "low", "high"]].tolist() == [0, 0, 0]


def test_studies_that_contradict_themselves_are_refused(views):
    torn = views.assign(
        label=np.where(views.index == views.index[views["study"].duplicated()][0], 9, views["label"])
    )
    with pytest.raises(ValueError, match=r"1 studies have images that differ in patient, split, label: 's"):
        study_scores(torn)
    with pytest.raises(ValueError, match="Unknown how 'median'"):
        study_scores(views, "median")
    with pytest.raises(ValueError, match="no rows"):
        study_scores(views.iloc[:0])
    with pytest.raises(ValueError, match="lacks the column"):
        study_scores(views.drop(columns="study"))
    with pytest.raises(ValueError, match="only where both classes occur"):
        study_metrics(study_scores(views.assign(label=1)), threshold=0.5, resamples=20)


# ------------------------------------------------------------------------------------------------ coverage
def drawn_images(rng, patients):
    """Images of patients who are alike in themselves, as the counts that `MaskCases` holds."""
    many = rng.integers(1, 5, patients)
    patient = np.repeat(np.arange(patients), many)
    common = rng.normal(size=patients)[patient]
    n = len(patient)
    label = (rng.random(n) < expit(-1.2 + common)).astype(int)
    skill = expit(0.3 + 0.8 * rng.normal(size=patients)[patient] + rng.normal(size=n))
    true = label * np.round(np.exp(rng.normal(6, 0.8, n))).astype(int)
    overlap = np.where(rng.random(n) < 0.25, 0, np.round(true * skill)).astype(int)
    false = rng.poisson(0.4 * np.exp(0.7 * common - 0.25))
    predicted = overlap + 80 * false + np.round(overlap * 0.3).astype(int)
    lesions = label * rng.integers(1, 3, n)
    return pd.DataFrame(
        {
            "image": [f"i{number}" for number in range(n)],
            "patient": [f"p{number}" for number in patient],
            "split": "test",
            "label": label,
            "probability": expit(-1 + 2 * label + rng.normal(size=n)),
            "true": true,
            "predicted": predicted,
            "overlap": overlap,
            "dice": (2 * overlap + 1e-6) / (true + predicted + 1e-6),
            "dice_frame": (2 * overlap + 1e-6) / (true + predicted + 1e-6),
            "true_frame": true,
            "lesions": lesions,
            "lesions_hit": rng.binomial(lesions, skill),
            "marks": false + (overlap > 0),
            "false_marks": false,
        }
    )


@pytest.mark.slow
def test_intervals_of_masks_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    nothing = pd.DataFrame(columns=["image", "patient", "area", "score", "false"])

    def numbers(patients):
        cases = MaskCases(drawn_images(rng, patients), nothing, nothing, "")
        return evaluation._mask_table(cases, resamples=200, seed=0, confidence=0.95).set_index("metric")

    truth = numbers(40_000)["value"]
    found = [numbers(100) for _ in range(400)]
    held = np.mean([(each["low"] <= truth) & (truth <= each["high"]) for each in found], axis=0)
    assert dict(zip(truth.index, held, strict=True)) == pytest.approx(
        dict.fromkeys(truth.index, 0.95), abs=0.04
    )


# ---------------------------------------------------------------------------------------------- real images
def test_a_made_cohorts_own_masks_are_found_whole(tmp_path):
    folder = radiograph_cohort(tmp_path)
    table, regions = read_images(folder), read_regions(folder)
    predictions = table.rename(columns={"image": UID}).assign(vertebra="image", split="test")
    predictions = predictions.assign(probability=0.1 + 0.8 * table["label"])
    judged = judged_images(
        predictions[[UID, "vertebra", "split", "label", "probability"]], table, split="test"
    )
    sizes = zip(table["image"], table["height"], table["width"], strict=True)
    masks = {name: rasterise(regions[name], height, width) for name, height, width in sizes}
    cases = MaskCases.of(judged, truth=regions, predicted=masks)
    found = evaluate(cases, threshold=0.5, resamples=20).set_index("metric")["value"]
    perfect = ["auroc", "recall", "dice_pos", "dice_pos_frame", "pixel_recall", "lesion_recall"]
    assert found[perfect].tolist() == [1] * len(perfect)
    assert len(cases.lesions) == sum(map(len, regions.values()))


@pytest.mark.slow
@pytest.mark.skipif(not FRACATLAS.is_dir(), reason=f"FracAtlas is not at {FRACATLAS}")
def test_fracatlas_has_its_781_lesions_and_their_known_sizes():
    files = json.loads(next((FRACATLAS / "Annotations" / "VGG JSON").glob("*.json")).read_text())
    truth, predicted = {}, {}
    for each in files.get("_via_img_metadata", files).values():
        with Image.open(FRACATLAS / "images" / "Fractured" / each["filename"]) as image:
            width, height = ImageOps.exif_transpose(image).size
        shapes = [region["shape_attributes"] for region in each["regions"].values()]
        name = each["filename"].removesuffix(".jpg")
        truth[name] = [np.column_stack([s["all_points_x"], s["all_points_y"]]) for s in shapes]
        predicted[name] = rasterise(truth[name], height, width)
    table = images([1] * len(truth)).assign(image=list(truth))
    cases = MaskCases.of(table, truth=truth, predicted=predicted)
    assert (len(cases), len(cases.lesions)) == (610, 781)
    assert cases.images["dice"].tolist() == [1.0] * 610
    assert cases.images["lesions_hit"].sum() >= 0.97 * 781  # touching polygons make one mark
    sizes = [predicted[name].size for name in cases.images["image"]]
    share = np.percentile(100 * cases.images["true"] / sizes, [5, 50, 95])
    known = [0.11, 0.35, 1.36]  # drawn with the outline's own pixels, which makes them larger
    np.testing.assert_allclose(share, known, rtol=0.1)
    assert (cases.images["true_frame"] > 0).all()


# ------------------------------------------------------------------------------------------------- tables
def test_every_metric_is_the_same_from_the_tables_that_are_shipped(cases, other, tmp_path):
    cases.write(tmp_path / "first")
    other.write(tmp_path / "other")
    first, second = MaskCases.read(tmp_path / "first"), MaskCases.read(tmp_path / "other")
    few = {"resamples": 50}
    for ask in (
        lambda one, two: evaluate(one, threshold=0.4, **few),
        lambda one, two: froc(one, at=[0.1, 0.25, 1, 4], **few),
        lambda one, two: subgroups(one, threshold=0.4, by=["part", "view", "hardware"], **few),
        lambda one, two: shortcut(one, **few),
        lambda one, two: compare(one, two, threshold=0.4, **few),
        lambda one, two: ablation({"one": one, "two": two}, reference="one", **few),
        lambda one, two: examples(one, threshold=0.4)[["image", "kind", "probability", "dice"]],
    ):
        pd.testing.assert_frame_equal(ask(first, second), ask(cases, other), check_exact=True)
    assert first.rule == cases.rule


def test_cases_without_masks_and_with_nothing_marked_come_back_too(cases, tmp_path):
    names = ["image", "patient", "label", "probability"]
    MaskCases.of(cases.images[names], truth={}).write(tmp_path / "presence")
    assert not MaskCases.read(tmp_path / "presence").has_masks
    empty = dict.fromkeys(["i0", "i1"], np.zeros(SHAPE))
    blank = MaskCases.of(images([1, 0]), truth={"i0": [square(3, 3, 8)]}, predicted=empty)
    blank.write(tmp_path / "blank")
    assert MaskCases.read(tmp_path / "blank").images["dice"].tolist() == blank.images["dice"].tolist()
    with pytest.raises(FileExistsError, match="replace=True"):
        blank.write(tmp_path / "presence")
    blank.write(tmp_path / "presence", replace=True)
    assert MaskCases.read(tmp_path / "presence").has_masks


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("marks", lambda t: t.iloc[1:], "images whose marks are others than in their table"),
        ("marks", lambda t: t.assign(false=1 - t["false"]), "images whose false_marks are others"),
        ("marks", lambda t: t.assign(area=t["area"] + 1), "images whose predicted are others"),
        ("marks", lambda t: t.assign(false="some"), "none of 0, 1"),
        ("lesions", lambda t: t.assign(score=np.nan), "images whose lesions_hit are others"),
        ("lesions", lambda t: t.assign(patient="nobody"), "of another patient"),
        ("lesions", lambda t: t.assign(image="nowhere"), "not in images.csv"),
        ("lesions", lambda t: t.drop(columns="area"), "lacks the column"),
        ("images", lambda t: t.assign(overlap=t["overlap"] + 1), "dice is not that of their pixels"),
        ("images", lambda t: t.assign(split=["test", *["validation"] * (len(t) - 1)]), "mixes the splits"),
        ("images", lambda t: t.assign(rule=["a", *["b"] * (len(t) - 1)]), "mixes the rules"),
        ("images", lambda t: t.drop(columns="marks"), "lacks the column"),
        ("images", lambda t: t.assign(label=1), "fractured images have no lesion"),
        ("images", lambda t: pd.concat([t, t[:1]]), "rows that repeat image"),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(cases, tmp_path, name, change, message):
    cases.write(tmp_path)
    path = tmp_path / f"{name}.csv"
    write_table(change(pd.read_csv(path, keep_default_na=False)), path, sealed=True)
    with pytest.raises(ValueError, match=message):
        MaskCases.read(tmp_path)


def test_tables_that_were_edited_or_are_missing_are_refused(cases, tmp_path):
    cases.write(tmp_path)
    path = tmp_path / "images.csv"
    path.write_text(path.read_text().replace("hand", "foot", 1))
    with pytest.raises(ValueError, match=r"images\.csv"):
        MaskCases.read(tmp_path)
    (tmp_path / "marks.csv").unlink()
    cases.write(tmp_path, replace=True)
    (tmp_path / "lesions.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"lesions\.csv"):
        MaskCases.read(tmp_path)
