"""FracAtlas as it is published, read strictly."""

import json
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REAL_DATA
from PIL import Image
from radiograph_folders import change, fracatlas_folder

from cspine_helpers.radiographs.consolidation import consolidate
from cspine_helpers.radiographs.image_table import read_regions
from cspine_helpers.radiographs.images import read_radiograph
from cspine_helpers.radiographs.sources.fracatlas import read_fracatlas

FRACATLAS = REAL_DATA / "fracatlas"


def test_fracatlas_is_read_as_its_table_says(published):
    source = read_fracatlas(published / "source")
    rows = pd.read_csv(published / "source" / "dataset.csv").sort_values("image_id")
    table = source.table
    assert (table["image"] + ".jpg").tolist() == rows["image_id"].tolist()
    assert table["label"].tolist() == rows["fractured"].tolist()
    assert table["hardware"].tolist() == rows["hardware"].tolist()
    assert table["multiscan"].tolist() == rows["multiscan"].tolist()
    assert table["split"].tolist() == rows["split"].tolist()
    assert table["part"].tolist() == rows[["hand", "leg", "hip", "shoulder"]].idxmax(axis=1).tolist()
    assert set(table["view"]) == {"frontal", "lateral", "oblique", "frontal+lateral"}
    assert (table["patient"] == "").all()  # FracAtlas names none
    assert all(Path(path).is_file() for path in table["path"])
    assert source.licence == "CC BY 4.0"
    assert "s41597-023-02432-4" in source.citation
    assert source.notes == []


def test_counts_that_differ_from_the_polygons_are_a_note_and_the_polygons_count(fracatlas):
    change(fracatlas / "dataset.csv", "IMG0000003.jpg,0,1,0,0,0,0,0,1,1", "IMG0000003.jpg,0,1,0,0,0,0,0,1,2")
    (fracatlas / "Annotations" / "YOLO" / "IMG0000006.txt").write_text("")
    source = read_fracatlas(fracatlas)
    assert source.notes == [
        "fracture_count of dataset.csv: other numbers than of polygons in 1 images: "
        "IMG0000003.jpg (2 for 1).",
        "YOLO boxes: other numbers than of polygons in 1 images: IMG0000006.jpg (0 for 1).",
    ]
    assert len(source.regions["IMG0000003"]) == len(source.regions["IMG0000006"]) == 1


def test_several_parts_are_joined_and_mixed_must_agree(fracatlas):
    path = fracatlas / "dataset.csv"
    change(path, "IMG0000010.jpg,0,0,0,1,0", "IMG0000010.jpg,1,0,0,1,1")
    source = read_fracatlas(fracatlas)
    assert source.table.set_index("image").loc["IMG0000010", "part"] == "hand+shoulder"
    assert source.notes == []
    change(path, "IMG0000010.jpg,1,0,0,1,1", "IMG0000010.jpg,1,0,0,1,0")
    (note,) = read_fracatlas(fracatlas).notes
    assert note == "mixed: other than the number of parts says in 1 images: 'IMG0000010.jpg'."


def test_without_a_column_the_split_is_that_of_the_published_files(tmp_path):
    folder = fracatlas_folder(tmp_path, images=9, fractured=3, split=False)
    table = read_fracatlas(folder).table
    assert table.loc[table["label"] == 1, "split"].tolist() == ["train", "val", "test"]
    assert (table.loc[table["label"] == 0, "split"] == "").all()


def test_regions_come_from_the_best_file_that_is_there_and_all_four_agree(fracatlas):
    found = []
    for folder in ("VGG JSON", "COCO JSON", "PASCAL VOC", "YOLO"):
        found.append(read_fracatlas(fracatlas).regions)
        shutil.rmtree(fracatlas / "Annotations" / folder)
    vgg, coco, voc, yolo = found
    assert [len(each) for each in found] == [8] * 4
    for image, regions in vgg.items():
        for one, same, *boxes in zip(regions, coco[image], voc[image], yolo[image], strict=True):
            assert np.allclose(one.points, same.points)
            for box in boxes:
                assert box.is_box
                assert np.allclose(box.points.min(0), one.points.min(0), atol=0.6)
                assert np.allclose(box.points.max(0), one.points.max(0), atol=0.6)
    with pytest.raises(FileNotFoundError, match="has no annotations of fractures"):
        read_fracatlas(fracatlas)


