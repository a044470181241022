import numpy as np
import pytest

from cspine_helpers.ct.volume import bounding_box
from cspine_helpers.packing.crop import PackConfig, pack_vertebra, packed_voxels, to_uint8

SPACING = (2.0, 1.0, 1.0)


def volume_with_block(z=(10, 20), y=(30, 50), x=(40, 60), shape=(40, 80, 100)):
    """Every slice carries its own number times 10 HU; one block is C3."""
    volume = np.repeat(np.arange(shape[0], dtype=np.float32), shape[1] * shape[2]).reshape(shape) * 10
    label_map = np.zeros(shape, np.uint8)
    label_map[z[0] : z[1], y[0] : y[1], x[0] : x[1]] = 3
    return volume, label_map


def test_positions_span_the_vertebra_and_channels_are_neighbouring_slices():
    volume, label_map = volume_with_block()
    config = PackConfig(slices=10, size=28, neighbour_mm=None, window_hu=(0.0, 2550.0))
    piece = pack_vertebra(volume, label_map, SPACING, "C3", config)
    assert piece.array.shape == (10, 28, 28, 6)
    assert piece.array.dtype == np.uint8
    assert piece.slice_indices.tolist() == list(range(10, 20))
    for t, index in enumerate(piece.slice_indices):
        for channel, offset in enumerate(range(-2, 3)):
            assert (piece.array[t, :, :, channel] == index + offset).all()


def test_neighbours_past_the_volume_repeat_its_last_slice():
    volume, label_map = volume_with_block(z=(0, 4))
    config = PackConfig(slices=4, size=28, neighbour_mm=None, window_hu=(0.0, 2550.0))
    piece = pack_vertebra(volume, label_map, SPACING, "C3", config)
    assert piece.array[0, 0, 0, :5].tolist() == [0, 0, 0, 1, 2]


@pytest.mark.parametrize(
    ("spacing", "offsets"),
    [(0.3, [-7, -3, 0, 3, 7]), (1.0, [-2, -1, 0, 1, 2]), (1.25, [-2, -1, 0, 1, 2]), (5.0, [0] * 5)],
)
def test_neighbours_are_the_native_slices_nearest_to_their_distance_in_mm(spacing, offsets):
    volume, label_map = volume_with_block(z=(15, 25))
    config = PackConfig(slices=3, size=28, window_hu=(0.0, 2550.0))
    piece = pack_vertebra(volume, label_map, (spacing, 1.0, 1.0), "C3", config)
    for t, index in enumerate(piece.slice_indices):
        assert piece.array[t, 0, 0, :5].tolist() == [index + offset for offset in offsets]


def test_a_soft_mask_keeps_the_share_of_each_pixel_that_is_vertebra():
    volume, label_map = volume_with_block()
    soft = pack_vertebra(volume, label_map, SPACING, "C3", PackConfig(size=19, margin_mm=4, soft_mask=True))
    hard = pack_vertebra(volume, label_map, SPACING, "C3", PackConfig(size=19, margin_mm=4))
    mask = soft.array[7, :, :, 5]
    assert ((mask > 0) & (mask < 255)).any()
    assert mask.sum() / 255 == pytest.approx(20 * 20 * (19 / 28) ** 2, rel=0.01)  # its area, in packed pixels
    np.testing.assert_array_equal(np.where(mask > 127, 255, 0), hard.array[7, :, :, 5])


def test_a_box_that_is_known_need_not_be_searched():
    volume, label_map = volume_with_block()
    box = bounding_box(label_map, 3)
    found = pack_vertebra(volume, label_map, SPACING, "C3", PackConfig(size=28), box=box)
    searched = pack_vertebra(volume, label_map, SPACING, "C3", PackConfig(size=28))
    np.testing.assert_array_equal(found.array, searched.array)
    assert found.mask_volume_mm3 == searched.mask_volume_mm3


def test_fewer_native_slices_than_positions_repeat_and_the_crop_keeps_its_margin():
    volume, label_map = volume_with_block(z=(10, 13))
    piece = pack_vertebra(volume, label_map, SPACING, "C3", PackConfig(slices=15, size=28, margin_mm=4))
    assert sorted(set(piece.slice_indices.tolist())) == [10, 11, 12]
    assert piece.rows == (26, 54)
    assert piece.columns == (36, 64)
    mask = piece.array[7, :, :, 5]
    assert set(np.unique(mask)) == {0, 255}
    assert (mask[4:24, 4:24] == 255).all()
    assert mask.sum() == 255 * 20 * 20


def test_positions_between_slices_go_to_the_nearest_one():
    volume, label_map = volume_with_block()
    piece = pack_vertebra(volume, label_map, SPACING, "C3", PackConfig(slices=6, size=28))
    assert piece.slice_indices.tolist() == [10, 12, 14, 15, 17, 19]  # of 10, 11.8, 13.6, 15.4, 17.2 and 19


def test_a_single_slice_is_the_middle_one():
    volume, label_map = volume_with_block()
    piece = pack_vertebra(volume, label_map, SPACING, "C3", PackConfig(slices=1, size=28))
    assert piece.slice_indices.tolist() == [15]


