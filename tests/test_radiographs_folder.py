import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image
from radiograph_folders import draw_radiograph
from radiograph_runs import TINY, Runs, packed_cohort

from cspine_helpers.__main__ import main
from cspine_helpers.checkpoints import Run
from cspine_helpers.decisions.test_split import freeze
from cspine_helpers.decisions.thresholds import Rule, choose_decision
from cspine_helpers.radiographs import folder as room
from cspine_helpers.radiographs import task
from cspine_helpers.radiographs.annotations import decode_rle
from cspine_helpers.radiographs.cohort import read_radiograph_cohort
from cspine_helpers.radiographs.folder import explain_folder, find_radiographs, predict_folder
from cspine_helpers.radiographs.images import Frame, read_radiograph
from cspine_helpers.radiographs.maps import map_radiographs
from cspine_helpers.radiographs.model import RadiographModel
from cspine_helpers.radiographs.prediction import Predictor, predict_radiographs
from cspine_helpers.runs import read_record, write_record

FRACTURED = 0.3  # from here on, in these tests


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return packed_cohort(tmp_path_factory.mktemp("radiographs"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, cohort):
    """Makes a run folder of a stand-in, once a name."""
    runs = Runs(cohort, tmp_path_factory.mktemp("runs"))
    with runs.loaded():
        yield runs


@pytest.fixture(scope="module")
def xrays(tmp_path_factory) -> Path:
    """Nested, of several kinds, names with spaces and umlauts, three files damaged, two of other kinds."""
    folder, rng = tmp_path_factory.mktemp("xrays"), np.random.default_rng(0)
    pixels = [draw_radiograph(rng, fractures=n % 2, height=150, width=110).pixels for n in range(4)]
    (folder / "ward 3" / "größe").mkdir(parents=True)
    Image.fromarray(pixels[0]).save(folder / "a.png")
    Image.fromarray(pixels[1]).save(folder / "ward 3" / "left hand.JPG", format="jpeg")
    Image.fromarray(pixels[2]).save(folder / "ward 3" / "größe" / "b.tif")
    write_dicom(pixels[3], folder / "ward 3" / "IM000001")
    (folder / "zero.png").write_bytes(b"")
    (folder / "torn.jpg").write_bytes((folder / "ward 3" / "left hand.JPG").read_bytes()[:900])
    (folder / "ward 3" / "words.dcm").write_text("not an image")
    Image.fromarray(pixels[0][:20]).save(folder / "strip.png")
    (folder / "notes.txt").write_text("not an image")
    (folder / "README").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def write_dicom(pixels, path, photometric="MONOCHROME2"):
    found = pydicom.Dataset()
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = pydicom.uid.ComputedRadiographyImageStorage
    found.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    found.SOPClassUID, found.SOPInstanceUID, found.Modality = found.file_meta[0x00020002].value, "1.2.3", "CR"
    found.Rows, found.Columns = pixels.shape
    found.SamplesPerPixel, found.BitsAllocated, found.BitsStored, found.HighBit = 1, 8, 8, 7
    found.PixelRepresentation, found.PhotometricInterpretation = 0, photometric
    found.PixelData = pixels.tobytes()
    found.save_as(path, enforce_file_format=True)


def write_dicom_without_image(path, sop_class):
    found = pydicom.Dataset()
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID, found.file_meta.MediaStorageSOPInstanceUID = sop_class, "1.2"
    found.FileSetID, found.DirectoryRecordSequence = "X", []
    found.save_as(path, enforce_file_format=True)


def test_every_radiograph_is_answered_and_damaged_files_are_named(xrays, made, tmp_path):
    out = tmp_path / "answers"
    found = predict_folder(made("one"), xrays, out, threshold=FRACTURED)
    table = pd.read_csv(out / "predictions.csv")
    assert table["file"].tolist() == [
        "a.png",
        "ward 3/IM000001",
        "ward 3/left hand.JPG",
        "ward 3/größe/b.tif",
    ]
    pd.testing.assert_frame_equal(table, found.table, check_dtype=False)
    predictor = Predictor.of(made("one"))
    masks = pd.read_csv(out / "masks.csv").set_index("file")
    for row in table.itertuples():
        image = read_radiograph(xrays / row.file)
        answer = predictor.predict(image)
        assert row.probability == answer.probability
        assert row.called == (answer.probability >= FRACTURED)
        assert (row.height, row.width) == image.shape
        mask = masks.loc[row.file]
        np.testing.assert_array_equal(decode_rle(mask["mask"], mask["height"], mask["width"]), answer.mask)
        assert row.mask_pixels == answer.mask.sum()
    damaged = pd.read_csv(out / "unreadable.csv")
    assert damaged["file"].tolist() == ["strip.png", "torn.jpg", "zero.png", "ward 3/words.dcm"]
    assert damaged["reason"][0] == "it has 110 × 20 pixels, and needs 32 a side"
    assert damaged["reason"].tolist()[2] == "it is empty (0 bytes)"
    assert damaged["reason"].str.len().min() > 10
    assert not damaged["reason"].str.contains(str(xrays), regex=False).any()
    assert found.others == 2
    said = found.summary()
    assert "4 radiographs" in said
    assert (
        "Not readable (4), see unreadable.csv: 'strip.png', 'torn.jpg', 'zero.png', 'ward 3/words.dcm'"
        in said
    )
    assert "no all-clear" in said
    assert [path.name for path in tmp_path.iterdir()] == ["answers"]


def test_pictures_show_what_is_marked_on_the_image_itself(xrays, made, tmp_path):
    found = predict_folder(made("one"), xrays, tmp_path / "out", threshold=1.0)
    marked = found.table[found.table["mask_pixels"] > 0]["file"].tolist()
    assert marked
    pictures = tmp_path / "out" / "overlays"
    assert sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png")) == sorted(
        f"{name}.png" for name in marked
    )
    for name in marked:
        image = read_radiograph(xrays / name)
        picture = np.array(Image.open(pictures / f"{name}.png"))
        coloured = (picture != picture[..., :1]).any(axis=-1)
        np.testing.assert_array_equal(picture[~coloured][:, 0], image[~coloured])
        mask = Predictor.of(made("one")).predict(image).mask
        near = cv2.dilate(mask, np.ones((5, 5), np.uint8)) - cv2.erode(mask, np.ones((5, 5), np.uint8))
        assert coloured.any()
        assert (near[coloured] > 0).all()