@pytest.mark.parametrize(
    ("ending", "text"),
    [("BOM", lambda text: "\ufeff" + text), ("semicolons", lambda text: text.replace(",", ";"))],
)
def test_a_table_with_bom_or_semicolons_is_read_right(fracatlas, ending, text):
    before = read_fracatlas(fracatlas).table
    path = fracatlas / "dataset.csv"
    path.write_text(text(path.read_text()), encoding="utf-8")
    assert read_fracatlas(fracatlas).table.equals(before)


def move(folder: Path, name: str, to: str) -> None:
    (path,) = folder.glob(f"images/*/{name}")
    path.rename(folder / to)


VGG = "Annotations/VGG JSON/VGG_fracture_masks.json"


def cut_a_polygon_short(folder: Path, *, without: str = "") -> None:
    """The polygon of IMG0000003 has two points, in the VGG file or, without it, in the COCO file."""
    if without:
        (folder / without).unlink()
        path = folder / "Annotations/COCO JSON/COCO_fracture_masks.json"
        content = json.loads(path.read_text())
        (image,) = (its["id"] for its in content["images"] if its["file_name"] == "IMG0000003.jpg")
        annotation = next(its for its in content["annotations"] if its["image_id"] == image)
        annotation["segmentation"] = [annotation["segmentation"][0][:4]]
    else:
        path = folder / VGG
        content = json.loads(path.read_text())
        entry = next(its for its in content.values() if its["filename"] == "IMG0000003.jpg")
        its = next(iter(entry["regions"].values()))["shape_attributes"]
        its["all_points_x"], its["all_points_y"] = its["all_points_x"][:2], its["all_points_y"][:2]
    path.write_text(json.dumps(content))


SHORT = (
    r"images with regions that cannot be used \(1\): 'IMG0000003.jpg': "
    "polygons of fewer than three points: IMG0000003.jpg "
)
FRACATLAS_FAULTS = {
    "a polygon of two points": (cut_a_polygon_short, SHORT, "IMG0000003.jpg"),
    "a polygon of two points in COCO": (
        lambda f: cut_a_polygon_short(f, without=VGG),
        SHORT,
        "IMG0000003.jpg",
    ),
    "folder": (
        lambda f: (f / "images/Fractured/more").mkdir(),
        r"folders among the images, which are not looked into \(1\): 'images/Fractured/more'",
        "images/Fractured/more",
    ),
    "image without row": (
        lambda f: change(f / "dataset.csv", "IMG0000001.jpg", "IMG9.jpg"),
        r"images without a row in dataset.csv \(1\): 'IMG0000001.jpg'",
        "IMG0000001.jpg",
    ),
    "row without image": (
        lambda f: move(f, "IMG0000001.jpg", "aside.jpg"),
        r"rows without an image \(1\): 'IMG0000001.jpg'",
        "IMG0000001.jpg",
    ),
    "in both folders": (
        lambda f: shutil.copy(f / "images/Fractured/IMG0000000.jpg", f / "images/Non_fractured"),
        r"images in both folders, Fractured and Non_fractured \(1\): 'IMG0000000.jpg'",
        "IMG0000000.jpg",
    ),
    "in the wrong folder": (
        lambda f: move(f, "IMG0000000.jpg", "images/Non_fractured/IMG0000000.jpg"),
        r"images whose folder contradicts dataset.csv \(1\): 'IMG0000000.jpg'",
        "IMG0000000.jpg",
    ),
    "count of an intact one": (
        lambda f: change(
            f / "dataset.csv", "IMG0000001.jpg,1,0,0,0,0,1,0,0,0", "IMG0000001.jpg,1,0,0,0,0,1,0,0,2"
        ),
        r"rows whose fracture_count contradicts fractured \(1\): 'IMG0000001.jpg'",
        "IMG0000001.jpg",
    ),
    "intact with polygons": (
        lambda f: change(f / VGG, '"filename": "IMG0000003.jpg"', '"filename": "IMG0000001.jpg"'),
        r"intact images with polygons \(1\): 'IMG0000001.jpg'\n- fractured images without a polygon \(1\): ",
        "IMG0000003.jpg",
    ),
    "polygons without an image": (
        lambda f: change(f / VGG, '"filename": "IMG0000003.jpg"', '"filename": "IMG0000777.jpg"'),
        r"regions of images that are not there \(1\): 'IMG0000777.jpg'\n"
        r"- fractured images without a polygon \(1\): 'IMG0000003.jpg'",
        "IMG0000003.jpg",
    ),
    "another class": (
        lambda f: change(f / VGG, '"label": "fractured"', '"label": "metal"'),
        r"images with regions of another class than fractured \(1\): 'IMG0000000.jpg'",
        "IMG0000000.jpg",
    ),
    "names that differ in capitals": (
        lambda f: change(f / "dataset.csv", "IMG0000002.jpg", "img0000001.jpg"),
        r"rows whose names differ in capitals only \(2\): 'IMG0000001.jpg', 'img0000001.jpg'",
        "IMG0000001.jpg",
    ),
}


