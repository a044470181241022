import cv2
import numpy as np
import pytest
from scipy import ndimage

from cspine_helpers.radiographs.augment import ImageAugment, Variation

OFF = {"flip": 0, "vertical_flip": 0, "affine": 0, "gamma": 0, "contrast": 0, "noise": 0, "blur": 0}
FIXED = {"rotate_degrees": 0, "shrink": 0, "enlarge": 0, "shift": 0}


def only(**steps) -> Variation:
    return Variation(ImageAugment(**{**OFF, **steps}))


def picture(height: int = 96, width: int = 64) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return (110 + 60 * np.sin(x / 7) * np.cos(y / 9)).astype(np.uint8)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("patch", [None, 32])
def test_mask_and_image_move_together(seed, patch):
    image = np.zeros((96, 64), np.uint8)
    cv2.circle(image, (30, 55), 4, 255, -1)  # the same drawn point in both
    steps = {"flip": 0.5, "vertical_flip": 0.5, "affine": 1}
    moved, mask = only(**steps)(image, image.copy(), seed=(seed,), patch=patch)
    np.testing.assert_array_equal(moved, mask)
    assert mask.max() == 255


@pytest.mark.parametrize("seed", range(6))
def test_the_affine_step_is_what_scipy_makes_of_the_drawn_matrix(seed):
    image, vary = picture(), only(flip=0.5, vertical_flip=0.5, affine=1)
    moved, _ = vary(image, None, seed=(seed,))
    drawn = {type(step).__name__: step for step in vary._compose.transforms if step.params}
    expected = image.astype(float)
    if "_Flip" in drawn:
        expected = expected[:, ::-1]
    if "_VerticalFlip" in drawn:
        expected = expected[::-1]
    swap = np.array(
        [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    )  # scipy counts rows first, and asks whence a pixel comes
    back = swap @ np.linalg.inv(drawn["_Affine"].params["matrix"]) @ swap
    inner = ndimage.affine_transform(np.ones((96, 64)), back, order=1) == 1
    expected = ndimage.affine_transform(expected, back, order=1)
    assert inner.sum() > 2000
    difference = np.abs(moved - expected)[inner]
    assert difference.max() <= 6  # OpenCV interpolates in steps of 1/32 pixel
    assert difference.mean() < 0.8


def moved_points(*, seeds: int = 150, **limits) -> np.ndarray:
    """Degrees turned, size, shift across and down of each seed, from two points drawn and found again."""
    vary, found = only(affine=1, **{**FIXED, **limits}), []
    for seed in range(seeds):
        points = []
        for left in (57, 97):  # the middles of the squares are (59.5, 72.5) and (99.5, 72.5)
            image = np.zeros((160, 160), np.uint8)
            image[70:76, left : left + 6] = 250
            seen = vary(image, None, seed=(seed,))[0].astype(float)
            points.append([seen.sum(axis=axis) @ np.arange(160) / seen.sum() for axis in (0, 1)])
        line, middle = np.subtract(points[1], points[0]), np.mean(points, axis=0) - [79.5, 72.5]
        found.append((np.degrees(np.arctan2(line[1], line[0])), np.hypot(*line) / 40, *middle / 160))
    return np.array(found)


def test_turns_sizes_and_shifts_reach_their_limits_and_pass_none():
    angle, *_ = moved_points(rotate_degrees=25).T
    assert -25.5 < angle.min() < -23
    assert 23 < angle.max() < 25.5
    _, size, *_ = moved_points(shrink=0.2, enlarge=0.25).T
    assert np.exp(-0.2) - 0.01 < size.min() < 0.84
    assert 1.25 < size.max() < np.exp(0.25) + 0.01
    _, _, *shift = moved_points(shift=0.06).T
    for along in shift:
        assert -0.063 < along.min() < -0.055
        assert 0.055 < along.max() < 0.063


@pytest.mark.parametrize("step", ["gamma", "contrast", "noise", "blur"])
@pytest.mark.parametrize("seed", range(3))
def test_every_step_of_grey_levels_does_what_albumentations_would_and_leaves_the_mask(step, seed):
    image, mask, vary = picture(), 255 * (picture() > 130).astype(np.uint8), only(**{step: 1})
    varied, same = vary(image, mask, seed=(seed,))
    np.testing.assert_array_equal(same, mask)
    (ours,) = (each for each in vary._compose.transforms if each.params)
    theirs = type(ours).__bases__[-1]
    assert theirs.__module__.startswith("albumentations")
    expected = theirs.apply(ours, image.copy(), **ours.params)
    difference = np.abs(varied.astype(int) - expected)
    assert difference.max() <= 1  # rounding
    assert not np.array_equal(varied, image)


def test_steps_of_probability_0_are_off():
    image = picture()
    for seed in range(20):
        np.testing.assert_array_equal(only()(image, None, seed=(seed,))[0], image)


def test_the_same_seed_is_the_same_variation_and_another_is_another():
    always = dict.fromkeys(OFF, 1.0)
    vary, image = Variation(ImageAugment(**always)), picture()
    one, again, other = (vary(image, image, seed=seed) for seed in ((3, 1, 5), (3, 1, 5), (3, 2, 5)))
    for mine, theirs in zip(one, again, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert not np.array_equal(one[0], other[0])


def test_steps_are_drawn_independently():
    steps = {"flip": 0.5, "vertical_flip": 0.5, "noise": 0.5}
    vary, image, seen = only(**steps), picture(), []
    for seed in range(300):
        vary(image, None, seed=(seed,))
        seen.append([bool(step.params) for step in vary._compose.transforms if step.p])
    seen = np.array(seen, float)
    np.testing.assert_allclose(seen.mean(axis=0), 0.5, atol=0.1)
    assert np.abs(np.corrcoef(seen.T) - np.eye(3)).max() < 0.2


@pytest.mark.parametrize(
    "wrong", [{"flip": 1.5}, {"noise": -0.1}, {"rotate_degrees": 200}, {"blur_std": 0}, {"shift": "much"}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImageAugment(**wrong)


# Patches.


@pytest.mark.parametrize("patch", [32, None])
def test_the_smallest_fracture_in_a_corner_stays_inside(patch):
    vary, brought_back = Variation(ImageAugment(affine=1, shift=0.2)), 0
    for seed in range(60):
        mask = np.zeros((96, 64), np.uint8)
        mask[(3, -4)[seed % 2], (3, -4)[seed // 2 % 2]] = 255
        image = np.where(mask, 255, 40).astype(np.uint8)
        varied, moved = vary(image, mask, seed=(seed,), patch=patch)
        assert moved.max() > 0
        # the image moved with it: what is brightest there is the fracture
        assert varied.ravel()[moved.argmax()] > np.median(varied)
        at = np.unravel_index(moved.argmax(), moved.shape)
        brought_back += min(*at, *(np.array(moved.shape) - 1 - at)) in (3, 4)
    assert brought_back > 10


def test_patches_have_the_scale_of_the_whole_image_and_lie_inside_it():
    image, corners = np.zeros((96, 64), np.uint8), set()
    image[:] = np.random.default_rng(0).integers(1, 255, image.shape)
    windows = np.lib.stride_tricks.sliding_window_view(image, (32, 32))
    for seed in range(30):
        patch, _ = only()(image, None, seed=(seed,), patch=32)
        ((top, left),) = np.argwhere((windows == patch).all(axis=(2, 3)))  # cut out, nothing else
        corners.add((int(top), int(left)))
    assert len(corners) > 20


def test_patches_of_intact_images_lie_about_the_body():
    image = np.full((96, 64), 8, np.uint8)
    image[60:80, 40:56] = 160
    for seed in range(30):
        patch, _ = only()(image, None, seed=(seed,), patch=32)
        assert patch.max() == 160
    nothing = np.zeros((96, 64), np.uint8)
    assert only()(nothing, None, seed=(0,), patch=32)[0].shape == (32, 32)
