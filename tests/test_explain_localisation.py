import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.ndimage import distance_transform_edt
from sklearn.metrics import jaccard_score, roc_auc_score
from torch.nn import functional

from cspine_helpers.explain.localisation import (
    METRICS,
    TRIVIAL,
    at_pixels,
    attention_maps,
    best_iou_quantile,
    localisation_table,
    localise,
    over_strongest,
    trivial_maps,
)
from cspine_helpers.explain.maps import Grid, Maps


@pytest.fixture(scope="module")
def cases():
    """Three sequences with a crack each, the mask about it, and maps of stride 4 that know it and more."""
    rng = np.random.default_rng(0)
    truth = np.zeros((3, 5, 32, 32), np.uint8)
    for n, (t, y, x) in enumerate(((1, 4, 9), (2, 20, 13), (0, 11, 22))):
        truth[n, t : t + 2, y : y + 2, x : x + 6] = 1
    inside = np.zeros_like(truth)
    inside[..., 2:29, 5:30] = 1
    coarse = truth.reshape(3, 5, 8, 4, 8, 4).mean(axis=(3, 5))
    return truth, inside, (coarse + rng.normal(0, 0.15, coarse.shape)).astype(np.float32)


def test_maps_lie_on_the_pixels_as_torch_interpolates_them():
    maps = np.random.default_rng(1).normal(size=(2, 3, 7, 5)).astype(np.float32)
    for size in ((28, 20), (31, 11), (7, 5), (3, 2)):
        wanted = functional.interpolate(torch.from_numpy(maps), size, mode="bilinear", align_corners=False)
        np.testing.assert_allclose(at_pixels(maps, *size), wanted, atol=1e-5)
    constant = np.full((1, 3, 3), 0.1, np.float32)
    assert len(np.unique(at_pixels(constant, 64, 64))) == 1


def test_scores_of_a_case_equal_scikit_learns_and_a_slow_count(cases):
    truth, inside, maps = cases
    found = localise(maps, truth, inside=inside, tolerance=2, iou_quantile=0.99)
    for n, row in enumerate(found.itertuples()):
        pixels = functional.interpolate(torch.from_numpy(maps[n])[None], (32, 32), mode="bilinear")[0].numpy()
        true, bone = truth[n] == 1, inside[n] == 1
        assert row.auroc == pytest.approx(roc_auc_score(true.ravel(), pixels.ravel()), abs=1e-6)
        assert row.auroc_inside == pytest.approx(roc_auc_score(true[bone], pixels[bone]), abs=1e-6)
        positive = pixels.clip(0)
        assert row.energy == pytest.approx((positive * true).sum() / positive.sum(), rel=1e-4)
        marked = pixels >= np.sort(pixels, axis=None)[-round(0.01 * pixels.size)]
        assert row.iou == pytest.approx(jaccard_score(true.ravel(), marked.ravel()), abs=1e-6)
        t, y, x = np.unravel_index(maps[n].argmax(), maps[n].shape)
        away = distance_transform_edt(~np.kron(true[t], np.ones((2, 2), bool))) / 2 if true[t].any() else None
        # the cell's centre lies between pixels: on a corner of four of those twice as fine
        fine = away[8 * y + 3 : 8 * y + 5, 8 * x + 3 : 8 * x + 5].min() if away is not None else np.inf
        assert row.pointing == (fine <= 2)
        assert row.chance == true.mean()


def test_the_pointing_game_by_hand():
    truth = np.zeros((1, 2, 8, 8), int)
    truth[0, 0, 2, 2] = 1
    maps = np.zeros((1, 2, 8, 8))

    def pointing(*cells, tolerance):
        values = maps.copy()
        for cell in cells:
            values[(0, *cell)] = 1
        return localise(values, truth, tolerance=tolerance)["pointing"].item()

    assert pointing((0, 2, 2), tolerance=0) == 1
    assert pointing((0, 2, 5), tolerance=3) == 1
    assert pointing((0, 2, 5), tolerance=2.9) == 0
    assert pointing((0, 4, 4), tolerance=2.9) == 1
    assert pointing((1, 2, 2), tolerance=3) == 0  # another slice
    assert pointing((0, 2, 2), (0, 7, 7), (1, 2, 2), (1, 0, 0), tolerance=0) == 0.25  # ties
    coarse = np.zeros((1, 2, 2, 2))
    coarse[0, 0, 0, 0] = 1  # its centre, 1.5, is half a pixel's diagonal away
    assert localise(coarse, truth, tolerance=0.7)["pointing"].item() == 0
    assert localise(coarse, truth, tolerance=0.8)["pointing"].item() == 1


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
@pytest.mark.parametrize("grid", [(8, 8), (32, 32)])
def test_a_constant_map_scores_chance(cases, value, grid):
    truth, inside, _ = cases
    found = localise(np.full((3, 5, *grid), value), truth, inside=inside, tolerance=0, iou_quantile=0.98)
    np.testing.assert_allclose(found[["auroc", "auroc_inside"]], 0.5)
    np.testing.assert_allclose(found["energy"], found["chance"])
    marked, total = np.rint(0.02 * truth[0].size), truth[0].size
    hit = marked * found["chance"]
    np.testing.assert_allclose(found["iou"], hit / (marked + found["chance"] * total - hit))
    if grid == (32, 32):
        np.testing.assert_allclose(found["pointing"], found["chance"])
    assert (found["pointing"] < 0.05).all()


