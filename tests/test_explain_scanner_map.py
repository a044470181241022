"""Maps of sequences, back in the patient; nibabel and SimpleITK say where the written ones lie."""

import json
from dataclasses import asdict
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import scans
import SimpleITK
import torch
from ct_cohort import CONFIG, scanned, write_study
from scans import FRAME, refusal, rotation, write_dicom
from torch.nn import functional
from toy_cohort import tiny_model, toy_sequence

from cspine_helpers import checkpoints
from cspine_helpers.__main__ import main
from cspine_helpers.checkpoints import Run
from cspine_helpers.ct.reading import read_ct
from cspine_helpers.ct.volume import Volume
from cspine_helpers.explain.scanner_map import peaks, scanner_map, study_maps, write_scanner_map
from cspine_helpers.labels import BOX_COLUMNS
from cspine_helpers.model.classifier import FractureClassifier
from cspine_helpers.packed import Crop, write_sequence
from cspine_helpers.packing.crop import PackConfig, pack_vertebra
from cspine_helpers.packing.study import StudyFiles, pack_study

SPACING = (2.0, 1.0, 0.5)


def volume_of(shape=(12, 20, 24), *, direction=FRAME, spacing=SPACING) -> Volume:
    return Volume(np.zeros(shape, np.int16), spacing, np.array(scans.ORIGIN), direction)


