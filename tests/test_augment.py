import numpy as np
import pytest

from cspine_helpers.augment import Augment, AugmentConfig

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


def test_impossible_augmentation_settings_are_all_named():
    with pytest.raises(ValueError, match=r"flip = 2 .*rotate_degrees = -1 .*holes = 0"):
        AugmentConfig(flip=2, rotate_degrees=-1, holes=0)