def test_a_negative_map_is_no_evidence_but_its_order_counts(cases):
    truth, _, _ = cases
    found = localise(truth - 2.0, truth, tolerance=0)
    np.testing.assert_allclose(found["energy"], found["chance"])
    np.testing.assert_allclose(found[["pointing", "auroc"]], 1)
    turned = localise(-1.0 * truth, truth)
    np.testing.assert_allclose(turned["auroc"], 0)


def test_attention_is_constant_in_a_slice_and_its_ties_are_averaged(cases):
    truth, _, _ = cases
    weights = np.full((3, 5), 0.1)
    weights[np.arange(3), [1, 2, 3]] = 0.6  # the last one misses
    found = localise(attention_maps(weights, 32, 32), truth, tolerance=0)
    np.testing.assert_allclose(found["pointing"], [12 / 1024, 12 / 1024, 0])
    wanted = [
        roc_auc_score(its.ravel(), np.repeat(own, 1024)) for its, own in zip(truth, weights, strict=True)
    ]
    np.testing.assert_allclose(found["auroc"], wanted)


def test_the_threshold_of_the_iou_is_the_best_of_those_tried(cases):
    truth, _, maps = cases
    tried = (0.9, 0.95, 0.98, 0.99)
    means = [localise(maps, truth, iou_quantile=q)["iou"].mean() for q in tried]
    assert best_iou_quantile(maps, truth, quantiles=tried) == tried[int(np.argmax(means))]
    exact = 1 - truth[0].mean()
    assert localise(truth * 1.0, truth, iou_quantile=exact)["iou"].tolist() == [1, 1, 1]


def test_trivial_maps_know_the_picture_and_no_fracture(cases):
    truth, inside, _ = cases
    pixels = np.zeros(truth.shape, np.uint8)
    pixels[..., 16:] = 200
    maps = trivial_maps(pixels, inside=inside)
    assert tuple(maps) == TRIVIAL
    assert {each.shape for each in maps.values()} == {truth.shape}
    assert {each.dtype.name for each in maps.values()} == {"float32"}
    columns = np.flatnonzero(maps["edges"][0, 0].max(axis=0))
    assert columns.tolist() == [15, 16]
    assert maps["centre"][0].argmax() in np.ravel_multi_index(([2] * 2, [15, 16], [15, 16]), truth[0].shape)
    np.testing.assert_array_equal(maps["mask"], inside)
    assert localise(maps["mask"], truth, inside=inside)["auroc_inside"].tolist() == [0.5] * 3
    flat = trivial_maps(pixels[:, 0])
    assert flat["centre"].shape == (3, 32, 32)
    assert "mask" not in flat
    pd.testing.assert_frame_equal(
        localise(flat["edges"], truth.max(axis=1)),
        localise(flat["edges"][:, None], truth.max(axis=1)[:, None]),
    )


def test_the_table_has_means_of_cases_and_intervals_of_patients():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(20), 2)
    base = pd.DataFrame(rng.random((40, 5)), columns=[*METRICS])
    base["pointing"] = rng.integers(0, 2, 40)
    better = base.assign(auroc=base["auroc"] + 0.1 + rng.normal(0, 0.01, 40), auroc_inside=np.nan)
    table = localisation_table({"cam": better, "edges": base}, patients=patients)
    rows = table.set_index(["method", "metric"])
    assert ("cam", "auroc_inside") not in rows.index
    assert "over_uniform" not in table
    cam = rows.loc[("cam", "auroc")]
    # every patient has two cases, so that the mean of patients' means is the mean, with Student's interval
    means = (better["auroc"] - base["auroc"]).groupby(patients).mean()
    wanted = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert cam["over_edges"] == pytest.approx(means.mean())
    assert cam["over_edges_low"] == pytest.approx(wanted.low, abs=0.002)
    assert cam["over_edges_high"] == pytest.approx(wanted.high, abs=0.002)
    assert cam["over_edges_low"] > 0
    assert cam["cases"] == 40
    assert cam["patients"] == 20
    point = rows.loc[("edges", "pointing")]
    assert point["value"] == base["pointing"].mean()
    assert 0 < point["low"] < point["value"] < point["high"] < 1
    assert np.isnan(point["over_edges"])
    sure = localisation_table({"cam": base.assign(pointing=1.0)}, patients=patients)
    assert sure.set_index("metric").loc["pointing", "low"] < 0.9  # 20 patients cannot show certainty


