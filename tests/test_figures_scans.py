from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from cspine_helpers.figures.scans import COLOURS, contact_sheet, study_views
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.packed import PackedVertebra
from cspine_helpers.packing.crop import PackConfig, pack_vertebra
from cspine_helpers.phantom.rendering import render_study


def packed(hu, label_map, spacing_mm, **config):
    there = [name for number, name in enumerate(VERTEBRAE, 1) if (label_map == number).any()]
    return {
        name: pack_vertebra(hu, label_map, spacing_mm, name, PackConfig(size=64, **config)) for name in there
    }


@pytest.fixture(scope="module")
def phantom():
    """C5 is fractured."""
    return render_study(7, 0, {**dict.fromkeys(VERTEBRAE, 0), "C5": 1})


@pytest.fixture(scope="module")
def study(phantom):
    """A phantom as (volume, label map, pieces)."""
    maps = (phantom.volume_hu.astype(np.int16), phantom.label_map, phantom.spacing_mm)
    return SimpleNamespace(hu=maps[0], spacing_mm=maps[2]), maps[1], packed(*maps)


def by_hand(first, stop, rows, columns):
    """A piece of 3 slices at these places; its picture doesn't matter."""
    return PackedVertebra(
        np.zeros((3, 8, 8, 6), np.uint8), np.linspace(first, stop - 1, 3).astype(int), rows, columns, 1.0
    )


def words(axes):
    return [text.get_text() for text in axes.texts]


def boxes(axes):
    return {box.get_edgecolor()[:3]: box.get_bbox().extents.tolist() for box in axes.patches}


def notes_of(figure):
    return figure.texts[1].get_text()


def test_boxes_lie_where_the_pieces_were_cut(study):
    _, _, pieces = study
    side, front = contact_sheet(*study).axes[:2]
    for name, piece in pieces.items():
        first, last = piece.slice_indices[0], piece.slice_indices[-1] + 1
        colour = to_rgb(COLOURS[name])
        assert boxes(side)[colour] == [piece.rows[0], first, piece.rows[1], last]
        assert boxes(front)[colour] == [piece.columns[0], first, piece.columns[1], last]
    assert len(boxes(side)) == len(boxes(front)) == 7


def test_every_box_and_every_slice_bears_its_name(study):
    side, front, *tiles, about = contact_sheet(*study, title="1.2.3").axes
    assert words(side)[-7:] == words(front)[-7:] == list(VERTEBRAE)
    assert [words(axes) for axes in tiles] == [["R", "L", "10 mm", name] for name in VERTEBRAE]
    assert words(about)[0] == "7 of 7 packed\n0 notes"


def test_slices_are_the_middle_ones_as_packed_with_the_mask_outlined(study):
    tiles = contact_sheet(*study).axes[2:9]
    for axes, piece in zip(tiles, study[2].values(), strict=True):
        middle = piece.array[7]
        np.testing.assert_array_equal(axes.images[0].get_array(), middle[..., 2])
        (outline,) = axes.collections
        ys, xs = np.nonzero(middle[..., 5])
        low, high = outline.get_paths()[0].get_extents().get_points()
        np.testing.assert_allclose([low, high], [[xs.min(), ys.min()], [xs.max(), ys.max()]], atol=0.6)


def test_the_scale_bar_of_a_slice_is_that_of_its_crop(study):
    volume, _, pieces = study
    for axes, piece in zip(contact_sheet(*study).axes[2:9], pieces.values(), strict=True):
        (bar,) = axes.lines
        voxels = np.ptp(bar.get_xdata()) * (piece.columns[1] - piece.columns[0]) / piece.array.shape[2]
        assert voxels * volume.spacing_mm[2] == pytest.approx(10, rel=0.03)  # crops are square to a voxel


