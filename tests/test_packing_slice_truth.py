from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna

from cspine_helpers.ct.volume import FRAME, Volume
from cspine_helpers.labels import BOX_COLUMNS, UID, VERTEBRAE, read_boxes, read_labels
from cspine_helpers.packed import PackedVertebra
from cspine_helpers.packing.crop import PackConfig, pack_vertebra
from cspine_helpers.packing.slice_truth import (
    PACKED_BOX_COLUMNS,
    known_truth,
    packed_truth,
    read_packed_boxes,
    write_packed_boxes,
)
from cspine_helpers.phantom import cohort as phantom
from cspine_helpers.phantom.rendering import Study, render_study

STUDY = "1.2.3"
SHAPE = (6, 10, 12)  # of the volume worked by hand


class Packed(NamedTuple):
    """A phantom, its packed sequences, and the slice truth of its own packing."""

    study: Study
    pieces: dict[str, PackedVertebra]
    truth: dict[str, str]


CONFIG = PackConfig(slices=11, size=144, margin_mm=2.5)  # finer than the voxels, so that packing only grows


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Packed:
    broken = {"C2", "C3", "C5", "C7"}
    study = render_study(3, 4, {vertebra: int(vertebra in broken) for vertebra in VERTEBRAE})
    arrays = (study.volume_hu, study.label_map, study.spacing_mm)
    pieces = {vertebra: pack_vertebra(*arrays, vertebra, CONFIG) for vertebra in VERTEBRAE}
    rows = phantom.pack_study(study, tmp_path_factory.mktemp("packed"), CONFIG)
    return Packed(study, pieces, {row["vertebra"]: row["slice_truth"] for row in rows})


def turned(array: np.ndarray, way: str) -> np.ndarray:
    """A volume as a scanner that numbers slices and pixels another way stores it."""
    if "reversed" in way:
        array = array[::-1]
    if "swapped" in way:
        array = array.transpose(0, 2, 1)
    if "columns" in way:
        array = array[:, :, ::-1]
    return array[:, ::-1] if "rows" in way else array


def scanned(shape, spacing_mm, *, way: str = "", first: int = 0, tilt: float = 0.0) -> Volume:
    """A volume in the frame, and the frames of the slices that it was stored in, `first` the first number."""
    cos, sin = np.cos(tilt), np.sin(tilt)
    pitch = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    yaw = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    origin, direction = np.array([90.0, -110.0, 700.0]), yaw @ pitch @ FRAME
    where = np.stack([turned(axis, way) for axis in np.indices(shape, dtype=np.int16)], axis=-1)

    def mm(indices):
        return origin + direction @ (indices * np.array(spacing_mm))

    frames = {
        first + number: np.array(
            [
                mm(native[0, 0]),
                mm(native[0, 1]) - mm(native[0, 0]),
                mm(native[1, 0]) - mm(native[0, 0]),
            ]
        )
        for number, native in enumerate(where)
    }
    return Volume(np.zeros(shape, np.int16), spacing_mm, origin, direction, frames)


def boxes_of(*rows: tuple, uid: str = STUDY) -> pd.DataFrame:
    """Boxes of one study: x, y, width, height, slice number."""
    return pd.DataFrame([(uid, *row) for row in rows], columns=list(BOX_COLUMNS))


def hand_volume(**options) -> Volume:
    return scanned(SHAPE, (2.0, 1.0, 0.5), **options)


def hand_labels(**blocks: tuple) -> np.ndarray:
    """A label map: vertebra → (rows, columns) of its block on every slice."""
    label_map = np.zeros(SHAPE, np.uint8)
    for vertebra, (rows, columns) in blocks.items():
        label_map[:, slice(*rows), slice(*columns)] = VERTEBRAE.index(vertebra) + 1
    return label_map


def piece(positions=(0, 1, 2, 3, 4, 5), rows=(0, 10), columns=(0, 12), size=24) -> PackedVertebra:
    """A packed sequence of which only the geometry matters."""
    array = np.zeros((len(positions), size, size, 6), np.uint8)
    return PackedVertebra(array, np.array(positions), rows, columns, 1.0)