def test_pictures_are_left_out_when_asked(xrays, made, tmp_path):
    predict_folder(made("one"), xrays, tmp_path / "out", threshold=0.0, overlays=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "masks.csv",
        "predictions.csv",
        "unreadable.csv",
    ]


def test_every_format_that_is_read_is_looked_for(tmp_path):
    picture = Image.fromarray(draw_radiograph(np.random.default_rng(0)).pixels)
    names = ["a.bmp", "b.gif", "c.jfif", "d.jp2", "e.jpe", "f.pgm", "g.webp"]
    for name in names:
        picture.save(tmp_path / name)
        assert read_radiograph(tmp_path / name).shape == (160, 128)
    assert [path.name for path in find_radiographs(tmp_path)[0]] == names


def test_a_picture_of_a_name_that_is_too_long_with_its_ending_has_a_shorter_one(made, tmp_path):
    (folder := tmp_path / "long").mkdir()
    draw = Image.fromarray(draw_radiograph(np.random.default_rng(0)).pixels)
    for letter in "ab":
        draw.save(folder / f"{'x' * 246}{letter}.png")
    found = predict_folder(made("one"), folder, tmp_path / "out", threshold=0.0)
    assert len(found.table) == 2
    assert len({*(tmp_path / "out" / "overlays").iterdir()}) == 2


