import numpy as np
import pytest

from cspine_helpers.packing.planes import own_plane

PIXEL_MM, STEP_MM, RADIUS_MM = 0.8, 1.5, 16.0


def disc(tilt_deg, roll_deg):
    """A disc of 4 mm, tilted backwards and to one side; the patient's left half is brighter."""
    z, y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (31, 64, 64)), indexing="ij")
    z, y, x = STEP_MM * z, PIXEL_MM * y, PIXEL_MM * x
    t, r = np.radians([tilt_deg, roll_deg])
    depth = np.cos(t) * np.cos(r) * z + np.sin(t) * np.cos(r) * y + np.sin(r) * x
    inside = (np.abs(depth) < 2) & (z**2 + y**2 + x**2 < RADIUS_MM**2)
    array = np.zeros((*z.shape, 6), np.uint8)
    array[..., :5] = np.where(inside, np.where(x > 0, 200, 100), 10)[..., None]
    array[..., 5] = 255 * inside
    return array


@pytest.mark.parametrize(("tilt_deg", "roll_deg"), [(0, 0), (30, 0), (-36, 8), (12, -20)])
def test_the_cut_shows_the_whole_of_a_tilted_disc(tilt_deg, roll_deg):
    array = disc(tilt_deg, roll_deg)
    cut = own_plane(array, pixel_mm=PIXEL_MM, step_mm=STEP_MM)
    assert (cut.shape, cut.dtype) == ((1, 64, 64, 6), np.uint8)
    mask = cut[0, ..., 5] > 127
    whole = np.pi * (RADIUS_MM / PIXEL_MM) ** 2  # in pixels
    assert mask.sum() == pytest.approx(whole, rel=0.06)
    assert np.argwhere(mask).mean(axis=0) == pytest.approx([31.5, 31.5], abs=1)
    assert cut[0, mask][:, 2].max() == 200
    assert cut[0, :, 40:, 2][mask[:, 40:]].mean() > 170 > 120 > cut[0, :, :24, 2][mask[:, :24]].mean()
    if tilt_deg:
        assert (array[..., 5] > 0).sum(axis=(1, 2)).max() < 0.75 * whole  # no axial slice shows it


def test_the_thin_spinous_process_weighs_as_much_as_the_body():
    """A body of 12 mm height with a thin process that runs downwards: the cut holds the tip of it."""
    array = np.zeros((31, 64, 64, 6), np.uint8)
    array[8:17, 8:24, 22:42] = 255
    for y in range(24, 60):
        z = 13 + round((y - 24) * 0.3)
        array[z : z + 2, y, 30:34] = 255
    cut = own_plane(array, pixel_mm=PIXEL_MM, step_mm=STEP_MM)[0, ..., 5] > 127
    reached = np.flatnonzero(cut.any(axis=1))
    assert np.ptp(reached) > 45
    assert cut[reached[0] + 4 : reached[0] + 10, 22:42].all()


def test_what_cannot_be_cut_is_refused():
    for array, lengths in (
        (np.zeros((5, 8, 8, 6), np.uint8), (1.0, 1.0)),
        (np.full((1, 8, 8, 6), 255, np.uint8), (1.0, 1.0)),
        (np.full((5, 8, 8, 6), 255, np.uint8), (1.0, 0.0)),
        (np.full((5, 8, 8, 6), 255, np.uint8), (np.nan, 1.0)),
    ):
        with pytest.raises(ValueError, match=r"two positions or more with a mask.*whole packed sequence"):
            own_plane(array, pixel_mm=lengths[0], step_mm=lengths[1])