def truth_of(boxes, *, label_map, pieces=None, fractured=None, volume=None):
    pieces = {"C3": piece()} if pieces is None else pieces
    volume = volume or hand_volume()
    return packed_truth(boxes, volume, label_map, pieces, uid=STUDY, fractured=fractured)


def edges(table: pd.DataFrame) -> list[list[float]]:
    return table[["slice", "x", "y", "width", "height"]].to_numpy().tolist()


C3_EVERYWHERE = {"C3": ((0, 10), (0, 12))}


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("as the frame", {}),
        ("reversed", {"first": 1}),
        ("columns", {}),
        ("rows", {"first": 17}),
        ("swapped", {}),
        ("reversed swapped columns rows", {"first": 1, "tilt": 0.2}),
    ],
)
def test_boxes_of_a_phantom_give_its_slice_truth_however_its_slices_were_stored(packed, way, options):
    study, pieces, truth = packed
    volume = scanned(study.label_map.shape, study.spacing_mm, way=way, **options)
    stored = replace(study, fracture_map=turned(study.fracture_map, way))
    boxes = pd.DataFrame(phantom.fracture_boxes(stored))
    boxes["slice_number"] += options.get("first", 0)
    found = packed_truth(boxes, volume, study.label_map, pieces, uid=study.uid, fractured=study.labels)
    assert found.slices == truth
    assert found.warnings == ()
    assert sum("x" in marks for marks in truth.values()) == sum(study.labels.values()) == 4


def test_packed_boxes_fit_the_fracture_packed_as_a_picture(packed):
    study, pieces, truth = packed
    volume = scanned(study.label_map.shape, study.spacing_mm, way="swapped rows")
    boxes = pd.DataFrame(
        phantom.fracture_boxes(replace(study, fracture_map=turned(study.fracture_map, "swapped rows")))
    )
    table = packed_truth(boxes, volume, study.label_map, pieces, uid=study.uid, fractured=study.labels).boxes
    assert len(table) == sum(marks.count("x") for marks in truth.values())
    pictures = {}
    for row in table.itertuples():
        number = VERTEBRAE.index(row.vertebra) + 1
        if number not in pictures:
            broken = (study.fracture_map == number).astype(np.float32)
            config = replace(CONFIG, window_hu=(0.0, 1.0))
            pictures[number] = pack_vertebra(
                broken, study.label_map, study.spacing_mm, row.vertebra, config
            ).array[..., 2]
        crop = pieces[row.vertebra].columns
        voxel = CONFIG.size / (crop[1] - crop[0])  # packed pixels
        assert voxel > 1
        shown = pictures[number][row.slice] > 0  # linear: half a voxel beyond the fracture on every side
        for axis, low, high in ((1, row.x, row.x + row.width), (0, row.y, row.y + row.height)):
            found = np.flatnonzero(shown.any(axis=1 - axis))
            assert -0.01 <= low - found[0] <= voxel / 2 + 0.5
            assert -0.01 <= found[-1] + 1 - high <= voxel / 2 + 0.5


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("", [2.0, 4.0, 8.0, 4.0]),  # columns 3 to 7 of 2 to 10, rows 2 to 4 of 0 to 8, two pixels a voxel
        ("columns", [6.0, 4.0, 8.0, 4.0]),  # the slice's columns 3 to 7 are the volume's 12 - 7 to 12 - 3
        ("rows", [2.0, 12.0, 8.0, 4.0]),  # rows 10 - 4 to 10 - 2
        ("swapped", [0.0, 6.0, 4.0, 8.0]),  # x is a row, y is a column
    ],
)
def test_edges_of_pixels_become_edges_of_packed_pixels_in_an_example_by_hand(way, expected):
    pieces = {"C3": piece([1], rows=(0, 8), columns=(2, 10), size=16)}
    found = truth_of(
        boxes_of((3, 2, 4, 2, 1)),
        volume=hand_volume(way=way),
        label_map=hand_labels(**C3_EVERYWHERE),
        pieces=pieces,
    )
    assert edges(found.boxes) == [[0, *expected]]
    assert found.slices == {"C3": "x"}


