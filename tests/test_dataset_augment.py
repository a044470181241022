import os
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from cspine_helpers.dataset.augment import Augment, AugmentConfig

OFF = {"flip": 0.0, "affine": 0.0, "contrast": 0.0, "noise": 0.0, "dropout": 0.0}
ALWAYS = AugmentConfig(flip=1, affine=1, contrast=1, noise=1, dropout=1)


def only(**steps) -> Augment:
    return Augment(AugmentConfig(**{**OFF, **steps}))


def smooth(seed: int = 0, *, size: int = 64) -> np.ndarray:
    """A smooth `(T, H, W, 6)` sequence whose slices and intensity channels are all the same picture."""
    y, x = np.mgrid[:size, :size] / size
    phase = np.random.default_rng(seed).uniform(0, 6)
    picture = 128 + 60 * np.sin(9 * x + phase) * np.cos(7 * y)
    blob = 255 * ((x - 0.4) ** 2 + (y - 0.55) ** 2 < 0.04)
    channels = np.stack([picture] * 5 + [blob], axis=-1).astype(np.uint8)  # (H, W, 6)
    return np.repeat(channels[None], 15, axis=0)


@pytest.mark.parametrize("step", ["flip", "affine", "contrast", "noise", "dropout"])
@pytest.mark.parametrize("seed", range(4))
def test_every_step_is_one_draw_for_the_whole_sequence(step, seed):
    sequence = smooth(seed)
    varied = only(**{step: 1.0})(sequence, seed=(seed,))
    assert varied.shape == sequence.shape
    assert varied.dtype == np.uint8
    assert not np.array_equal(varied, sequence)
    assert (varied == varied[:1]).all()  # equal slices stay equal
    if step != "noise":  # noise differs from channel to channel
        assert (varied[..., :5] == varied[..., :1]).all()
    if step in ("contrast", "noise", "dropout"):
        np.testing.assert_array_equal(varied[..., 5], sequence[..., 5])


@pytest.mark.parametrize("seed", range(6))
def test_the_mask_moves_with_the_image_and_stays_binary(seed):
    sequence = smooth()
    sequence[..., 2] = sequence[..., 5]  # the mask as a picture
    varied = only(flip=0.5, affine=1.0)(sequence, seed=(seed,))
    assert set(np.unique(varied[..., 5])) == {0, 255}
    differs = (varied[..., 2] > 127) != (varied[..., 5] > 127)
    outline = (varied[..., 5] > 127)[0].astype(int)
    edge = np.abs(np.diff(outline, axis=0)).sum() + np.abs(np.diff(outline, axis=1)).sum()
    assert differs[0].sum() <= 0.3 * edge  # nearest against linear: pixels on the outline only


def test_a_pixel_half_covered_by_the_moved_mask_is_mask_and_one_less_covered_is_not():
    (affine,) = (step for step in only(affine=1.0)._compose.transforms if hasattr(step, "move"))
    image = np.zeros((32, 32, 6), np.uint8)
    image[:, 10:20, 5] = 255
    for shift, columns in ((0.5, range(10, 21)), (0.4, range(10, 20)), (0.6, range(11, 21))):
        (moved,) = affine.move([image], np.array([[1, 0, shift], [0, 1, 0], [0, 0, 1.0]]))
        assert np.flatnonzero(moved[16, :, 5] == 255).tolist() == list(columns)
        assert set(np.unique(moved[..., 5])) == {0, 255}


@pytest.mark.parametrize("step", ["flip", "affine", "contrast", "noise", "dropout"])
@pytest.mark.parametrize("seed", range(4))
def test_every_step_does_what_albumentations_would_with_the_same_draw(step, seed):
    sequence = np.stack([smooth(phase, size=48)[0] for phase in range(5)])  # slices that differ
    augment = only(**{step: 1.0})
    varied = augment(sequence, seed=(seed,))
    (ours,) = (each for each in augment._compose.transforms if each.params)
    params, theirs = dict(ours.params), type(ours).__bases__[-1]
    assert theirs.__module__.startswith("albumentations")
    if step == "noise":
        params["noise_map"] = params["brighter"][..., :5].astype(np.float32) - params["darker"][..., :5]
    for result, image in zip(varied, sequence, strict=True):
        expected = theirs.apply(ours, image[..., :5].copy(), **params)
        difference = np.abs(result[..., :5].astype(int) - expected)
        assert difference.max() <= {"affine": 8, "contrast": 1}.get(step, 0)  # rounding
        assert difference.mean() < 0.6
        mask = image[..., 5].copy()
        if step == "affine":
            mask = theirs.apply_to_mask(ours, mask, **params)  # nearest pixels; ours is interpolated
        if step == "flip":
            mask = theirs.apply(ours, mask)
        assert (result[..., 5] != mask).mean() <= (0.01 if step == "affine" else 0)


