import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from scipy.special import expit
from sklearn.metrics import average_precision_score, roc_auc_score

from cspine_helpers.decisions.thresholds import Rule, choose_threshold
from cspine_helpers.metrics import auroc, average_precision
from cspine_helpers.radiographs import blend as blends
from cspine_helpers.radiographs.blend import (
    Blend,
    Outputs,
    freeze_blend,
    kept_regions,
    read_blend,
    search_blend,
)

HEIGHT, WIDTH = 48, 40
MEMBERS = [{"run": name, "weights_sha256": name * 4, "record_sha256": name * 3} for name in ("one", "two")]


def made(images=60, members=2, *, seed=0, good=(1.0, 0.2)) -> Outputs:
    """Outputs that know the truth, each member as well as `good` says; pairs of images are groups."""
    rng = np.random.default_rng(seed)
    label = np.repeat((np.arange(images // 2) % 3 == 0).astype(int), 2)
    truths, masks, classes = [], [], []
    for broken in label:
        truth = np.zeros((HEIGHT, WIDTH), np.uint8)
        if broken:
            y, x = rng.integers(4, 30), rng.integers(4, 25)
            truth[y : y + 12, x : x + 8] = 1
        cells = truth[2::4, 2::4] * 3.0
        masks.append(expit([good[m] * cells + rng.normal(-2, 1, cells.shape) for m in range(members)]))
        classes.append(expit([good[m] * 2 * broken + rng.normal(-1, 1) for m in range(members)]))
        truths.append(truth)
    return Outputs(
        image=np.array([f"i{n}" for n in range(images)]),
        group=np.array([f"g{n // 2}" for n in range(images)]),
        label=label,
        classes=np.array(classes),
        masks=[mask.astype(np.float16) for mask in masks],
        truths=truths,
    )


@pytest.fixture(scope="module")
def outputs():
    return made()


@pytest.fixture(scope="module")
def search(outputs):
    return search_blend(outputs)


def plain_dice(truth, mask):
    return (2 * (truth * mask).sum() + 1e-6) / (truth.sum() + mask.sum() + 1e-6)


def test_a_probability_is_a_share_of_the_class_and_of_the_highest_cells():
    masks = np.array([[[0.1, 0.9], [0.5, 0.3]], [[0.3, 0.1], [0.5, 0.1]]])
    found = Blend(class_share=0.25, top_cells=2, weights=(0.5, 0.5)).probability(np.array([0.2, 0.6]), masks)
    assert found == pytest.approx(0.25 * 0.4 + 0.75 * (0.5 + 0.5) / 2)
    assert Blend(weights=(0.0, 1.0)).probability(np.array([0.2, 0.6]), None) == 0.6
    assert Blend(class_share=0, top_cells=99).probability(np.ones(1), masks[:1]) == pytest.approx(0.45)


def test_regions_below_the_smallest_go_and_others_stay():
    mask = (np.random.default_rng(0).random((60, 50)) < 0.3).astype(np.uint8)
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    for smallest in (0, 1, 2, 5, 40, 4000):
        sizes = ndimage.sum_labels(mask, labels, np.arange(count + 1))
        np.testing.assert_array_equal(kept_regions(mask, smallest), mask * (sizes >= smallest)[labels])


def test_a_mask_is_what_reaches_the_threshold_at_the_pixels_of_the_frame():
    cells = np.zeros((1, 12, 10))
    cells[0, 3:6, 2:5] = 0.9
    cells[0, 10, 8] = 0.9
    found = Blend(mask_threshold=0.4, smallest_region=50).mask(cells, HEIGHT, WIDTH)
    assert found.shape == (HEIGHT, WIDTH)
    assert found[13:23, 9:19].all()  # the three by three cells, but their corners
    assert not found[:10].any()
    assert not found[36:].any()  # the single cell has fewer pixels


@pytest.mark.parametrize("decimals", [1, 2, 9])  # many equal, some, none
def test_areas_are_those_of_scikit_learn(decimals):
    rng = np.random.default_rng(decimals)
    label, p = rng.integers(0, 2, 80), rng.random(80).round(decimals)
    assert blends.areas(label, p) == pytest.approx(
        (roc_auc_score(label, p), average_precision_score(label, p))
    )


def test_the_scores_are_those_of_the_blend_applied_image_by_image(outputs, search):
    blend = search.blend
    p = [blend.probability(*pair) for pair in zip(outputs.classes, outputs.masks, strict=True)]
    dice = [
        plain_dice(truth, blend.mask(masks, HEIGHT, WIDTH))
        for truth, masks in zip(outputs.truths, outputs.masks, strict=True)
        if truth.any()
    ]
    row = search.scores.set_index("blend").loc["chosen on these images"]
    assert row["auroc"] == pytest.approx(auroc(outputs.label, p))
    assert row["average_precision"] == pytest.approx(average_precision(outputs.label, p))
    assert row["dice_pos"] == pytest.approx(np.mean(dice), abs=1e-9)


def test_no_tried_setting_does_better_on_the_images_it_is_chosen_on(outputs, search):
    best = search.scores.set_index("blend")["dice_pos"]["chosen on these images"]
    assert best >= search.scores.set_index("blend")["dice_pos"]["class alone, not searched"]
    for threshold in (0.1, 0.3, 0.5, 0.7):
        other = replace(search.blend, mask_threshold=threshold, smallest_region=0)
        dice = [
            plain_dice(truth, other.mask(masks, HEIGHT, WIDTH))
            for truth, masks in zip(outputs.truths, outputs.masks, strict=True)
            if truth.any()
        ]
        assert np.mean(dice) <= best + 0.001


def test_the_better_member_weighs_more(search):
    assert search.blend.weights[0] > search.blend.weights[1]


def test_out_of_fold_an_image_is_judged_by_what_others_chose(outputs, search):
    part = blends._parts(outputs, 5, 0)
    held_out = part == 0
    rest = Outputs(
        *(np.asarray(column)[~held_out] for column in (outputs.image, outputs.group, outputs.label)),
        classes=outputs.classes[~held_out],
        masks=[mask for mask, out in zip(outputs.masks, held_out, strict=True) if not out],
        truths=[truth for truth, out in zip(outputs.truths, held_out, strict=True) if not out],
    )
    chosen = search_blend(rest, folds=2).blend
    changed = replace(
        outputs, masks=[m[:, ::-1] if out else m for m, out in zip(outputs.masks, held_out, strict=True)]
    )
    tables = [blends._Table.of(changed, weights) for weights in blends._weightings(2)]
    assert blends._choose(tables, outputs.label, ~held_out).blend() == chosen


def test_groups_stay_in_one_part_and_fractures_are_dealt_evenly(outputs):
    part = blends._parts(outputs, 5, 0)
    assert all(len(set(part[outputs.group == group])) == 1 for group in outputs.group)
    broken = np.bincount(part, weights=outputs.label)
    assert broken.max() - broken.min() <= 2  # a group of two


def test_noise_looks_better_where_it_was_chosen_than_out_of_fold():
    flattered = []
    for seed in range(8):
        scores = search_blend(made(40, 1, seed=seed, good=(0.0,))).scores.set_index("blend")
        flattered.append(scores.loc["chosen on these images"] - scores.loc["chosen out of fold"])
    assert np.mean([row["auroc"] for row in flattered]) > 0.02


def test_classifiers_without_a_mask_are_blended_by_their_class(outputs):
    found = search_blend(replace(outputs, masks=None))
    assert found.blend.class_share == 1
    assert found.scores["dice_pos"].isna().all()
    assert found.blend.weights[0] > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": 1}, "needs 2 folds or more"),
        ({"folds": 11}, "found 10 with a fracture. Search on more images"),
        ({"folds": 25}, "found 10 with a fracture"),
    ],
)
def test_too_few_groups_are_refused(outputs, change, message):
    with pytest.raises(ValueError, match=message):
        search_blend(outputs, **change)


def test_other_members_than_weights_are_refused():
    with pytest.raises(ValueError, match=r"blend is of 1 run\(s\), found 2"):
        Blend().probability(np.ones(2), None)


@pytest.mark.parametrize(
    "wrong", [{"class_share": 1.1}, {"mask_threshold": 0}, {"weights": (0.5, 0.6)}, {"top_cells": 0}]
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=f"Blend cannot have {next(iter(wrong))}"):
        Blend(**wrong)


def test_a_frozen_blend_is_read_back_and_not_overwritten_unasked(search, tmp_path):
    how = {"members": MEMBERS, "views": ["as it is"], "data": {"split_sha256": "s"}}
    how["rule"] = Rule("max_youden", level="image")
    path = freeze_blend(tmp_path, search, **how)
    found = read_blend(tmp_path)
    assert found.blend == search.blend
    assert found.views == ("as it is",)
    assert found.record["chosen_on"]["outputs_sha256"] == search.outputs.sha256
    assert found.record["chosen_on"]["groups"] == 30
    assert (
        found.threshold == choose_threshold(search.outputs.label, search.probability, how["rule"]).threshold
    )
    found.check_members(MEMBERS)
    with pytest.raises(ValueError, match=r"other runs: two\.weights_sha256 is 'x', not 'twotwotwotwo'"):
        found.check_members([MEMBERS[0], MEMBERS[1] | {"weights_sha256": "x"}])
    with pytest.raises(FileExistsError, match=r"frozen already.*--replace"):
        freeze_blend(tmp_path, search, **how)
    freeze_blend(tmp_path, search, replace=True, **how)
    content = json.loads(path.read_text())
    content["blend"]["mask_threshold"] = 0.9
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not the record that was written"):
        read_blend(tmp_path)


def test_a_missing_blend_says_how_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="predict --blend"):
        read_blend(tmp_path)


def test_the_hash_of_outputs_is_of_all_that_they_hold(outputs):
    others = [
        replace(outputs, label=1 - outputs.label),
        replace(outputs, group=outputs.group[::-1]),
        replace(outputs, classes=outputs.classes + 1e-3),
        replace(outputs, masks=outputs.masks[::-1]),
        replace(outputs, truths=outputs.truths[::-1]),
    ]
    assert len({each.sha256 for each in (outputs, *others)}) == 6