def test_a_box_is_clipped_to_the_picture_and_stands_at_each_position_that_shows_its_slice():
    pieces = {"C3": piece([1, 1, 2], rows=(2, 8), columns=(4, 10), size=12)}
    label_map = hand_labels(**C3_EVERYWHERE)
    found = truth_of(boxes_of((3, 1, 9, 3, 1), (5, 3, 1, 1.5, 2)), label_map=label_map, pieces=pieces)
    assert edges(found.boxes) == [[0, 0, 0, 12, 4], [1, 0, 0, 12, 4], [2, 2, 2, 2, 3]]
    assert found.boxes[UID].tolist() == [STUDY] * 3
    assert found.boxes["vertebra"].tolist() == ["C3"] * 3
    assert tuple(found.boxes.columns) == PACKED_BOX_COLUMNS


def test_a_box_outside_the_crop_is_reported_and_its_slice_stays_fractured():
    pieces = {"C3": piece([1, 2], rows=(0, 4), columns=(0, 4))}
    label_map = hand_labels(**C3_EVERYWHERE)
    found = truth_of(boxes_of((4, 0, 2, 2, 1), (1, 4, 2, 2, 1)), label_map=label_map, pieces=pieces)
    assert found.boxes.empty
    assert found.slices == {"C3": "x."}
    assert found.warnings == (
        "boxes lie outside the packed crop of C3 (2): slice 1 (x 4, y 0, 2 × 2), slice 1 (x 1, y 4, 2 × 2)",
    )


def test_a_box_belongs_to_the_vertebra_with_most_voxels_inside_it():
    label_map = hand_labels(C3=((0, 5), (0, 12)), C4=((5, 10), (0, 12)))
    pieces = {"C3": piece(), "C4": piece()}
    boxes = boxes_of((2, 3, 3, 3, 0), (2, 4, 3, 3, 1), (2, 4, 3, 2, 2))  # 2 rows of 3; 1 of 3; 1 of 2
    found = truth_of(boxes, label_map=label_map, pieces=pieces)
    assert found.slices == {"C3": "x.x...", "C4": ".x...."}


def test_a_vertebra_labelled_as_intact_cannot_have_a_box_whatever_lies_inside_it():
    label_map = hand_labels(C3=((0, 5), (0, 12)), C4=((5, 10), (0, 12)))
    pieces = {"C3": piece(), "C4": piece()}
    boxes = boxes_of((2, 1, 3, 5, 0))
    assert truth_of(boxes, label_map=label_map, pieces=pieces).slices == {"C3": "x.....", "C4": ""}
    found = truth_of(boxes, label_map=label_map, pieces=pieces, fractured={"C3": 0, "C4": 1})
    assert found.slices == {"C3": "......", "C4": "x....."}
    assert found.boxes["vertebra"].tolist() == ["C4"]


def test_a_voxel_is_inside_a_box_with_its_middle():
    label_map = hand_labels(C3=((4, 5), (4, 5)))
    for x, inside in ((4.4, True), (4.6, False), (2.4, False), (2.6, True)):
        found = truth_of(boxes_of((x, 3, 2, 2, 1)), label_map=label_map)
        assert found.slices == {"C3": ".x...." if inside else ""}


def test_boxes_without_a_voxel_of_a_candidate_belong_to_none_and_are_named():
    label_map = hand_labels(C3=((0, 5), (0, 5)), C4=((0, 5), (5, 10)))
    boxes = boxes_of(
        (6, 6, 3, 3, 0), (5, 0, 3.25, 3, 2), (1, 1, 2, 2, 3), (40, 40, 2, 2, 4), (-9, 1, 2, 2, 5)
    )
    fractured = dict.fromkeys(VERTEBRAE, 0) | {"C3": 1, "C7": 1}
    found = truth_of(boxes, label_map=label_map, fractured=fractured)
    assert found.slices == {"C3": "...x.."}
    assert found.warnings == (
        "boxes belong to none, as they hold no voxel of C3 or C7 on their axial slice (4): "
        "slice 0 (x 6, y 6, 3 × 3), slice 2 (x 5, y 0, 3.25 × 3), slice 4 (x 40, y 40, 2 × 2), "
        "slice 5 (x -9, y 1, 2 × 2)",
    )
    found = truth_of(boxes[:1], label_map=label_map, fractured=dict.fromkeys(VERTEBRAE, 0))
    assert found.slices == {"C3": "......"}
    assert "no voxel of a vertebra, as all are labelled intact, on" in found.warnings[0]