def moves(*, seeds: int = 200, size: int = 64, **limits) -> np.ndarray:
    """Degrees turned, size across and down, shift across and down: a row a seed, from moved coordinates."""
    y, x = np.mgrid[:size, :size]
    sequence = np.stack([3 * x + 32, 3 * y + 32, *[0 * x] * 4], axis=-1).astype(np.uint8)[None]
    inner, centre = slice(20, -20), (size - 1) / 2
    here = np.stack([*(axis[inner, inner].ravel() - centre for axis in (x, y)), np.ones((size - 40) ** 2)], 1)
    augment, found = only(affine=1.0, **limits), []
    for seed in range(seeds):
        seen = augment(sequence, seed=(seed,))[0, inner, inner, :2].reshape(-1, 2).astype(float)
        back = np.linalg.lstsq(here, (seen - 32) / 3 - centre, rcond=None)[
            0
        ].T  # (2, 3): whence each pixel came
        (xx, xy, dx), (yx, yy, dy), _ = np.linalg.inv(np.vstack([back, [0, 0, 1]]))
        angle, across, down = np.arctan2(yx, xx), np.hypot(xx, yx), np.hypot(xy, yy)
        found.append((np.degrees(angle), across, down, dx / size, dy / size))
    return np.array(found)


STILL = {"rotate_degrees": 0, "scale": 0, "shift": 0}


def test_rotations_go_to_either_side_up_to_the_limit():
    angle, across, down, *shift = moves(**STILL | {"rotate_degrees": 20}).T
    assert -20.1 < angle.min() < -18
    assert 18 < angle.max() < 20.1
    assert abs(angle.mean()) < 2
    np.testing.assert_allclose([across, down], 1, atol=0.01)
    np.testing.assert_allclose(shift, 0, atol=0.01)


def test_sizes_grow_and_shrink_up_to_the_limit_and_keep_their_proportions():
    angle, across, down, *shift = moves(**STILL | {"scale": 0.2}).T
    assert 0.79 < across.min() < 0.83
    assert 1.17 < across.max() < 1.21
    np.testing.assert_allclose(across, down, atol=0.005)
    np.testing.assert_allclose(angle, 0, atol=0.5)
    np.testing.assert_allclose(shift, 0, atol=0.01)


def test_shifts_go_to_all_four_sides_up_to_the_limit():
    angle, across, down, *shift = moves(**STILL | {"shift": 0.1}).T
    for one in shift:
        assert -0.105 < one.min() < -0.08
        assert 0.08 < one.max() < 0.105
    assert abs(np.corrcoef(shift)[0, 1]) < 0.3  # each side has a draw of its own
    np.testing.assert_allclose([across, down], 1, atol=0.01)
    np.testing.assert_allclose(angle, 0, atol=0.5)


def test_brightness_and_contrast_rise_and_fall_up_to_the_limit():
    values = np.arange(96, 144)  # which stay between black and white
    ramp = np.tile(values.astype(np.uint8)[:, None, None], (1, 1, 64, 6))
    augment = only(
        contrast=1.0, contrast_limit=0.25
    )  # not the limit that albumentations would take by itself
    seen = [augment(ramp, seed=(seed,))[0, :, 0, 0].astype(float) for seed in range(200)]
    slope, offset = np.polyfit(values, np.transpose(seen), 1)
    for found in (slope - 1, offset / 255):
        assert -0.26 < found.min() < -0.22
        assert 0.22 < found.max() < 0.26
    assert abs(np.corrcoef(slope, offset)[0, 1]) < 0.3


def test_a_hole_has_a_side_between_half_the_largest_and_the_largest():
    white = np.full((1, 100, 100, 6), 255, np.uint8)
    augment, sides = only(dropout=1.0, holes=1, hole_size=0.3), []
    for seed in range(200):
        hole = augment(white, seed=(seed,))[0, ..., 0] == 0
        sides.append((hole.any(axis=0).sum(), hole.any(axis=1).sum()))
        assert hole.sum() == np.prod(sides[-1])  # one rectangle
    for side in np.transpose(sides):
        assert 15 <= side.min() <= 16
        assert 29 <= side.max() <= 30


def test_there_are_one_to_the_most_holes_and_each_number_occurs():
    white = np.full((1, 200, 200, 6), 255, np.uint8)
    augment = only(dropout=1.0, holes=3, hole_size=0.03)  # so small that few touch each other
    numbers = [ndimage.label(augment(white, seed=(seed,))[0, ..., 0] == 0)[1] for seed in range(200)]
    assert np.bincount(numbers)[1:].min() > 40
    assert set(numbers) == {1, 2, 3}


@pytest.mark.parametrize("step", ["affine", "contrast", "noise", "dropout"])
def test_every_part_of_the_seed_decides_what_a_step_draws(step):
    seeds = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1), (2, 0, 0), (0, 2, 0), (0, 0, 2)]
    sequence, augment = smooth(size=32)[:2], only(**{step: 1.0})
    assert len({augment(sequence, seed=seed).tobytes() for seed in seeds}) == len(seeds)
    again = [only(**{step: 1.0})(sequence, seed=seed) for seed in reversed(seeds)]  # in another order, too
    np.testing.assert_array_equal(again[::-1], [augment(sequence, seed=seed) for seed in seeds])