def test_a_vertebra_without_a_piece_is_named_in_its_place(study):
    volume, label_map, pieces = study
    rest = {name: pieces[name] for name in reversed(VERTEBRAE) if name not in ("C2", "C7")}
    side, _, *tiles, about = contact_sheet(volume, label_map, rest, notes=["one"]).axes
    expected = [f"{name} missing" if name in ("C2", "C7") else name for name in VERTEBRAE]
    assert [words(axes)[-1] for axes in tiles] == expected
    assert words(side)[-5:] == ["C1", "C3", "C4", "C5", "C6"]
    assert words(about)[0] == "5 of 7 packed\n1 note"


@pytest.mark.parametrize("every", [1, 5])
def test_millimetres_are_equally_long_in_every_direction_and_view(study, every):
    volume, label_map, _ = study
    z, y, x = volume.spacing_mm
    spacing = (z * every, y, x * 0.5)  # no two alike
    coarse = SimpleNamespace(hu=volume.hu[::every], spacing_mm=spacing)
    pieces = packed(coarse.hu, label_map[::every], spacing)
    figure = contact_sheet(coarse, label_map[::every], pieces)
    figure.draw_without_rendering()
    lengths = []
    for axes, across in zip(figure.axes[:2], spacing[1:], strict=True):
        origin, right, down = axes.transData.transform([(0, 0), (10 / across, 0), (0, 10 / spacing[0])])
        assert (
            right[0] > origin[0]
        )  # voxel numbers rise to the right: front, and the patient's right, are left
        assert down[1] < origin[1]  # and downwards: cranial is up
        lengths += [right[0] - origin[0], origin[1] - down[1]]
    np.testing.assert_allclose(lengths, lengths[0], rtol=0.01)


@pytest.mark.parametrize(("shape", "at"), [((30, 50, 40), (12, 31, 20)), ((40, 1300, 50), (12, 640, 22))])
def test_a_voxel_is_seen_at_its_index(shape, at):
    """In large CTs, which are thinned out, too: there to within the voxels that became one."""
    hu, label_map = np.full(shape, -1000, np.int16), np.zeros(shape, np.uint8)
    z, y, x = at
    hu[z : z + 3, y : y + 3, x : x + 3] = 3000
    label_map[z : z + 3, y : y + 3, x : x + 3] = 4
    volume = SimpleNamespace(hu=hu, spacing_mm=(1.0, 0.1, 0.1))
    pieces = {"C4": by_hand(z, z + 3, (y - 8, y + 11), (x - 8, x + 11))}
    for axes, across in zip(contact_sheet(volume, label_map, pieces).axes[:2], (y, x), strict=True):
        (image,) = axes.images
        picture = image.get_array()
        assert max(picture.shape) <= 512
        left, right, bottom, top = image.get_extent()
        rows, columns = np.nonzero(picture[..., 0] > 0)
        steps = ((bottom - top) / picture.shape[0], (right - left) / picture.shape[1])
        assert top + rows.min() * steps[0] == pytest.approx(z, abs=0.01)
        assert top + (rows.max() + 1) * steps[0] == pytest.approx(z + 3, abs=steps[0])
        assert left + columns.min() * steps[1] == pytest.approx(across, abs=steps[1])
        assert left + (columns.max() + 1) * steps[1] == pytest.approx(across + 3, abs=steps[1])


@pytest.mark.parametrize("names", [VERTEBRAE, VERTEBRAE[::-1]], ids=["right", "upside down"])
def test_the_cuts_follow_a_crooked_spine_and_tint_its_masks(names):
    """Small cubes far apart along Y and X, packed or not: no plane would meet them all."""
    label_map = np.zeros((90, 80, 100), np.uint8)
    pieces = {}
    for place, name in enumerate(names, 1):
        z, y, x = 12 * place - 6, 10 + 8 * place, 12 * place
        label_map[z : z + 5, y : y + 5, x : x + 5] = VERTEBRAE.index(name) + 1
        if name != "C4":
            pieces[name] = by_hand(z, z + 5, (y - 5, y + 10), (x - 5, x + 10))
    volume = SimpleNamespace(hu=np.full(label_map.shape, -1000, np.int16), spacing_mm=(1.0, 1.0, 1.0))
    for axes in contact_sheet(volume, label_map, pieces).axes[:2]:
        picture = axes.images[0].get_array()
        tints = np.unique(picture[picture.any(axis=-1)], axis=0)
        colours = [to_rgb(COLOURS[name]) for name in VERTEBRAE]
        hues = [tint / tint.max() for tint in tints]
        for colour in colours:
            assert any(np.allclose(hue, np.divide(colour, max(colour)), atol=0.01) for hue in hues)
        assert len(tints) == 7