def slowly(values: np.ndarray, crop: Crop, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One map on the CT's grid and where it reaches: torch within a slice, NumPy's interp between slices."""
    size = tuple(high - low for low, high in (crop.rows, crop.columns))
    planes = functional.interpolate(torch.from_numpy(values)[:, None], size, mode="bilinear")[:, 0].numpy()
    result, covered = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for y in range(max(crop.rows[0], 0), min(crop.rows[1], shape[1])):
        for x in range(max(crop.columns[0], 0), min(crop.columns[1], shape[2])):
            line = planes[:, y - crop.rows[0], x - crop.columns[0]]
            z = np.arange(crop.slice_indices[0], crop.slice_indices[-1] + 1)
            result[z, y, x] = np.interp(z, crop.slice_indices, line)
            covered[z, y, x] = True
    return result, covered


def test_maps_of_any_resolution_lie_on_the_voxels_that_the_network_saw():
    """Larger and smaller grids than the crop; one reaches out of the CT, and two overlap."""
    rng = np.random.default_rng(0)
    crops = {
        "C3": Crop(np.array([1, 3, 4, 7]), (-3, 9), (4, 20)),
        "C4": Crop(np.array([6, 7, 8, 10]), (4, 12), (10, 30)),
    }
    maps = {"C3": rng.normal(size=(4, 4, 5)), "C4": rng.normal(size=(4, 4, 4)) - 5}
    maps = {name: values.astype(np.float32) for name, values in maps.items()}
    volume = volume_of()
    found = scanner_map(maps, crops, volume)
    each = [slowly(maps[name], crops[name], volume.hu.shape) for name in maps]
    expected = np.max([np.where(covered, values, -np.inf) for values, covered in each], axis=0)
    assert (np.sum([covered for _, covered in each], axis=0) == 2).any()
    np.testing.assert_allclose(found, np.where(np.isfinite(expected), expected, 0), atol=1e-5)
    assert found.dtype == np.float32
    assert found.min() < -1  # where nothing else reaches, what speaks against a fracture is kept


def test_a_slice_that_was_packed_twice_has_the_mean_of_its_maps():
    crop = Crop(np.array([2, 2, 3, 3, 3]), (0, 4), (0, 4))
    values = np.arange(5, dtype=np.float32)[:, None, None] * np.ones((5, 2, 2), np.float32)
    found = scanner_map({"C1": values}, {"C1": crop}, volume_of())
    np.testing.assert_allclose(found[:5, 1, 1], [0, 0, 0.5, 3, 0])


def test_what_packing_shows_where_comes_back_to_the_same_voxel():
    """A bright voxel of a CT, packed as the network sees it; that picture, and its mask, taken for maps."""
    hu, label_map = np.full((20, 60, 70), -1024, np.int16), np.zeros((20, 60, 70), np.uint8)
    label_map[4:16, 30:52, 41:62] = 4
    hu[10, 37, 55] = 3000
    config = PackConfig(slices=7, size=48)
    piece = pack_vertebra(hu, label_map, SPACING, "C4", config)
    assert piece.slice_indices.tolist() == [4, 6, 8, 10, 11, 13, 15]
    bright, mask = (
        scanner_map({"C4": piece.array[..., c].astype(np.float32)}, {"C4": piece}, volume_of(hu.shape))
        for c in (2, 5)
    )
    assert np.unravel_index(bright.argmax(), bright.shape) == (10, 37, 55)
    assert ((mask > 127) == (label_map == 4)).mean() > 0.995


@pytest.mark.parametrize("turn", [(0, 0, 0), (8, -12, 5)])
@pytest.mark.parametrize("orientation", ["IPL", "SAR"])
def test_a_map_of_a_dicom_series_lies_at_the_same_mm_of_the_patient(tmp_path, turn, orientation):
    """Oblique, flipped: the marked voxel's place is what DICOM's own headers say, by SimpleITK."""
    direction = rotation(*turn) @ FRAME
    write_dicom(tmp_path / "ct", scans.body(), SPACING, direction=direction, orientation=orientation)
    volume = read_ct(tmp_path / "ct")
    z, y, x = 4, 11, 9
    values = np.zeros((3, 8, 8), np.float32)
    values[1, y - 8, x - 6] = 2.5
    pieces = {"C5": Crop(np.array([2, z, 6]), (8, 16), (6, 14))}
    written = scanner_map({"C5": values}, pieces, volume)
    assert (written.max(), written[z, y, x]) == (2.5, 2.5)
    paths = write_scanner_map(tmp_path, "1.2.3", written, volume, method="grad_cam", run="mine", with_ct=True)
    assert [path.name for path in paths] == ["1.2.3_grad_cam.nii.gz", "1.2.3_ct.nii.gz"]

    expected = scans.positions(scans.affine_of(SPACING, direction=direction), np.array([z, y, x]))
    map_, ct = (SimpleITK.ReadImage(str(path)) for path in paths)
    index = map_.TransformPhysicalPointToIndex(expected.tolist())
    np.testing.assert_allclose(map_.TransformIndexToPhysicalPoint(index), expected, atol=1e-3)
    assert map_[index] == 2.5
    assert ct[index] == scans.body()[z, y, x]
    image = nibabel.load(paths[0])
    assert image.header["descrip"].item() == b"grad_cam of mine, research only"
    ras = image.affine @ [*np.unravel_index(np.asanyarray(image.dataobj).argmax(), image.shape), 1]
    np.testing.assert_allclose(ras[:3], expected * [-1, -1, 1], atol=1e-3)

    row = peaks({"C5": values}, pieces, volume).iloc[0]
    np.testing.assert_allclose(
        row[["right_mm", "anterior_mm", "superior_mm"]].astype(float), ras[:3], atol=1e-3
    )
    assert (row["vertebra"], row["peak"], row["slice"]) == ("C5", 2.5, z)


@pytest.mark.slow
@scans.needs_ct
def test_on_a_real_series_the_map_lies_where_gdcm_puts_the_slice(tmp_path):
    folder = scans.REAL_CT / "totalsegmentator_example" / "dicom"
    volume = read_ct(folder)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    theirs = reader.Execute()
    place = (9, 200, 310)
    crop = Crop(np.array([place[0] - 2, place[0], place[0] + 3]), (180, 244), (290, 354))
    values = np.zeros((3, 64, 64), np.float32)
    values[1, place[1] - 180, place[2] - 290] = 1.0
    found = scanner_map({"C7": values}, {"C7": crop}, volume)
    (path,) = write_scanner_map(tmp_path, "real", found, volume, method="occlusion")
    mine = SimpleITK.ReadImage(str(path))
    point = volume.points([place])[0].tolist()
    assert mine[mine.TransformPhysicalPointToIndex(point)] == 1.0
    assert theirs[theirs.TransformPhysicalPointToIndex(point)] == volume.hu[place]


def test_a_constant_map_has_no_highest_place_and_a_negative_one_has():
    crop = Crop(np.array([1, 2]), (2, 6), (2, 6))
    flat, low = np.zeros((2, 2, 2)), -np.ones((2, 2, 2))
    low[1, 0, 1] = -0.5
    table = peaks({"C4": low, "C2": flat}, {"C2": crop, "C4": crop}, volume_of()).set_index("vertebra")
    assert table.index.tolist() == ["C2", "C4"]
    assert table.loc["C2"].drop("peak").isna().all()
    assert table.loc["C4", ["peak", "slice"]].tolist() == [-0.5, 2]


def test_maps_that_are_not_of_this_ct_are_refused_by_name(tmp_path):
    volume, values = volume_of(), np.zeros((2, 4, 4))
    crop = Crop(np.array([1, 2]), (2, 6), (2, 6))
    refusal(lambda: scanner_map({}, {}, volume), "no map to place")
    refusal(lambda: scanner_map({"C3": values}, {"C4": crop}, volume), "C3 was cut")
    refusal(lambda: scanner_map({"C4": values[:1]}, {"C4": crop}, volume), "C4", "T = 2", "(1, 4, 4)")
    refusal(lambda: scanner_map({"C4": values + np.nan}, {"C4": crop}, volume), "C4", "NaN")
    for beside in (
        Crop(np.array([11, 12]), (2, 6), (2, 6)),
        Crop(np.array([1, 2]), (20, 24), (2, 6)),
        Crop(np.array([1, 2]), (2, 6), (-6, 0)),
    ):
        refusal(
            lambda beside=beside: scanner_map({"C4": values}, {"C4": beside}, volume), "C4", "outside this CT"
        )
    refusal(lambda: write_scanner_map(tmp_path, "1.2", np.zeros((2, 2, 2)), volume, method="x"), "(2, 2, 2)")
    with pytest.raises(ValueError, match="file names"):
        write_scanner_map(tmp_path, "../1", np.zeros(volume.hu.shape), volume, method="x")
    for method in ("../../evil", "a/b", ""):
        refusal(
            lambda method=method: write_scanner_map(
                tmp_path, "1.2", np.zeros(volume.hu.shape), volume, method=method
            ),
            "letters, digits and '_'",
            repr(method),
        )
    for bad in (np.nan, np.inf, 1e300):
        whole = np.full(volume.hu.shape, bad)
        refusal(
            lambda whole=whole: write_scanner_map(tmp_path, "1.2", whole, volume, method="x"), "1.2", "NaN"
        )
    for call in (scanner_map, peaks):
        refusal(lambda call=call: call({"T1": values}, {"T1": crop}, volume), "C1 … C7", "'T1'")
        refusal(lambda call=call: call({"C4": values[:, :0]}, {"C4": crop}, volume), "C4", "(2, 0, 4)")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def explained(tmp_path, monkeypatch, capsys):
    """The command line with an untrained run of the toy cohort's shape, whose CT were packed as `CONFIG`."""
    torch.manual_seed(0)
    model, packing = (
        FractureClassifier(tiny_model()).eval(),
        {"config": json.loads(json.dumps(asdict(CONFIG)))},
    )
    record = {"data": {"cohort": "ct"}, "cohort": {"packing": packing}}
    run = Run(tmp_path / "checkpoints" / "toy", model, model.config, 0.5, record)
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    monkeypatch.setattr(checkpoints, "load_run", lambda _: run)

    def explain(*arguments: str) -> tuple[int, str, str]:
        return main(["explain", "--run", "toy", "--device", "cpu", *arguments]), *capsys.readouterr()

    return explain


@pytest.mark.slow
def test_the_command_explains_a_packed_study_and_a_ct_alike(explained, tmp_path):
    study = scanned(0)
    write_study(tmp_path / "data" / "ct", study)
    ct = tmp_path / "data" / "ct" / "train_images" / study.uid
    mask = tmp_path / "data" / "ct" / "segmentations" / f"{study.uid}.nii.gz"
    none = pd.DataFrame(columns=list(BOX_COLUMNS))
    pack_study(
        StudyFiles(study.uid, ct, mask, "rsna", None, None, none), tmp_path / "data" / "ct" / "packed", CONFIG
    )

    code, out, _ = explained("--study", study.uid, "--with-ct", "--vertebrae", "C5", "C2")
    *table, map_path, ct_path = out.splitlines()
    assert (code, len(table)) == (0, 3)
    assert [row.split()[0] for row in table[1:]] == ["C2", "C5"]
    assert (
        Path(map_path)
        == tmp_path / "checkpoints" / "toy" / "maps" / study.uid / f"{study.uid}_layer_cam.nii.gz"
    )
    values, volume = (SimpleITK.ReadImage(path) for path in (map_path, ct_path))
    theirs = read_ct(ct)
    places = np.argwhere(study.label_map == 5)[::500]
    for place in places:
        index = volume.TransformPhysicalPointToIndex(theirs.points([place])[0].tolist())
        assert volume[index] == study.volume_hu[tuple(place)]
    assert any(
        values[values.TransformPhysicalPointToIndex(theirs.points([place])[0].tolist())] for place in places
    )

    arguments = (
        "--ct",
        str(ct),
        "--masks",
        str(mask),
        "--vertebrae",
        "C2",
        "C5",
        "--out",
        str(tmp_path / "mine"),
    )
    assert explained(*arguments)[0] == 0
    assert (tmp_path / "mine" / Path(map_path).name).read_bytes() == Path(map_path).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--ct scan", "--ct needs --masks"),
        ("--ct scan --masks mask.nii --cohort ct", "--cohort cannot be used with --ct"),
        ("--ct scan --replace", "--replace cannot be used with a study"),
        ("--images xrays --with-ct", "--with-ct cannot be used with --images"),
        ("--images xrays", "No run at"),
        ("--study 1.2 --masks mask.nii", "--masks cannot be used with --study"),
        ("--study ../2", "cannot be file names"),
        ("--study 1.2.826.0", "No CT of 1.2.826.0 in"),
        (
            "--study 1.2 --method gradient_input --layer backbone",
            "maps no layer's cells; found --layer backbone. Leave it out, or add",
        ),
        ("--images xrays --out here.txt", "here.txt is a file"),
        ("--study 1.2 --method mask", "--method mask is for --images"),
        ("--study 1.2 --out here.txt", "here.txt is a file"),
        ("--study 1.2 --out here.txt/maps", "here.txt is a file"),
    ],
)
def test_what_cannot_be_explained_is_one_sentence(explained, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("words")
    code, out, err = explained(*arguments.split())
    assert (code, out, sentence in err) == (100, "", True), err
    assert not (tmp_path / "checkpoints").exists()


def test_a_long_name_of_a_run_does_not_push_the_notice_out_of_the_header(tmp_path):
    volume = volume_of()
    for run in ("r" * 64, "ü" * 64):
        (path,) = write_scanner_map(
            tmp_path, "1.2", np.zeros(volume.hu.shape), volume, method="integrated_gradients", run=run
        )
        said = nibabel.load(path).header["descrip"].item().decode()
        assert said.startswith(f"integrated_gradients of {run[:20]}")
        assert said.endswith(", research only")


def test_vertebrae_and_layers_that_are_not_there_are_named(tmp_path):
    torch.manual_seed(0)
    model = FractureClassifier(tiny_model()).eval()
    run = Run(tmp_path, model, model.config, 0.5, {})
    refusal(lambda: study_maps(run, tmp_path, "1.2"), "1.2", "no packed", error=FileNotFoundError)
    sequence, _ = toy_sequence(np.random.default_rng(0), fractured=True)
    write_sequence(tmp_path, "1.2", "C3", sequence)
    refusal(lambda: study_maps(run, tmp_path, "1.2", vertebrae=["C3", "C9"]), "no packed C9", "found C3")
    refusal(lambda: study_maps(run, tmp_path, "1.2", layer="backbone.block"), "no layer", "backbone.blocks")
    maps, probability = study_maps(run, tmp_path, "1.2", method="layer_cam")
    assert maps["C3"].shape == (5, 32, 32)
    assert 0 < probability["C3"] < 1