def test_boxes_of_sagittal_slices_belong_to_none():
    volume = scanned(SHAPE, (1.7, 0.9, 0.7), tilt=0.2)
    frames = {
        x: np.array(
            [first := volume.points([[0, 0, x]])[0], *(volume.points([[0, 1, x], [1, 0, x]]) - first)]
        )
        for x in range(SHAPE[2])
    }
    boxes = boxes_of(*((2, 1, 3, 4, x) for x in frames))
    volume = replace(volume, frames=frames)
    found = truth_of(boxes, volume=volume, label_map=hand_labels(**C3_EVERYWHERE))
    assert found.slices == {"C3": ""}
    assert found.boxes.empty
    assert "on their axial slice (12): slice 0 (x 2, y 1, 3 × 4)" in found.warnings[0]


def test_a_slice_beyond_the_volume_holds_no_vertebra():
    for z in (-2, SHAPE[0]):
        volume = hand_volume()
        volume.frames[9] = np.array([volume.points([[z, 0, 0]])[0], *volume.frames[0][1:]])
        boxes = boxes_of((2, 1, 3, 4, 9))
        found = truth_of(boxes, volume=volume, label_map=hand_labels(**C3_EVERYWHERE))
        assert found.slices == {"C3": ""}
        assert "belong to none" in found.warnings[0]


def test_slices_that_the_series_does_not_have_are_an_error_that_lists_them_all():
    boxes = boxes_of((2, 1, 3, 4, 12), (2, 1, 3, 4, 0), (2, 1, 3, 4, 9), (2, 1, 1, 1, 12), (2, 1, 3, 4, 3))
    with pytest.raises(ValueError, match=r"1\.2\.3: its .* not have \(3\): 0, 9, 12; found slices 1 to 6\."):
        truth_of(boxes, volume=hand_volume(first=1), label_map=hand_labels(**C3_EVERYWHERE))


@pytest.mark.parametrize(
    ("label", "boxes", "expected"),
    [
        (0, [], "......"),
        (1, [], ""),
        (None, [], ""),
        (1, [(2, 1, 3, 4, 4), (2, 1, 3, 4, 3), (4, 2, 3, 4, 4)], "...xx."),
        (None, [(2, 1, 3, 4, 4)], "....x."),
    ],
)
def test_slice_truth_by_label_and_boxes(label, boxes, expected):
    for fractured in ({"C3": label}, *([None, {}] if label is None else [])):
        found = truth_of(boxes_of(*boxes), label_map=hand_labels(**C3_EVERYWHERE), fractured=fractured)
        assert found.slices == {"C3": expected}
        assert len(found.boxes) == len(boxes)
        assert found.warnings == ()


@pytest.mark.parametrize("fractured", [{"C3": 1}, None])
def test_boxes_between_the_packed_positions_leave_the_truth_unknown_and_are_named(fractured):
    label_map = hand_labels(**C3_EVERYWHERE)
    pieces = {"C3": piece([0, 2, 4])}
    found = truth_of(
        boxes_of((2, 1, 3, 4, 1), (2, 1, 3, 4, 5)), label_map=label_map, pieces=pieces, fractured=fractured
    )
    assert found.slices == {"C3": ""}
    assert found.boxes.empty
    assert found.warnings == (
        "boxes lie between the packed positions of C3 (2): "
        "slice 1 (x 2, y 1, 3 × 4), slice 5 (x 2, y 1, 3 × 4)",
    )
    boxes = boxes_of((2, 1, 3, 4, 1), (2, 1, 3, 4, 2))
    found = truth_of(boxes, label_map=label_map, pieces=pieces, fractured=fractured)
    assert (found.slices, found.warnings) == ({"C3": ".x."}, ())