def test_boxes_past_the_edge_are_within_the_picture():
    volume = SimpleNamespace(hu=np.zeros((40, 50, 40), np.int16), spacing_mm=(1.0, 0.5, 0.5))
    label_map = np.zeros(volume.hu.shape, np.uint8)
    label_map[30:40, :, :] = 7
    pieces = {"C7": by_hand(30, 40, (-20, 75), (-90, 60))}
    for axes, (start, stop) in zip(
        contact_sheet(volume, label_map, pieces).axes[:2], ((-20, 75), (-90, 60)), strict=True
    ):
        low, high = axes.get_xlim()
        bottom, top = axes.get_ylim()
        assert low < start
        assert stop < high
        assert bottom > 40
        assert top == -3  # mm past the cranial edge: C1 … C6 may be anywhere above
        left, right, *_ = axes.images[0].get_extent()
        assert (left, right) == (0, volume.hu.shape[1 if start == -20 else 2])


def test_a_long_scan_is_shown_around_the_boxes_alone():
    volume = SimpleNamespace(hu=np.zeros((600, 30, 30), np.int16), spacing_mm=(1.0, 1.0, 1.0))
    label_map = np.zeros(volume.hu.shape, np.uint8)
    label_map[200:220] = 3
    axes = contact_sheet(volume, label_map, {"C3": by_hand(200, 220, (0, 30), (0, 30))}).axes[0]
    bottom, top = axes.get_ylim()
    assert (top, bottom) == (200 - 30 - 2 * 18, 220 + 30 + 4 * 18)  # with room for two levels and for four
    assert axes.images[0].get_array().shape[0] <= bottom - top + 2


def test_notes_are_printed_whole_and_within_the_sheet(study):
    notes = [f"note {i}: " + "the CT ends here, look twice " * 8 for i in range(4)]
    figure = contact_sheet(*study, title="1.2.826.0.1." * 12, notes=[*notes, "no formula: $\\frac$"])
    printed = " ".join(notes_of(figure).split())
    assert printed == " ".join("• " + " ".join(note.split()) for note in [*notes, "no formula: $\\frac$"])
    figure.draw_without_rendering()
    sheet = figure.bbox
    for text in figure.texts:
        extent = text.get_window_extent()
        assert sheet.x0 <= extent.x0 < extent.x1 <= sheet.x1
        assert sheet.y0 <= extent.y0 < extent.y1 <= sheet.y1
    pictures_end = min(axes.get_window_extent().y0 for axes in figure.axes)
    assert figure.texts[1].get_window_extent().y1 < pictures_end
    assert figure.texts[0].get_window_extent().y0 > max(axes.get_window_extent().y1 for axes in figure.axes)


@pytest.mark.parametrize("length", [5, 1000])
def test_notes_that_do_not_fit_are_counted(study, length):
    notes = [f"n{i} " + "x" * length for i in range(40)]
    *lines, last = notes_of(contact_sheet(*study, notes=notes)).split("\n")
    shown = sum(line.startswith("• n") for line in lines)
    assert shown >= 3
    assert last == f"and {40 - shown} more"
    assert len(lines) <= 9


def test_a_study_without_any_piece_has_a_sheet(study):
    volume, label_map, _ = study
    figure = contact_sheet(volume, np.zeros_like(label_map), {}, notes=["no vertebra was found"])
    assert [text for axes in figure.axes[2:9] for text in words(axes)] == [f"{n} missing" for n in VERTEBRAE]
    assert not boxes(figure.axes[0])
    assert figure.axes[0].images[0].get_array().shape[:2] == label_map.shape[:2]
    assert figure._repr_png_()