@pytest.mark.parametrize("fault", FRACATLAS_FAULTS)
def test_what_does_not_fit_in_fracatlas_is_named_and_left_out_only_when_asked(fracatlas, fault):
    damage, says, name = FRACATLAS_FAULTS[fault]
    damage(fracatlas)
    with pytest.raises(ValueError, match=says) as error:
        read_fracatlas(fracatlas)
    assert "skip_unusable" in str(error.value)
    source = read_fracatlas(fracatlas, skip_unusable=True)
    assert name in source.left_out
    assert Path(name).stem not in set(source.table["image"])


def test_an_image_is_in_one_published_split(fracatlas):
    table = pd.read_csv(fracatlas / "dataset.csv", dtype=str).drop(columns="split")
    table.to_csv(fracatlas / "dataset.csv", index=False)
    train, test = (fracatlas / "Utilities" / "Fracture Split" / f"{name}.csv" for name in ("train", "test"))
    test.write_text(train.read_text())
    with pytest.raises(ValueError, match=r"share images \(3\): 'IMG0000000.jpg', "):
        read_fracatlas(fracatlas)


def test_polygons_without_an_image_hide_no_other_offender_and_are_left_out_when_asked(fracatlas):
    change(fracatlas / VGG, '"filename": "IMG0000003.jpg"', '"filename": "IMG0000777.jpg"')
    change(fracatlas / "dataset.csv", "IMG0000001.jpg", "IMG9.jpg")
    with pytest.raises(ValueError, match="refused") as error:
        read_fracatlas(fracatlas)
    assert str(error.value).splitlines()[1:] == [
        "- regions of images that are not there (1): 'IMG0000777.jpg'",
        "- images without a row in dataset.csv (1): 'IMG0000001.jpg'",
        "- rows without an image (1): 'IMG9.jpg'",
        "- fractured images without a polygon (1): 'IMG0000003.jpg'",
    ]
    source = read_fracatlas(fracatlas, skip_unusable=True)
    assert source.left_out["IMG0000777.jpg"] == "regions of images that are not there"
    assert not {"IMG0000001", "IMG0000003"} & set(source.table["image"])
    assert len(source.table) == 22