def test_no_name_is_in_the_way_of_anothers_picture(xrays, made, tmp_path):
    """A file x beside a folder x.png; names alike but for capitals; a folder too long as text."""
    (folder := tmp_path / "names").mkdir()
    deep = os.fsdecode(b"\xe9" * 60)
    names = ["X.png/y.png", "a.png", "A.PNG", "a.png-2", f"{deep}/z.png", "x"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(xrays / ("ward 3/IM000001" if name in ("x", "a.png-2") else "a.png"), folder / name)
    found = predict_folder(made("one"), folder, tmp_path / "out", threshold=0.0)
    assert len(found.table) == 6
    assert found.unreadable.empty
    pictures = [path for path in (tmp_path / "out" / "overlays").rglob("*") if path.is_file()]
    places = [path.relative_to(tmp_path / "out" / "overlays").as_posix() for path in pictures]
    assert len({place.casefold() for place in places}) == 6
    assert {"X.png/y.png.png", "x-2.png"} <= {*places}


def test_what_cannot_be_opened_is_named_and_the_rest_is_answered(xrays, made, tmp_path, monkeypatch):
    (folder := tmp_path / "some").mkdir()
    (folder / "closed").mkdir()
    for name in ("open.png", "closed/in.png", "locked"):
        shutil.copyfile(xrays / "a.png", folder / name)
    scan, is_dicom = os.scandir, room._is_dicom

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    def opened(path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return is_dicom(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(room, "_is_dicom", opened)
    found = predict_folder(made("one"), folder, tmp_path / "out", threshold=0.5)
    assert found.table["file"].tolist() == ["open.png"]
    assert dict(found.unreadable.itertuples(index=False)) == {
        "closed": "it is a folder that cannot be opened: Permission denied",
        "locked": "Permission denied",
    }
    (folder / "open.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"What cannot be opened \(2\): '.*locked', '.*closed'\."):
        find_radiographs(folder)


def test_dicom_that_holds_no_image_is_another_file(xrays, made, tmp_path):
    (folder := tmp_path / "cd").mkdir()
    shutil.copyfile(xrays / "ward 3" / "IM000001", folder / "IM1")
    for name, sop_class in {
        "DICOMDIR": pydicom.uid.MediaStorageDirectoryStorage,
        "SR1": pydicom.uid.BasicTextSRStorage,
        "state.dcm": pydicom.uid.GrayscaleSoftcopyPresentationStateStorage,
    }.items():
        write_dicom_without_image(folder / name, sop_class)
    write_dicom_without_image(folder / "lost.dcm", pydicom.uid.ComputedRadiographyImageStorage)
    write_dicom_without_image(folder / "own", "1.2.3.4")  # a manufacturer's, which may be an image
    found = predict_folder(made("one"), folder, tmp_path / "out", threshold=0.5)
    assert found.table["file"].tolist() == ["IM1"]
    assert found.others == 3
    assert found.unreadable["file"].tolist() == ["lost.dcm", "own"]


def test_pictures_known_to_be_inverted_are_turned_bright_and_dicom_is_as_it_says(made, tmp_path):
    folder, dark = tmp_path / "bright", tmp_path / "dark"
    pixels = draw_radiograph(np.random.default_rng(0), hardware=True).pixels
    for place, shown in ((folder, pixels), (dark, 255 - pixels)):
        place.mkdir()
        Image.fromarray(shown).save(place / "a.png")
        write_dicom(shown, place / "b.dcm", "MONOCHROME2" if place == folder else "MONOCHROME1")
    one = predict_folder(made("one"), folder, tmp_path / "one", threshold=0.0)
    other = predict_folder(made("one"), dark, tmp_path / "other", threshold=0.0, inverted=True)
    pd.testing.assert_frame_equal(one.table, other.table)
    for name in ("masks.csv", "overlays/a.png.png", "overlays/b.dcm.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert one.table["mask_pixels"].min() > 0


@pytest.mark.parametrize("options", [[], ["--inverted"]])
def test_the_command_passes_on_that_pictures_are_inverted(monkeypatch, options):
    asked = []

    def predicted(run, folder, out, **each):
        asked.append(each["inverted"])
        return SimpleNamespace(summary=str, unreadable=[])

    monkeypatch.setattr(room, "predict_folder", predicted)
    assert main(["predict", "--images", "xrays", "--device", "cpu", *options]) == 0
    assert asked == [bool(options)]


@pytest.mark.slow
def test_large_cmyk_animated_and_misnamed_files_are_answered_or_named(made, tmp_path):
    (folder := tmp_path / "kinds").mkdir()
    pixels = draw_radiograph(np.random.default_rng(0), hardware=True, height=160, width=125).pixels
    picture = Image.fromarray(pixels)
    Image.fromarray(pixels.repeat(50, 0).repeat(50, 1)).save(folder / "large.png", compress_level=1)
    picture.convert("RGB").convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    picture.save(folder / "moving.gif", save_all=True, append_images=[Image.fromarray(pixels // 2)])
    picture.save(folder / "png.jpg", format="png")
    write_dicom(pixels, folder / "dicom.png")
    picture.save(folder / "jpeg.dcm", format="jpeg", quality=95)
    found = predict_folder(made("one"), folder, tmp_path / "out", threshold=0.0)
    table = found.table.set_index("file")
    assert sorted(table.index) == ["cmyk.jpg", "dicom.png", "jpeg.dcm", "large.png", "png.jpg"]
    assert table.loc["large.png", "height"] * table.loc["large.png", "width"] == 50_000_000
    assert table.loc["png.jpg", "probability"] == table.loc["dicom.png", "probability"]
    assert np.ptp(table["probability"]) < 0.05
    assert found.unreadable.to_dict("records") == [
        {"file": "moving.gif", "reason": "it is animated or has pages, 2 images in one file"}
    ]
    masks = pd.read_csv(tmp_path / "out" / "masks.csv").set_index("file")
    large = decode_rle(masks.loc["large.png", "mask"], 8_000, 6_250)
    assert large.sum() == table.loc["large.png", "mask_pixels"] > 0
    with Image.open(tmp_path / "out" / "overlays" / "large.png.png") as drawn:
        assert drawn.size == (6_250, 8_000)


def test_what_is_called_is_what_label_1_means(made, xrays, tmp_path):
    record = read_record(run := made("abnormal"))
    record["cohort"] = {"sources": [{"name": "mura", "label_1": "abnormal"}]}
    write_record(run, record)
    said = predict_folder(run, xrays, tmp_path / "out", threshold=0.0).summary()
    assert "4 radiographs, 4 called abnormal (" in said


# What calls an image.


def test_the_threshold_is_the_frozen_one_else_the_one_of_training(cohort, made, xrays, tmp_path):
    folder = made("frozen", folder=tmp_path)
    found = predict_folder(folder, xrays, tmp_path / "before")
    assert (found.threshold, found.threshold_source) == (0.5, "run.json")
    table = predict_radiographs([folder], cohort, search=True, folds=2)
    found = predict_folder(folder, xrays, tmp_path / "blended")
    chosen = choose_decision(table, Rule("max_youden"))  # the run's own rule, of the same rows
    assert (found.threshold, found.threshold_source) == (chosen.threshold, "blend.json")
    decision = choose_decision(table, Rule("max_f1"))
    freeze(folder, decision, predictions=table)
    found = predict_folder(folder, xrays, tmp_path / "after")
    assert (found.threshold, found.threshold_source) == (decision.threshold, "frozen decision")
    assert found.table["called"].tolist() == (found.table["probability"] >= decision.threshold).tolist()


def test_an_ensemble_without_a_decision_has_no_threshold(cohort, made, xrays, tmp_path):
    members = [made("north", folder=tmp_path), made("south", folder=tmp_path, bright=150.0)]
    predict_radiographs(members, cohort, tmp_path / "mean", splits=["test"])
    with pytest.raises(ValueError, match=r"has no threshold: no decision about images is frozen"):
        predict_folder(tmp_path / "mean", xrays, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(predict_folder(tmp_path / "mean", xrays, tmp_path / "out", threshold=0.5).table) == 4


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_that_is_none_is_refused(made, xrays, tmp_path, threshold):
    with pytest.raises(ValueError, match="threshold"):
        predict_folder(made("one"), xrays, tmp_path / "out", threshold=threshold)
    assert not (tmp_path / "out").exists()


def test_other_views_than_the_threshold_was_chosen_with_are_a_warning(cohort, made, xrays, tmp_path):
    folder = made("views", folder=tmp_path)
    predict_radiographs([folder], cohort, search=True, folds=2, tta=True, splits=["test"])
    assert not any("view" in text for text in predict_folder(folder, xrays, tmp_path / "as").warnings)
    found = predict_folder(folder, xrays, tmp_path / "off", tta=False)
    assert any("chosen with 4 view(s) of each image, and here there are 1" in text for text in found.warnings)


# Images that the run was trained on.


@pytest.fixture
def at_home(cohort, monkeypatch):
    monkeypatch.setattr(room, "recorded_cohort", lambda data: cohort)


def test_images_of_the_training_are_recognised_by_file_and_by_pixels(at_home, cohort, made, tmp_path):
    images, folder = read_radiograph_cohort(cohort), tmp_path / "mixed"
    folder.mkdir()
    copied, saved = images.of("train")["file"][:2]
    shutil.copyfile(cohort / copied, folder / "copied.jpg")
    Image.fromarray(read_radiograph(cohort / saved)).save(folder / "saved again.png")
    shutil.copyfile(cohort / images.of("test")["file"][0], folder / "of test.jpg")
    found = predict_folder(made("one"), folder, tmp_path / "out", threshold=0.5)
    assert found.table.set_index("file")["trained_on"].to_dict() == {
        "copied.jpg": 1,
        "of test.jpg": 0,
        "saved again.png": 1,
    }
    assert "trained on 2 of these images ('copied.jpg', 'saved again.png')" in found.warnings[0]


def test_without_its_cohort_nobody_knows_what_a_run_was_trained_on(made, xrays, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "recorded_cohort", lambda data: None)
    found = predict_folder(made("one"), xrays, tmp_path / "out", threshold=0.5)
    assert found.table["trained_on"].isna().all()
    assert any("nobody checked" in text for text in found.warnings)


# Where it goes.


def test_what_is_there_is_replaced_only_when_asked_and_only_when_it_is_from_here(made, xrays, tmp_path):
    out = tmp_path / "out"
    predict_folder(made("one"), xrays, out, threshold=0.5)
    with pytest.raises(FileExistsError, match=r"holds something already: .*--replace"):
        predict_folder(made("one"), xrays, out, threshold=0.5)
    few = tmp_path / "few"
    few.mkdir()
    shutil.copyfile(xrays / "a.png", few / "a.png")
    predict_folder(made("one"), few, out, threshold=1.0, replace=True)
    assert len(pd.read_csv(out / "predictions.csv")) == 1
    assert not (out / "unreadable.csv").exists()
    (out / "thesis.docx").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"what is no prediction: 'thesis.docx'"):
        predict_folder(made("one"), few, out, threshold=1.0, replace=True)


def test_a_stop_leaves_nothing_behind(made, xrays, tmp_path, monkeypatch):
    real, calls = room.read_radiograph, []

    def read(path, **options):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(path, **options)

    monkeypatch.setattr(room, "read_radiograph", read)
    with pytest.raises(KeyboardInterrupt):
        predict_folder(made("one"), xrays, tmp_path / "here" / "out", threshold=0.0)
    assert list(tmp_path.rglob("*")) == []


def test_folders_that_lie_in_each_other_are_refused(made, xrays, tmp_path):
    for out in (xrays / "out", xrays, xrays.parent):
        with pytest.raises(ValueError, match="lie in each other"):
            predict_folder(made("one"), xrays, out, threshold=0.5)
    assert not (xrays / "out").exists()


def test_a_folder_without_radiographs_is_refused(made, tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder at"):
        find_radiographs(tmp_path / "nowhere")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("words")
    with pytest.raises(FileNotFoundError, match=r"No radiograph in .*\(1 other files\)"):
        predict_folder(made("one"), tmp_path / "texts", tmp_path / "out", threshold=0.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="names there are always text")
def test_a_name_that_is_no_text_is_written_with_escapes(made, xrays, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    shutil.copyfile(xrays / "a.png", os.path.join(os.fsencode(folder), b"caf\xe9.png"))
    found = predict_folder(made("one"), folder, tmp_path / "out", threshold=0.5)
    assert found.table["file"].tolist() == ["caf\\udce9.png"]


def test_each_radiograph_is_mapped_on_its_own_pixels_and_the_maximum_is_marked(xrays, tmp_path):
    torch.manual_seed(0)
    config = replace(TINY, long=96, short=64)
    run = Run(tmp_path / "tiny", RadiographModel(config).eval(), config, 0.5, {"train": {}})
    table, unreadable = explain_folder(run, xrays, tmp_path / "maps", method="layer_cam")
    assert unreadable["file"].tolist() == ["strip.png", "torn.jpg", "zero.png", "ward 3/words.dcm"]
    assert pd.read_csv(tmp_path / "maps" / "maps.csv")["file"].tolist() == table["file"].tolist()
    for row in table.itertuples():
        image = read_radiograph(xrays / row.file)
        pixels = Frame.of(*image.shape, long=96, short=64).pixels(image)
        found = map_radiographs(run, pixels[None], method="layer_cam")
        values = found.on_radiograph(0, *image.shape)
        assert (row.height, row.width, row.probability) == (*image.shape, found.probability[0])
        assert row.highest == values.max() == values[row.y, row.x]
        picture = cv2.imread(str(tmp_path / "maps" / "overlays" / f"{row.file}.png"))
        assert picture.shape[:2] == image.shape
        bare = (values <= 0) & (
            np.hypot(*np.ogrid[-row.y : row.height - row.y, -row.x : row.width - row.x]) > 12
        )
        np.testing.assert_array_equal(picture[bare], np.repeat(image[bare][:, None], 3, axis=1))
    with pytest.raises(FileExistsError, match="holds something already"):
        explain_folder(run, xrays, tmp_path / "maps")
    with pytest.raises(ValueError, match="no method 'cam'"):
        explain_folder(run, xrays, tmp_path / "other", method="cam")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("architecture", "method"), [("decoder", "mask"), ("deeplabv3", "mask"), ("classifier", "gradient_input")]
)
def test_the_command_maps_by_the_networks_own_mask_where_it_has_one(
    tmp_path, monkeypatch, capsys, architecture, method
):
    asked = []

    def explained(run, folder, out, **each):
        asked.append(each)
        return pd.DataFrame({"file": ["a.png"]}), pd.DataFrame({"file": []})

    config = replace(TINY, architecture=architecture)
    run = SimpleNamespace(folder=tmp_path, config=config, to=lambda device: None)
    monkeypatch.setattr(task, "load_radiograph_run", lambda folder: run)
    monkeypatch.setattr(room, "explain_folder", explained)
    assert main(["explain", "--images", "xrays", "--device", "cpu"]) == 0
    assert asked == [{"method": method, "layer": None, "replace": False}]
    assert f"1 radiographs mapped by {method}" in capsys.readouterr().out
    code = main(["explain", "--images", "xrays", "--device", "cpu", "--layer", "blocks"])
    assert (code, len(asked)) == (100, 1)
    assert f"--method {method} maps no layer's cells" in capsys.readouterr().err


@pytest.mark.parametrize("values", [0.0, -1.0, 2.0])
def test_a_map_without_a_highest_place_leaves_the_picture_as_it_is(values, tmp_path):
    image = np.arange(1600, dtype=np.uint8).reshape(40, 40)
    room.write_map_overlay(image, np.full((40, 40), values, np.float32), tmp_path / "one.png")
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "one.png"))[..., 0], image)