def test_boxes_of_a_series_resampled_to_even_steps_leave_no_holes_and_none_is_lost():
    volume, label_map = hand_volume(), hand_labels(**C3_EVERYWHERE)
    heights = [0, 0.3, 1.05, 2.4, 3.7, 5]  # 0.3 is the nearest to none of the volume's slices, 2.4 to two
    frames = {
        number: np.array([volume.points([[z, 0, 0]])[0], [0.5, 0, 0], [0, 1.0, 0]])
        for number, z in enumerate(heights)
    }
    volume = replace(volume, frames=frames)
    for numbers, expected in (((1,), "x....."), ((3,), "..xx.."), ((2, 3, 4), ".xxxx."), ((5,), ".....x")):
        boxes = boxes_of(*((2, 1, 3, 4, number) for number in numbers))
        assert truth_of(boxes, volume=volume, label_map=label_map).slices == {"C3": expected}


def test_without_slice_numbers_the_labels_alone_speak():
    volume, label_map = replace(hand_volume(), frames=None), hand_labels(**C3_EVERYWHERE)
    pieces = {"C3": piece(), "C4": piece()}
    options = {"volume": volume, "label_map": label_map, "pieces": pieces, "fractured": {"C3": 1, "C4": 0}}
    found = truth_of(boxes_of((2, 1, 3, 4, 1), (2, 1, 3, 4, 2)), **options)
    assert found.slices == {"C3": "", "C4": "......"}
    assert found.boxes.empty
    (warning,) = found.warnings
    assert warning.startswith(
        "its boxes (2) cannot be mapped, as the volume's slices have no numbers (NIfTI)"
    )
    assert truth_of(boxes_of(), **options).warnings == ()


def test_boxes_of_a_vertebra_that_was_not_packed_go_to_no_other():
    label_map = hand_labels(C3=((0, 5), (0, 12)), C4=((5, 10), (0, 12)))
    found = truth_of(boxes_of((2, 4, 3, 4, 1)), label_map=label_map, pieces={"C3": piece()})
    assert found.slices == {"C3": ""}
    assert found.warnings == ("boxes belong to C4, which was not packed (1): slice 1 (x 2, y 4, 3 × 4)",)


def test_boxes_of_other_studies_change_nothing():
    label_map = hand_labels(**C3_EVERYWHERE)
    mine, others = boxes_of((2, 1, 3, 4, 1)), boxes_of((2, 1, 3, 4, 99), uid="1.2")
    found = truth_of(pd.concat([others, mine, others]), label_map=label_map)
    assert found.slices == {"C3": ".x...."}
    assert len(found.boxes) == 1


def test_boxes_that_are_none_and_a_label_map_on_another_grid_are_refused():
    label_map = hand_labels(**C3_EVERYWHERE)
    with pytest.raises(ValueError, match=r"lacks the column\(s\) 'width'"):
        truth_of(boxes_of((2, 1, 3, 4, 1)).drop(columns="width"), label_map=label_map)
    with pytest.raises(ValueError, match=r"The table of boxes of 1\.2\.3 is refused"):
        truth_of(boxes_of((2, 1, 0, 4, 1)), label_map=label_map)
    with pytest.raises(ValueError, match=r"found shapes \(6, 10, 11\) and \(6, 10, 12\)\. Resample"):
        truth_of(boxes_of(), label_map=label_map[:, :, 1:])