def test_regions_of_nobody_knows_which_image_hide_no_other_offender_and_cannot_be_left_out(fracatlas):
    (fracatlas / VGG).unlink()
    path = fracatlas / "Annotations/COCO JSON/COCO_fracture_masks.json"
    content = json.loads(path.read_text())
    content["annotations"][3]["image_id"] = 999
    path.write_text(json.dumps(content))
    change(fracatlas / "dataset.csv", "IMG0000001.jpg", "IMG9.jpg")
    for skip in (False, True):
        with pytest.raises(ValueError, match="refused") as error:
            read_fracatlas(fracatlas, skip_unusable=skip)
        assert str(error.value).splitlines()[1:] == [
            "- annotations: annotations of no image, which cannot be left out (1): 'annotation 3: 999'",
            "- images without a row in dataset.csv (1): 'IMG0000001.jpg'",
            "- rows without an image (1): 'IMG9.jpg'",
        ]


def only_boxes(folder: Path, kind: str) -> None:
    """Of the annotations, the boxes of this kind."""
    for path in (folder / "Annotations").iterdir():
        if path.name != kind:
            shutil.rmtree(path)


@pytest.mark.parametrize(("kind", "ending"), [("YOLO", "txt"), ("PASCAL VOC", "xml")])
def test_files_of_boxes_and_images_belong_together_one_to_one(fracatlas, kind, ending):
    only_boxes(fracatlas, kind)
    boxes = fracatlas / "Annotations" / kind
    shutil.copy(boxes / f"IMG0000000.{ending}", boxes / f"IMG7777777.{ending}")
    (boxes / f"IMG0000001.{ending}").unlink()  # of an intact image
    image = fracatlas / "images/Fractured/IMG0000000.jpg"
    Image.open(image).save(image.with_suffix(".png"))
    rows = (fracatlas / "dataset.csv").read_text()
    row = next(row for row in rows.splitlines() if row.startswith("IMG0000000"))
    (fracatlas / "dataset.csv").write_text(rows + row.replace(".jpg", ".png") + "\n")
    with pytest.raises(ValueError, match="refused") as error:
        read_fracatlas(fracatlas)
    assert str(error.value).splitlines()[1:] == [
        "- images that share a label file (2): 'IMG0000000.jpg', 'IMG0000000.png'",
        "- images without a label file (an empty one says intact) (1): 'IMG0000001.jpg'",
        f"- label files without an image (1): 'Annotations/{kind}/IMG7777777.{ending}'",
    ]
    source = read_fracatlas(fracatlas, skip_unusable=True)
    assert len(source.left_out) == 4
    assert len(source.table) == 22
    assert len(source.regions) == 7


def renamed(folder: Path, name: str) -> None:
    """IMG0000003.jpg is called so in every file."""
    (path,) = folder.glob("images/*/IMG0000003.jpg")
    path.rename(path.with_name(name))
    for path in [*folder.rglob("*.csv"), *folder.rglob("*.json")]:
        text = path.read_text(encoding="utf-8").replace("IMG0000003.jpg", name)
        path.write_text(text, encoding="utf-8")
    for path in folder.glob("Annotations/*/IMG0000003.*"):
        path.rename(path.with_stem(Path(name).stem))


@pytest.mark.parametrize(
    "decomposed", ["images/*/*", "dataset.csv", VGG, "Annotations/YOLO/*", "Utilities/*/*"]
)
@pytest.mark.parametrize("regions", ["VGG JSON", "YOLO"])
def test_accents_composed_and_decomposed_are_the_same_name(tmp_path, decomposed, regions):
    folder = fracatlas_folder(tmp_path, images=9, fractured=3, split=False)
    renamed(folder, "Größe 3.jpg")
    if regions == "YOLO":
        only_boxes(folder, "YOLO")
    for path in list(folder.glob(decomposed)):
        if "Größe" in path.name:
            path.rename(path.with_name(unicodedata.normalize("NFD", path.name)))
        elif path.suffix == ".json":
            content = json.dumps(json.loads(path.read_text()), ensure_ascii=False)
            path.write_text(unicodedata.normalize("NFD", content), encoding="utf-8")
        elif path.suffix == ".csv":
            path.write_text(unicodedata.normalize("NFD", path.read_text("utf-8")), encoding="utf-8")
    source = read_fracatlas(folder)
    row = source.table.set_index("image").loc["Grosse-3"]
    assert Path(row["path"]).is_file()
    assert (row["label"], row["split"], len(source.regions["Grosse-3"])) == (1, "val", 1)
    assert source.notes == []