@pytest.mark.parametrize("step", ["flip", "affine", "contrast", "noise", "dropout"])
def test_a_step_is_taken_as_often_as_its_probability_says(step):
    sequence, augment = smooth(size=32)[:1], only(**{step: 0.25})
    varied = [not np.array_equal(augment(sequence, seed=(seed,)), sequence) for seed in range(400)]
    assert 70 <= sum(varied) <= 130  # 100 expected, standard deviation 8.7


def test_noise_has_mean_zero_and_a_spread_within_its_limit():
    grey = np.full((1, 128, 128, 6), 128, np.uint8)
    augment = only(noise=1.0, noise_std=0.04)
    noise = np.stack([augment(grey, seed=(seed,))[0, ..., :5].astype(int) - 128 for seed in range(40)])
    spreads = noise.std(axis=(1, 2, 3)) / 255
    assert np.abs(noise.mean(axis=(1, 2, 3))).max() < 0.2
    assert spreads.min() < 0.008 < 0.032 < spreads.max() < 0.041  # uniform up to the limit


def test_noise_and_contrast_stop_at_black_and_white():
    sequence = np.zeros((2, 32, 32, 6), np.uint8)
    sequence[:, :16] = 255
    config = AugmentConfig(**{**OFF, "noise": 1.0, "contrast": 1.0, "noise_std": 0.04})
    for seed in range(8):
        varied = Augment(config)(sequence, seed=(seed,))[..., :5].astype(int)
        assert varied[:, :16].min() > 128 > varied[:, 16:].max()  # nothing wraps around


def test_a_draw_that_changes_nothing_copies_the_sequence():
    sequence = smooth(size=32)
    varied = only()(sequence, seed=(0,))
    np.testing.assert_array_equal(varied, sequence)
    assert not np.shares_memory(varied, sequence)


def test_a_sequence_is_varied_into_the_place_it_is_given():
    place = np.zeros((15, 32, 32, 6), np.uint8)
    sequence = smooth(size=32)
    assert Augment(ALWAYS)(sequence, seed=(0,), out=place) is place
    np.testing.assert_array_equal(place, Augment(ALWAYS)(sequence, seed=(0,)))
    np.testing.assert_array_equal(sequence, smooth(size=32))  # which is left as it was


@pytest.mark.parametrize("slices", [1, 2, 5])
def test_any_number_of_slices_and_sides_of_any_length_can_be_varied(slices):
    sequence = np.random.default_rng(1).integers(0, 256, (slices, 21, 34, 6), dtype=np.uint8)
    sequence[..., 5] = 255 * (sequence[..., 5] > 127)
    varied = Augment(ALWAYS)(sequence, seed=(2,))
    assert (varied.shape, varied.dtype) == (sequence.shape, np.uint8)


def test_a_flip_exchanges_left_and_right():
    sequence = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 6), dtype=np.uint8)
    np.testing.assert_array_equal(only(flip=1.0)(sequence, seed=(0,)), sequence[:, :, ::-1])


def test_dropout_blackens_holes_in_every_slice_and_channel():
    varied = only(dropout=1.0)(np.full((3, 64, 64, 6), 200, np.uint8), seed=(1,))
    black = varied[..., :5] == 0
    assert 0 < black.mean() < 0.1
    assert (varied[..., :5][~black] == 200).all()


def test_steps_are_drawn_independently():
    sequence = smooth(size=32)
    augment = Augment(AugmentConfig(**{**OFF, "flip": 0.5, "noise": 0.5}))
    seen = []
    for seed in range(200):
        varied = augment(sequence, seed=(seed,))
        seen.append((varied[0, 0, 0, 5], np.array_equal(varied[..., 5], sequence[..., 5]), varied))
    flipped = np.array([not same for _, same, _ in seen])
    noisy = np.array([(varied[0, ..., 0] != varied[0, ..., 1]).any() for *_, varied in seen])
    assert 70 < flipped.sum() < 130
    assert 70 < noisy.sum() < 130
    assert 30 < (flipped & noisy).sum() < 70  # a shared seed would give all or nothing


@pytest.mark.parametrize("name", list(AugmentConfig.__dataclass_fields__))
def test_the_ends_of_every_range_are_allowed_and_what_lies_beyond_is_refused(name):
    least, most, beyond = {"rotate_degrees": (0, 180, 180.5), "holes": (1, 50, 0)}.get(name, (0, 1, 1.01))
    for value in (least, most):
        AugmentConfig(**{name: value})
    for value in (least - 0.01, beyond):
        with pytest.raises(ValueError, match=f"cannot have {name} = "):
            AugmentConfig(**{name: value})


def test_impossible_augmentation_settings_are_all_named():
    with pytest.raises(ValueError, match=r"flip = 2 .*rotate_degrees = -1 .*holes = 0"):
        AugmentConfig(flip=2, rotate_degrees=-1, holes=0)


@pytest.mark.slow
def test_the_network_is_not_asked_for_a_newer_albumentations():
    code = (
        "import sys, urllib.request\n"
        "def refuse(*arguments, **options): sys.exit('asked the network')\n"
        "urllib.request.OpenerDirector.open = refuse\n"
        "import cspine_helpers.dataset.augment"
    )
    usual = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    subprocess.run([sys.executable, "-c", code], check=True, env=usual)