def test_wrong_label_maps_are_drawn(study):
    """Upside down, and vertebrae of one voxel: this is where such mistakes are found."""
    volume, label_map, _ = study
    upside_down = np.where(label_map > 0, 8 - label_map, 0).astype(np.uint8)
    specks = np.zeros_like(label_map)
    for number in range(1, 8):
        specks[20 * number, 60, 60] = number
    for wrong in (upside_down, specks):
        pieces = packed(volume.hu, wrong, volume.spacing_mm, slices=3)
        figure = contact_sheet(volume, wrong, pieces)
        assert len(boxes(figure.axes[1])) == 7
        assert figure._repr_png_()


def test_another_shape_and_unknown_names_are_refused(study):
    volume, label_map, pieces = study
    with pytest.raises(ValueError, match=r"one shape; found .*Resample the label map"):
        contact_sheet(volume, label_map[1:], pieces)
    with pytest.raises(ValueError, match=r"named C1, .*, C7; found 'T1', 'C8'"):
        contact_sheet(volume, label_map, {"C1": pieces["C1"], "T1": pieces["C7"], "C8": pieces["C7"]})


def test_a_sheet_that_was_saved_shows_itself_as_it_was_saved(study):
    figure = contact_sheet(*study)
    assert figure._repr_png_() == figure._repr_png_()


def test_every_vertebra_has_its_slice_and_broken_ones_say_so(phantom):
    maps = (phantom.volume_hu, phantom.label_map, phantom.spacing_mm)
    figure = study_views(*maps, fracture_map=phantom.fracture_map, title=phantom.uid)
    sagittal, _, *axial = figure.axes
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in axial]
    assert titles == [name + " fractured" * (name == "C5") for name in VERTEBRAE]
    named = [text for text in sagittal.texts if text.get_text() in VERTEBRAE]
    assert [text.get_text() for text in named] == list(VERTEBRAE)
    heights = [text.get_position()[1] for text in named]
    assert heights == sorted(heights)
    assert figure._repr_png_()


def test_vertebrae_that_are_not_there_are_left_out(phantom):
    label_map = np.where(np.isin(phantom.label_map, (4, 5)), phantom.label_map, 0)
    figure = study_views(phantom.volume_hu, label_map, phantom.spacing_mm)
    assert len(figure.axes) == 2 + 2