@needs_rsna
def test_real_boxes_mark_the_slices_that_show_a_fractured_vertebra():
    """Boxes, labels and slices' vertebrae of RSNA 2022, in volumes of 8 pixels a voxel and 1 mm a slice.

    Where a slice shows several vertebrae, the map holds one that is labelled as fractured. In two studies
    (1363, 27016) the list of slices contradicts the labels, so that no box has a vertebra.
    """
    boxes, table = (
        read_boxes(RSNA / "train_bounding_boxes.csv"),
        read_labels(RSNA / "train.csv").set_index(UID),
    )
    shown = pd.read_csv(RSNA / "slice_vertebrae.csv", dtype={UID: str})
    backwards = set((RSNA / "reversed_slice_order.txt").read_text().split())
    studies = sorted(set(boxes[UID]) & set(shown[UID]))
    assert (len(studies), len(backwards & set(studies))) == (40, 4)
    strays = {}
    for uid in studies:
        # 1. The series as numbered, and the volume from the head down.
        fractured = table.loc[uid, list(VERTEBRAE)].astype(int)
        visible = shown[shown[UID] == uid].sort_values("SliceNumber")[list(VERTEBRAE)].to_numpy()
        ranks = visible * (1 + fractured.to_numpy())  # the fractured before the intact ones
        level = np.where(ranks.any(axis=1), ranks.argmax(axis=1) + 1, 0)  # (Z,) by number
        numbers = np.arange(len(level))[:: -1 if uid in backwards else 1]  # (Z,) by height
        label_map = np.broadcast_to(level[numbers, None, None], (len(level), 64, 64)).astype(np.uint8)
        volume = Volume(
            np.zeros(label_map.shape, np.int16), (1.0, 4.0, 4.0), np.array([90.0, -110, 700]), FRAME
        )
        frames = {
            number: np.array([volume.points([[z, -7 / 16, -7 / 16]])[0], [0.5, 0, 0], [0, 0.5, 0]])
            for z, number in enumerate(numbers.tolist())
        }
        volume = replace(volume, frames=dict(sorted(frames.items())))
        places = {name: np.flatnonzero(level[numbers] == n) for n, name in enumerate(VERTEBRAE, start=1)}
        pieces = {name: piece(at, (0, 64), (0, 64), size=32) for name, at in places.items() if len(at)}
        truth = packed_truth(boxes, volume, label_map, pieces, uid=uid, fractured=fractured.to_dict())
        # 2. From the tables alone: a box is of its slice's vertebra, where that is broken.
        mine = boxes[boxes[UID] == uid]
        names = np.array(["", *VERTEBRAE])[level[mine["slice_number"]]]
        known = np.array([fractured.get(name, 0) == 1 for name in names])
        for name in pieces:
            broken = set(mine["slice_number"][known & (names == name)])
            marks = "".join(".x"[number in broken] for number in numbers[places[name]])
            assert truth.slices[name] == (marks if broken or fractured[name] == 0 else "")
        left, top, width, height = mine.loc[known, ["x", "y", "width", "height"]].to_numpy().T / 16
        wanted = np.clip([left, top, left + width, top + height], 0, 32)
        left, top, width, height = truth.boxes[["x", "y", "width", "height"]].to_numpy().T
        found = np.array([left, top, left + width, top + height])
        np.testing.assert_allclose(found[:, np.lexsort(found)], wanted[:, np.lexsort(wanted)], atol=1e-6)
        strays[uid.rpartition(".")[2]] = (~known).sum()
        warned = [warning for warning in truth.warnings if f"axial slice ({(~known).sum()}): " in warning]
        assert len(warned) == len(truth.warnings) == (not known.all())
    assert (sum(strays.values()), strays["1363"], strays["27016"]) == (46, 7, 2)


def packed_boxes() -> pd.DataFrame:
    rows = [
        (STUDY, "C3", 0, 1.5, 0.0, 3.0, 4.0),
        (STUDY, "C3", 1, 0.0, 2.0, 3.0, 4.0),
        ("1.10", "C7", 14, 0, 0, 1, 2),
    ]
    return pd.DataFrame(rows, columns=list(PACKED_BOX_COLUMNS))


def test_packed_boxes_come_back_from_their_file_also_when_there_are_none(tmp_path):
    path = tmp_path / "packed" / "boxes.csv"
    for table in (packed_boxes(), packed_boxes()[:0]):
        write_packed_boxes(table, path)
        expected = table.astype({UID: "str", "vertebra": "str"})
        pd.testing.assert_frame_equal(read_packed_boxes(path), expected, check_column_type=False)