def test_maps_that_know_their_image_are_held_to_its_size(cases):
    truth, _, maps = cases
    step = 32 / maps.shape[-1]
    even = Grid(((step - 1) / 2,) * 2, (step,) * 2)
    known = Maps(maps, "grad_cam", "blocks", even, (32, 32), np.zeros(3), np.zeros((3, 5)))
    pd.testing.assert_frame_equal(localise(known, truth), localise(maps, truth))
    with pytest.raises(ValueError, match=r"another grid than the maps: \(16, 16\) pixels, and images of"):
        localise(known, truth[..., ::2, ::2])


def test_what_cannot_be_judged_is_refused(cases):
    truth, inside, maps = cases
    for other in (truth[:, :3], truth[:2], truth[..., :16], truth[0]):
        with pytest.raises(ValueError, match="truth is on another grid than the maps"):
            localise(maps, other)
    with pytest.raises(ValueError, match=r"No pixel is true in 1 of 3 cases \(rows 1\)"):
        localise(maps, truth * np.array([1, 0, 1])[:, None, None, None])
    broken = maps.copy()
    broken[2, 0, 0, 0] = np.nan
    for call in (localise, best_iou_quantile):
        with pytest.raises(ValueError, match=r"NaN or infinite values in 1 of 3 cases \(rows 2\)"):
            call(broken, truth)
    for other, found in ((truth * 255, "'255'"), (truth - 1.0, "'-1.0'"), (truth.astype(str), "'0', '1'")):
        with pytest.raises(ValueError, match=f"The truth is 0 or 1 at each pixel; found {found}"):
            localise(maps, other)
    with pytest.raises(ValueError, match="The mask has shape"):
        localise(maps, truth, inside=inside[:2])
    with pytest.raises(ValueError, match="tolerance is a distance"):
        localise(maps, truth, tolerance=-1)
    for quantile in (0, 1, np.nan):
        with pytest.raises(ValueError, match="quantile lies between 0 and 1"):
            localise(maps, truth, iou_quantile=quantile)
    with pytest.raises(ValueError, match="quantile lies between 0 and 1; found none"):
        best_iou_quantile(maps, truth, quantiles=())
    with pytest.raises(ValueError, match="Trivial maps are of pixels"):
        trivial_maps(np.zeros((2, 15, 64, 64, 6)))
    with pytest.raises(ValueError, match="The mask has shape"):
        trivial_maps(truth, inside=inside[:1])
    rows = localise(maps, truth)
    with pytest.raises(ValueError, match=r"The table of a lacks the column\(s\) 'iou'"):
        localisation_table({"a": rows.drop(columns="iou")}, patients=[1, 2, 3])
    with pytest.raises(ValueError, match="The table of methods lacks"):
        over_strongest(rows)
    for scores, patients in (({}, []), ({"a": rows}, [1, 2]), ({"a": rows, "b": rows[:2]}, [1, 2, 3])):
        with pytest.raises(ValueError, match="Each method needs a row for each"):
            localisation_table(scores, patients=patients)


def test_each_method_is_compared_with_the_strongest_trivial_map_of_a_metric():
    columns = ["method", "metric", "value", "over_centre", "over_centre_low", "over_centre_high"]
    columns += ["over_edges", "over_edges_low", "over_edges_high"]
    rows = [
        ("centre", "auroc", 0.8, *[np.nan] * 3, 0.1, 0.0, 0.2),
        ("edges", "auroc", 0.7, -0.1, -0.2, 0.0, *[np.nan] * 3),
        ("grad_cam", "auroc", 0.9, 0.1, 0.05, 0.15, 0.2, 0.1, 0.3),
        ("centre", "pointing", 0.1, *[np.nan] * 3, -0.3, -0.4, -0.2),
        ("edges", "pointing", 0.4, 0.3, 0.2, 0.4, *[np.nan] * 3),
        ("grad_cam", "pointing", 0.3, 0.2, 0.1, 0.3, -0.1, -0.2, 0.0),
    ]
    found = over_strongest(pd.DataFrame(rows, columns=columns))
    assert found.to_numpy().tolist() == [
        ["grad_cam", "auroc", 0.1, 0.05, 0.15, "centre"],
        ["grad_cam", "pointing", -0.1, -0.2, 0.0, "edges"],
    ]
    with pytest.raises(ValueError, match=r"none of 'uniform', .* found 'grad_cam'"):
        over_strongest(pd.DataFrame(rows, columns=columns).query("method == 'grad_cam'"))