def test_the_crop_is_square_in_mm_whatever_the_pixels():
    volume, label_map = volume_with_block(y=(20, 60), x=(45, 55))
    piece = pack_vertebra(volume, label_map, (1.0, 0.5, 1.0), "C3", PackConfig(size=32, margin_mm=0))
    assert (piece.rows[1] - piece.rows[0]) * 0.5 == (piece.columns[1] - piece.columns[0]) * 1.0 == 20


def test_a_crop_past_the_edge_is_filled_with_the_low_end_of_the_window():
    volume, label_map = volume_with_block(y=(0, 20), x=(0, 20))
    piece = pack_vertebra(volume + 500, label_map, SPACING, "C3", PackConfig(size=28, margin_mm=4))
    assert (piece.array[:, :4, :, :5] == 0).all()
    assert (piece.array[:, :, :4, :5] == 0).all()
    assert (piece.array[:, 4:, 4:, :5] > 0).all()


def test_mask_volume_is_in_cubic_mm():
    volume, label_map = volume_with_block()
    assert pack_vertebra(volume, label_map, SPACING, "C3", PackConfig()).mask_volume_mm3 == 10 * 20 * 20 * 2.0


def test_other_vertebrae_are_no_part_of_the_mask():
    """Vertebrae interlock: some of the next one lies inside the box around this one."""
    volume, label_map = volume_with_block()
    label_map[15:20, 40:50, 50:60] = 4  # a quarter of each of the lower slices
    label_map[10:20, 50:54, 30:60] = 4  # and beside the box, in the margin
    piece = pack_vertebra(volume, label_map, SPACING, "C3", PackConfig(slices=10, size=28, margin_mm=4))
    assert piece.mask_volume_mm3 == (5 * 400 + 5 * 300) * 2
    assert (piece.array[..., 5] > 0).sum((1, 2)).tolist() == [400] * 5 + [300] * 5
    assert not piece.array[5:, 14:, 14:, 5].any()


def test_window_ends_map_to_0_and_255_and_values_outside_stay_there():
    hu = np.array([-3000, -500, 400, 1300, 3000])
    assert to_uint8(hu, (-500.0, 1300.0)).tolist() == [0, 0, 128, 255, 255]


def test_bounding_box_agrees_with_argwhere():
    rng = np.random.default_rng(0)
    label_map = (rng.random((9, 8, 7)) > 0.97).astype(np.uint8) * 5
    found = np.argwhere(label_map == 5)
    assert bounding_box(label_map, 5) == tuple(zip(found.min(0), found.max(0) + 1, strict=True))


def test_bad_input_is_refused_by_name():
    volume, label_map = volume_with_block()
    with pytest.raises(ValueError, match=r"Label 1 has no voxel in the label map; found \[0, 3\]"):
        pack_vertebra(volume, label_map, SPACING, "C1", PackConfig())
    with pytest.raises(ValueError, match=r"one of C1, .* found 'C9'"):
        pack_vertebra(volume, label_map, SPACING, "C9", PackConfig())
    with pytest.raises(ValueError, match="must be 3-D and alike"):
        pack_vertebra(volume[1:], label_map, SPACING, "C3", PackConfig())
    with pytest.raises(ValueError, match="three positive lengths"):
        pack_vertebra(volume, label_map, (1.0, 0.0, 1.0), "C3", PackConfig())
    with pytest.raises(ValueError, match="low to high"):
        PackConfig(window_hu=(100.0, 100.0))
    for length in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="neighbour_mm is a length above 0, or None"):
            PackConfig(neighbour_mm=length)
    for options in ({"margin_mm": float("nan")}, {"margin_mm": -1.0}, {"window_hu": (-float("inf"), 0.0)}):
        with pytest.raises(ValueError, match="must be finite"):
            PackConfig(**options)
    with pytest.raises(ValueError, match="must be positive"):
        PackConfig(slices=0)


def test_marked_voxels_are_cut_and_resized_as_the_sequence_is():
    rng = np.random.default_rng(0)
    label_map = np.zeros((9, 30, 30), np.uint8)
    label_map[2:7, 0:20, 12:30] = 3  # the crop reaches out of the volume, above and at the right
    volume, spacing = np.zeros(label_map.shape), (2.0, 1.0, 1.0)
    voxels = rng.random(label_map.shape) < 0.1
    side = 28  # pixels of 1 mm: nothing is resized
    piece = pack_vertebra(volume, label_map, spacing, "C3", PackConfig(size=side))
    assert piece.rows[0] < 0 < 30 < piece.columns[1]
    assert piece.rows[1] - piece.rows[0] == side
    found = packed_voxels(voxels, piece, side)
    inside = np.pad(voxels, ((0, 0), (10, 10), (10, 10)))[piece.slice_indices]
    rows, columns = (slice(first + 10, end + 10) for first, end in (piece.rows, piece.columns))
    np.testing.assert_array_equal(found, inside[:, rows, columns])
    quarters = inside[:, rows, columns].reshape(15, 14, 2, 14, 2).sum(axis=(2, 4))  # of a pixel twice as wide
    np.testing.assert_array_equal(packed_voxels(voxels, piece, side // 2), quarters >= 1)
    np.testing.assert_array_equal(packed_voxels(voxels, piece, side // 2, least_share=0.4), quarters >= 2)