def test_packed_boxes_that_are_not_there_or_were_changed_are_not_read(tmp_path):
    path = tmp_path / "boxes.csv"
    with pytest.raises(FileNotFoundError, match=r"No table of packed boxes at .* Packing a cohort"):
        read_packed_boxes(path)
    write_packed_boxes(packed_boxes(), path)
    path.write_text(path.read_text().replace("1.5", "2.5"))
    with pytest.raises(ValueError, match="is not the file that was written"):
        read_packed_boxes(path)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("vertebra", "C8", r"none of C1, .*C7 \(1\): '1.10 C8'"),
        ("vertebra", np.nan, r"none of C1, .*C7 \(1\): '1.10 nan'"),
        ("slice", -1, r"not whole numbers from 0 \(1\): '1.10 C7: -1'"),
        ("slice", 0.5, r"not whole numbers from 0 \(1\): '1.10 C7: 0.5'"),
        ("x", -0.5, r"not finite numbers from 0 \(1\): '1.10 C7 x: -0.5'"),
        ("y", np.inf, r"not finite numbers from 0 \(1\): '1.10 C7 y: inf'"),
        ("y", "top", r"not finite numbers from 0 \(1\): '1.10 C7 y: top'"),
        ("width", 0, r"not finite numbers above 0 \(1\): '1.10 C7 width: 0"),
        ("height", -1, r"not finite numbers above 0 \(1\): '1.10 C7 height: -1"),
        (UID, "../1", r"\.\./1"),
    ],
)
def test_packed_boxes_that_are_none_are_neither_written_nor_read(tmp_path, column, value, message):
    table, path = packed_boxes().astype(object), tmp_path / "boxes.csv"
    table.loc[2, column] = value
    with pytest.raises(ValueError, match=message):
        write_packed_boxes(table, path)
    assert not path.exists()
    table.to_csv(path, index=False)
    with pytest.raises(ValueError, match=message):
        read_packed_boxes(path)
    with pytest.raises(ValueError, match=rf"lacks the column\(s\) '{column}'"):
        write_packed_boxes(table.drop(columns=column), path)


def facts(table, boxes, slices=None) -> list[tuple[int, int]]:
    """Known and of, row by row."""
    return known_truth(table, boxes, slices)[["known", "of"]].to_records(index=False).tolist()


def test_what_tables_know_is_counted_as_by_hand():
    names = [UID, "patient_overall", *VERTEBRAE]
    rows = [("1", 1, 1, 1, 0, 0, 0, 0, 0), ("2", 1, 0, 0, 0, 0, 0, 0, 1), ("3", 0, *[0] * 7)]
    table = pd.DataFrame([*rows, ("4", 1, 0, 1, 0, 0, 1, 0, 0)], columns=names)
    drawn = [("1", 5), ("1", 5), ("1", 6), ("2", 40), ("elsewhere", 2)]  # study and slice
    boxes = pd.DataFrame([(uid, 1, 1, 2, 2, number) for uid, number in drawn], columns=BOX_COLUMNS)
    assert facts(table, boxes) == [(2, 3), (1, 3), (0, 3), (3, 5), (1, 5), (23, 23), (24, 28)]
    columns = [UID, "SliceNumber", *VERTEBRAE]
    both, first = (1, 1, 0, 0, 0, 0, 0), (0, 1, 1, 0, 0, 0, 0)
    slices = pd.DataFrame([("1", 5, *both), ("1", 6, *first), ("1", 7, *both)], columns=columns)
    assert facts(table, boxes, slices) == [(2, 3), (1, 3), (2, 3), (3, 5), (2, 5), (23, 23), (25, 28)]
    with pytest.raises(ValueError, match="The table of slices"):
        known_truth(table, boxes, slices.assign(C1=2))


@needs_rsna
def test_rsnas_own_tables_know_the_truth_of_few_fractured_vertebrae():
    """The counts of studies and vertebrae are in plain loops here."""
    table, boxes = read_labels(RSNA / "train.csv"), read_boxes(RSNA / "train_bounding_boxes.csv")
    slices = pd.read_csv(RSNA / "slice_vertebrae.csv")
    broken = {row[0]: [v for v, n in zip(VERTEBRAE, row[2:], strict=True) if n] for row in table.to_numpy()}
    shown = {(row[0], row[1]): row[2:] for row in slices.to_numpy()}
    certain, named = set(), 0
    for uid, number in {*zip(boxes[UID], boxes["slice_number"], strict=True)}:
        names = broken[uid]
        if len(names) == 1:
            certain.add((uid, names[0]))
        if (uid, number) in shown:
            named += 1
            there = [v for v in names if shown[uid, number][VERTEBRAE.index(v)]]
            certain |= {(uid, there[0])} if len(there) == 1 else set()
    found = facts(table, boxes, slices)
    assert found[:4] == [(235, 961), (726, 961), (named, 7217), (465, 1444)]
    assert found[4] == (len(certain), 1444)
    assert found[5:] == [(12689, 12689), (12689 + len(certain), 2019 * 7)]