def test_two_files_of_one_name_but_for_the_composition_of_accents_are_refused(fracatlas):
    renamed(fracatlas, "Größe 3.jpg")
    image = fracatlas / "images/Fractured/Größe 3.jpg"
    shutil.copy(image, image.with_name(unicodedata.normalize("NFD", image.name)))
    with pytest.raises(
        ValueError, match=r"one name, with accents composed and decomposed \(1\): 'Größe 3.jpg'"
    ):
        read_fracatlas(fracatlas)
    assert len(read_fracatlas(fracatlas, skip_unusable=True).table) == 23


def test_two_files_whose_names_differ_in_capitals_are_refused(fracatlas):
    image = fracatlas / "images/Non_fractured/IMG0000001.jpg"
    shutil.copy(image, image.with_name("img0000001.JPG"))
    with pytest.raises(ValueError, match=r"images without a row in dataset.csv \(1\): 'img0000001.JPG'"):
        read_fracatlas(fracatlas)
    rows = (fracatlas / "dataset.csv").read_text()
    row = next(row for row in rows.splitlines() if row.startswith("IMG0000001"))
    (fracatlas / "dataset.csv").write_text(rows + row.replace("IMG0000001.jpg", "img0000001.JPG") + "\n")
    with pytest.raises(ValueError, match=r"in capitals only \(2\): 'IMG0000001.jpg', 'img0000001.JPG'"):
        read_fracatlas(fracatlas)
    assert len(read_fracatlas(fracatlas, skip_unusable=True).table) == 23


@pytest.mark.parametrize("ending", ["BOM", "semicolons"])
def test_published_splits_with_bom_or_semicolons_are_read_right(tmp_path, ending):
    folder = fracatlas_folder(tmp_path, images=9, fractured=3, split=False)
    before = read_fracatlas(folder).table
    for path in (folder / "Utilities" / "Fracture Split").iterdir():
        header, *rows = path.read_text().splitlines()
        lines = [f"{header};fracture_count", *(f"{row};1" for row in rows)]
        text = "\ufeff" + path.read_text() if ending == "BOM" else "\n".join([*lines, ""])
        path.write_text(text, encoding="utf-8")
    assert read_fracatlas(folder).table.equals(before)


def test_a_vgg_file_with_a_bom_is_read_right(fracatlas):
    before = read_fracatlas(fracatlas).regions
    path = fracatlas / VGG
    path.write_text(path.read_text(), encoding="utf-8-sig")
    after = read_fracatlas(fracatlas).regions
    assert {image: len(its) for image, its in after.items()} == {
        image: len(its) for image, its in before.items()
    }


@pytest.mark.parametrize("damage", ["empty", "cut off"])
def test_a_damaged_fractured_image_with_polygons_is_named_and_left_out_when_asked(
    fracatlas, tmp_path, damage
):
    path = fracatlas / "images/Fractured/IMG0000000.jpg"
    path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-900])
    source = read_fracatlas(fracatlas)
    says = r"cannot be read \(1\): 'fracatlas: images/Fractured/IMG0000000.jpg': it is (empty|cut off)"
    with pytest.raises(ValueError, match=says):
        consolidate([source], tmp_path / "cohort")
    table = consolidate([source], tmp_path / "cohort", skip_unusable=True)
    assert len(table) == 23
    regions = read_regions(tmp_path / "cohort")
    assert "IMG0000000" not in regions
    assert sum(map(len, regions.values())) == 7


