import numpy as np
import pandas as pd
import pytest
import torch
from toy_cohort import make_toy_cohort, tiny_model

from cspine_helpers.checkpoints import Run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.explain.attention import attention_table
from cspine_helpers.explain.localisation import localisation_table
from cspine_helpers.explain.perturbation import (
    CURVES,
    blurred,
    mean_curves,
    perturb_sequences,
    perturbation_areas,
    perturbation_curves,
)
from cspine_helpers.model import FractureClassifier

SHARES = (0, 1 / 64, 2 / 64, 0.5, 1)


def mean_of_corner(images, rows):
    """A network whose whole evidence is the first two pixels of the first slice."""
    return images[:, 0, 0, 0, :2].float().mean(1) / 255


@pytest.fixture(scope="module")
def images():
    made = np.zeros((2, 2, 1, 4, 8), np.uint8)
    made[:, 0, 0, 0, :2] = 255
    return made


def test_the_pixels_that_matter_go_first_and_come_first(images):
    knows = np.zeros((2, 2, 4, 8))
    knows[:, 0, 0, 0], knows[:, 0, 0, 1] = 2, 1
    black = np.zeros_like(images)
    curves = perturbation_curves(mean_of_corner, images, knows, replacement=black, shares=SHARES)
    for _, of_case in curves.groupby("case"):
        assert of_case["deletion"].tolist() == [1, 0.5, 0, 0, 0]
        assert of_case["insertion"].tolist() == [0, 0.5, 1, 1, 1]
    wrong = perturbation_curves(mean_of_corner, images, -knows, replacement=black, shares=SHARES)
    assert wrong[wrong["case"] == 1]["deletion"].tolist() == [1, 1, 1, 1, 0]
    areas = perturbation_areas(curves)
    x, y = np.array(SHARES), np.array([1, 0.5, 0, 0, 0])
    by_hand = sum((y[i] + y[i + 1]) / 2 * (x[i + 1] - x[i]) for i in range(4))
    np.testing.assert_allclose(areas["deletion"], by_hand)
    np.testing.assert_allclose(areas["insertion"], 1 - by_hand)


def test_equal_values_go_in_random_order_by_seed_and_batches_change_nothing():
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)

    def mean(these, rows):
        return these.float().mean((1, 2)) / 255

    flat, black = np.ones((40, 1, 1)), np.zeros_like(images)
    curves = perturbation_curves(mean, images, flat, replacement=black, shares=(0, 0.25, 0.5, 1))
    half = curves[curves["share"] == 0.5]
    assert np.allclose(half["deletion"].mean(), images.mean() / 510, atol=0.01)
    assert half["deletion"].nunique() == 40
    again = perturbation_curves(mean, images, flat, replacement=black, shares=(0, 0.25, 0.5, 1))
    pd.testing.assert_frame_equal(curves, again)
    known = np.random.default_rng(1).random((40, 8, 8))
    one, all_ = (perturbation_curves(mean, images, known, batch_size=size) for size in (1, 40))
    pd.testing.assert_frame_equal(one, all_)


def test_blurring_keeps_the_mean_and_loses_the_detail():
    image = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)
    soft = blurred(image)
    assert soft.dtype == np.uint8
    assert abs(soft.mean() - image.mean()) < 3
    assert soft.std() < image.std() / 8
    np.testing.assert_array_equal(blurred(image[1]), soft[1])


def test_a_runs_curves_begin_at_its_probability_and_leave_the_mask_alone(tmp_path, one_thread):
    torch.manual_seed(0)
    model = FractureClassifier(tiny_model()).eval()
    run = Run(tmp_path, model, model.config, 0.5, {})
    cohort = read_cohort(make_toy_cohort(tmp_path / "toy", studies=6))
    samples = cohort.samples["train"][:5]
    rng = np.random.default_rng(0)
    maps = {"noise": rng.random((5, 5, 8, 8)), "uniform": np.ones((5, 5, 32, 32))}
    curves = perturb_sequences(run, samples, cohort.packed, maps, shares=(0, 0.3, 1), batch_size=2)
    table = attention_table(run, samples, cohort.packed)
    sharp = table["probability"][:: model.config.slices].to_numpy()
    for _, its in curves.groupby("method", sort=False):
        assert its["vertebra"].tolist() == samples["vertebra"].repeat(3).tolist()
        ends = its.set_index("share")
        np.testing.assert_allclose(ends.loc[0, "deletion"], sharp, atol=1e-6)
        np.testing.assert_allclose(ends.loc[1, "insertion"], sharp, atol=1e-6)
        np.testing.assert_allclose(ends.loc[0, "insertion"], ends.loc[1, "deletion"], atol=1e-6)
    scores = {name: perturbation_areas(its) for name, its in curves.groupby("method")}
    found = localisation_table(scores, patients=samples["StudyInstanceUID"], metrics=CURVES)
    assert found["metric"].tolist() == [*CURVES, *CURVES]
    drawn = mean_curves(curves).set_index(["method", "curve", "share"])
    at = curves[(curves["method"] == "noise") & (curves["share"] == 0.3)]
    assert drawn.loc[("noise", "insertion", 0.3), "probability"] == pytest.approx(at["insertion"].mean())
    limits = drawn.dropna()
    assert (limits["low"] <= limits["high"]).all()


def test_what_has_no_order_is_refused(images):
    fine = np.ones((2, 2, 4, 8))
    for maps in (fine[:1], fine[:, :1], fine[0], fine[:0]):
        with pytest.raises(ValueError, match="of the images' cases and slices"):
            perturbation_curves(mean_of_corner, images, maps)
    with pytest.raises(ValueError, match="NaN or infinite"):
        perturbation_curves(mean_of_corner, images, fine * np.nan)
    for shares in ((0, 0.5), (0.1, 1), (0, 0.5, 0.5, 1), (1,)):
        with pytest.raises(ValueError, match="shares rise from 0 to 1"):
            perturbation_curves(mean_of_corner, images, fine, shares=shares)
    with pytest.raises(ValueError, match="A batch holds 1 case or more; found a batch size of 0"):
        perturbation_curves(mean_of_corner, images, fine, batch_size=0)
    for sigma in (-1, 0, np.nan):
        with pytest.raises(ValueError, match="pixels above 0; found shape"):
            blurred(images, sigma_px=sigma)
    rows = pd.DataFrame({"method": "a", "share": [0, 1], "deletion": [1, 0], "insertion": [0, 1]})
    with pytest.raises(ValueError, match="whose patients are not given, lacks"):
        mean_curves(rows)
    with pytest.raises(ValueError, match="found 2 rows and 1 patients"):
        mean_curves(rows, patients=["1"])
    with pytest.raises(ValueError, match="Curves are of one map or more; found none"):
        perturb_sequences(None, rows, "nowhere", {})
    with pytest.raises(ValueError, match="The replacement has shape"):
        perturbation_curves(mean_of_corner, images, fine, replacement=images[:1])
    with pytest.raises(ValueError, match="lacks the column"):
        perturbation_areas(pd.DataFrame({"case": [0]}))