@pytest.fixture(scope="module")
def blocks() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Volume of which no two voxels are alike, label map of C3 and C5, and fracture map."""
    volume_hu = np.arange(20 * 30 * 24).reshape(20, 30, 24) % 20011 - 1000
    label_map, fracture_map = np.zeros(volume_hu.shape, np.uint8), np.zeros(volume_hu.shape, np.uint8)
    label_map[2:6, 10:16, 8:14] = 3
    label_map[4, 10:16, 6:14] = 3  # the largest cross-section
    label_map[10:15, 14:20, 9:17] = 5
    fracture_map[13, 15:17, 12:14] = 5
    fracture_map[11, 1:12, 1:20] = 5  # larger, but outside the vertebra
    return volume_hu, label_map, fracture_map


def shown(axes) -> np.ndarray:
    (image,) = axes.images
    assert image.get_clim() == (-300, 1200)
    return image.get_array()


def test_each_picture_is_the_plane_it_claims_to_be(blocks):
    volume_hu, label_map, fracture_map = blocks
    figure = study_views(volume_hu, label_map, (2.0, 1.0, 0.5), fracture_map=fracture_map, title="1.2.3")
    side, front, c3, c5 = figure.axes
    np.testing.assert_array_equal(shown(side), volume_hu[:, :, 12])  # between 10 and 13, the boxes' middles
    slopes = (
        np.interp(np.arange(20), [3.5, 12], [10.5, 14.5]).round().astype(int)
    )  # front thirds of the blocks
    np.testing.assert_array_equal(shown(front), volume_hu[np.arange(20), slopes])
    np.testing.assert_array_equal(shown(c3), volume_hu[4])
    np.testing.assert_array_equal(shown(c5), volume_hu[13])  # where its bone is broken
    assert [axes.get_aspect() for axes in figure.axes] == [2, 4, 2, 2]
    assert [len(axes.collections) for axes in figure.axes] == [1, 0, 0, 1]  # contours, where it is broken
    (path,) = c5.collections[0].get_paths()
    assert path.get_extents().bounds == pytest.approx((11.5, 14.5, 2, 2))  # of the vertebra's voxels alone
    named = [(text.get_text(), *text.get_position()) for text in side.texts if text.get_text()[0] == "C"]
    assert named == [("C3", 7, 3.5), ("C5", 11, 12)]
    assert [text.get_position()[0] for text in front.texts if text.get_text()[0] == "C"] == [3, 6]
    assert [text.get_text() for text in figure.texts] == ["1.2.3", ""]


def test_axial_slices_are_squares_of_one_width_around_their_vertebra(blocks):
    volume_hu, label_map, _ = blocks
    figure = study_views(volume_hu, label_map, (2.0, 1.0, 0.5), note="schematic")
    for axes, middle in zip(
        figure.axes[2:], ((9.5, 12.5), (12.5, 16.5)), strict=True
    ):  # of the boxes, (x, y)
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert ((left + right) / 2, (bottom + top) / 2) == pytest.approx(middle)
        assert (right - left) * 0.5 == pytest.approx(bottom - top) == 6 + 8  # mm: the largest, and around it
    assert figure.texts[1].get_text() == "schematic"


def test_views_say_where_right_is_and_how_long_they_are(blocks):
    volume_hu, label_map, _ = blocks
    figure = study_views(volume_hu, label_map, (2.0, 1.0, 0.5))
    for axes, ends, length, mm in zip(
        figure.axes, ("AP", "RL", "RL", "RL"), (20, 20, 10, 10), (1, 0.5, 0.5, 0.5), strict=True
    ):
        letters = {text.get_text(): text.get_ha() for text in axes.texts}
        assert (letters[ends[0]], letters[ends[1]]) == ("left", "right")
        assert f"{length} mm" in letters
        (bar,) = axes.lines
        assert np.ptp(bar.get_xdata()) * mm == pytest.approx(length)
    figure.draw_without_rendering()
    (z, y), x = figure.axes[0].get_window_extent().size[::-1], figure.axes[1].get_window_extent().width
    assert (z / 40, y / 30, x / 12) == pytest.approx([z / 40] * 3, rel=0.02)  # pixels a mm: no gap, one scale


def test_the_view_from_the_front_runs_through_the_dens_behind_the_arch_of_c1():
    labels = np.zeros((20, 40, 9), np.uint8)
    labels[2:5, 4:7] = 1  # the front arch
    labels[2:10, 10:14] = 2  # the dens, behind it
    labels[10:16, 8:20] = 2  # the body
    labels[12:14, 30:36] = 2  # the spinous process
    front = study_views(np.arange(20 * 40 * 9).reshape(20, 40, 9), labels, (1.0, 1.0, 1.0)).axes[1]
    rows = shown(front)[:, 4] // 9 % 40  # which row of the volume each slice shows
    assert all(labels[z, rows[z], 4] == 2 for z in range(2, 16))


def test_without_a_fracture_map_nothing_is_said_to_be_broken(blocks):
    volume_hu, label_map, _ = blocks
    figure = study_views(volume_hu, label_map, (2.0, 1.0, 0.5))
    assert not any(axes.collections for axes in figure.axes)
    c3, c5 = figure.axes[2:]
    assert [axes.get_title(loc="left") for axes in (c3, c5)] == ["C3", "C5"]
    np.testing.assert_array_equal(shown(c5), volume_hu[10])  # the first of equal slices


def test_past_the_edge_of_the_ct_an_axial_slice_is_black(blocks):
    volume_hu, label_map, _ = blocks
    moved = np.roll(label_map, (-12, -6), axis=(1, 2)) * (np.arange(20) > 8)[:, None, None]  # C5 at y 2, x 3
    axes = study_views(volume_hu, moved, (2.0, 1.0, 0.5)).axes[2]
    assert axes.get_xlim()[0] < -0.5
    assert axes.get_facecolor() == (0, 0, 0, 1)