def test_more_than_ten_offenders_are_ten_and_their_number(fracatlas):
    for path in sorted((fracatlas / "images" / "Non_fractured").iterdir())[:13]:
        path.unlink()
    with pytest.raises(
        ValueError, match=r"rows without an image \(13\): (('IMG\d+.jpg'(, )?){10}) and 3 more"
    ):
        read_fracatlas(fracatlas)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "16-bit", "CMYK"])
def test_images_of_other_kinds_have_their_polygons_where_they_are_displayed(fracatlas, tmp_path, kind):
    path = fracatlas / "images" / "Fractured" / "IMG0000003.jpg"  # turned by its EXIF
    pixels = read_radiograph(path)
    if kind == "16-bit":
        Image.fromarray(pixels.astype(np.uint16) * 16).save(path, format="PNG")
    elif kind == "CMYK":
        Image.fromarray(pixels).convert("RGB").convert("CMYK").save(path)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90).save(path, format=kind, exif=exif)
    table = consolidate([read_fracatlas(fracatlas)], tmp_path / "cohort").set_index("image")
    assert tuple(table.loc["IMG0000003", ["height", "width"]]) == pixels.shape
    (points,) = read_regions(tmp_path / "cohort")["IMG0000003"]
    (before,) = read_fracatlas(fracatlas).regions["IMG0000003"]
    assert np.allclose(points, before.points, atol=0.001)


def test_an_animation_is_named_and_left_out_when_asked(fracatlas, tmp_path):
    path = fracatlas / "images" / "Fractured" / "IMG0000000.jpg"
    image = Image.open(path).convert("L")
    image.save(path, format="PNG", save_all=True, append_images=[image.point(lambda value: value // 2)])
    source = read_fracatlas(fracatlas, skip_unusable=True)
    with pytest.raises(ValueError, match=r"cannot be read \(1\): .*IMG0000000.jpg': it is animated"):
        consolidate([source], tmp_path / "cohort")
    assert len(consolidate([source], tmp_path / "cohort", skip_unusable=True)) == 23


def test_the_right_folder_is_named_where_another_was_given(published):
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*source\?"):
        read_fracatlas(published)


# The real one


@pytest.mark.skipif(not FRACATLAS.is_dir(), reason=f"no FracAtlas at {FRACATLAS}")
def test_fracatlas_itself_is_read_as_it_was_counted(tmp_path):
    source = read_fracatlas(FRACATLAS)
    table = source.table.set_index("image")
    assert table["label"].value_counts().to_dict() == {0: 2811, 1: 610}
    of_split = table.groupby("split")["label"].agg(["size", "sum"])
    assert of_split.to_numpy().tolist() == [[2811, 502], [610, 108]]
    assert sum(map(len, source.regions.values())) == 781
    assert table["hardware"].sum() == 76
    assert table.loc[table["hardware"] == 1, "label"].sum() == 74
    assert len(source.notes) == 2
    assert all(name in note for note in source.notes for name in ("IMG0002471", "IMG0000851", "IMG0002395"))
    turned = replace(source, table=source.table[source.table["image"].isin(["IMG0002588", "IMG0002628"])])
    table = consolidate([turned], tmp_path)
    for row in table.itertuples():
        boxes = np.loadtxt(FRACATLAS / "Annotations" / "YOLO" / f"{row.image}.txt", ndmin=2)[:, 1:]
        for points, (x, y, width, height) in zip(read_regions(tmp_path)[row.image], boxes, strict=True):
            shown, size = np.array([row.width, row.height]), np.ptp(points, axis=0)
            assert np.abs(points.min(0) + size / 2 - shown * [x, y]).max() < 3
            assert np.abs(size - shown * [width, height]).max() < 6
