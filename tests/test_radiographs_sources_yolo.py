"""Data sets in YOLO format, read strictly."""

import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from radiograph_folders import YOLO_LABELS, change, draw_radiograph, yolo_folder

from cspine_helpers.radiographs.consolidation import consolidate
from cspine_helpers.radiographs.groups import GroupConfig
from cspine_helpers.radiographs.image_table import read_sources
from cspine_helpers.radiographs.sources.yolo import read_yolo


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A YOLO folder; read only."""
    folder = tmp_path_factory.mktemp("published")
    yolo_folder(folder / "yolo")
    return folder


@pytest.fixture
def yolo(made, tmp_path) -> Path:
    """A YOLO folder to damage."""
    return shutil.copytree(made / "yolo", tmp_path / "yolo")


def test_a_yolo_set_is_read_by_its_classes_and_its_label_files(made):
    source = read_yolo(made / "yolo", labels=YOLO_LABELS)
    table = source.table
    kinds = table["original"].str.extract(r"limb (\d)")[0]
    assert dict(zip(kinds, table["label"], strict=True)) == {"0": 1, "1": 1, "2": 0, "3": 0}
    folders = table["original"].str.partition("/")[0]
    assert dict(zip(folders, table["split"], strict=True)) == {
        "train": "train",
        "valid": "val",
        "test": "test",
    }
    marked = {image: [region.label for region in marks] for image, marks in source.regions.items()}
    assert marked["limb-0-grosse_train"] == ["elbow positive"]
    assert marked["limb-1-grosse_train"] == ["forearm fracture"]
    assert sum(map(len, marked.values())) == 6  # boxes of `humerus` are none of fractures
    for row in table.itertuples():
        lines = (made / "yolo" / row.original.replace("images", "labels")).with_suffix(".txt").read_text()
        for line, region in zip(lines.splitlines(), source.regions.get(row.image, []), strict=False):
            values = np.array(line.split()[1:], dtype=float)
            x, y = values[::2] * 128, values[1::2] * 160
            low, high = (points := region.points).min(0), points.max(0)
            if len(values) == 4:
                assert np.allclose([(low + high) / 2, high - low], np.column_stack([x, y]), atol=1e-3)
            else:
                assert np.allclose(points, np.column_stack([x, y]), atol=1e-3)


def test_names_become_ids_that_are_files_on_every_system_and_the_table_knows_both(made, tmp_path):
    table = consolidate([read_yolo(made / "yolo", labels=YOLO_LABELS)], tmp_path / "cohort")
    row = table.set_index("original").loc["test/images/limb 0 größe_test.jpg"]
    assert (row["image"], row["file"]) == ("limb-0-grosse_test", "images/limb-0-grosse_test.jpg")


@pytest.mark.parametrize("arranged", ["names by number", "with a path", "split below images"])
def test_data_yaml_is_read_as_other_programs_write_it(yolo, arranged):
    path = yolo / "data.yaml"
    before = read_yolo(yolo, labels=YOLO_LABELS).table["label"].tolist()
    if arranged == "names by number":
        lines = "".join(f"  {number}: {name}\n" for number, name in enumerate(YOLO_LABELS))
        path.write_text(f"train: train/images\nval: valid/images\ntest: test/images\nnames:\n{lines}")
    elif arranged == "with a path":
        change(path, "train: ../train/images", f"path: {yolo}\ntrain: train/images")
    else:
        for split in ("train", "valid", "test"):
            for kind in ("images", "labels"):
                (yolo / kind).mkdir(exist_ok=True)
                (yolo / split / kind).rename(yolo / kind / split)
        path.write_text(
            path.read_text()
            .replace("../train/images", "images/train")
            .replace("../valid/images", "images/valid")
            .replace("../test/images", "images/test")
        )
    assert sorted(read_yolo(yolo, labels=YOLO_LABELS).table["label"]) == sorted(before)


def write_label(folder: Path, text: str) -> None:
    (folder / "train/labels/limb 0 größe_train.txt").write_text(text)


YOLO_FAULTS = {
    "no label file": (
        lambda f: (f / "train/labels/limb 0 größe_train.txt").unlink(),
        r"images without a label file \(an empty one says intact\) \(1\)",
    ),
    "no image": (
        lambda f: (f / "train/images/limb 0 größe_train.jpg").unlink(),
        r"label files without an image \(1\): 'train/labels/limb 0 größe_train.txt'",
    ),
    "two images of one name": (
        lambda f: shutil.copy(
            f / "train/images/limb 0 größe_train.jpg", f / "train/images/limb 0 größe_train.png"
        ),
        r"images that share a label file \(2\)",
    ),
    "no image by its name": (
        lambda f: (f / "train/images/notes.docx").write_text("x"),
        r"files among the images that are no image by their name \(1\): 'train/images/notes.docx'",
    ),
    "folder": (
        lambda f: (f / "train/images/more").mkdir(),
        r"folders among the images, which are not looked into \(1\): 'train/images/more'",
    ),
    "unknown class": (lambda f: write_label(f, "4 0.5 0.5 0.1 0.1\n"), "limb 0 größe_train.jpg.*4"),
    "half a class": (lambda f: write_label(f, "0.5 0.5 0.5 0.1 0.1\n"), "limb 0 größe_train.jpg"),
    "four numbers": (lambda f: write_label(f, "0 0.5 0.5 0.1\n"), "limb 0 größe_train.jpg"),
    "six numbers": (lambda f: write_label(f, "0 0.5 0.5 0.1 0.1 0.9\n"), "limb 0 größe_train.jpg"),
    "above 1": (lambda f: write_label(f, "0 0.5 0.5 0.1 1.1\n"), "limb 0 größe_train.jpg"),
    "words": (lambda f: write_label(f, "0 a b c d\n"), "limb 0 größe_train.jpg"),
}


@pytest.mark.parametrize("fault", YOLO_FAULTS)
def test_what_does_not_fit_in_a_yolo_set_is_named_and_left_out_only_when_asked(yolo, fault):
    damage, says = YOLO_FAULTS[fault]
    damage(yolo)
    with pytest.raises(ValueError, match=says):
        read_yolo(yolo, labels=YOLO_LABELS)
    source = read_yolo(yolo, labels=YOLO_LABELS, skip_unusable=True)
    assert 1 <= len(source.left_out) <= 2
    expected = 12 if fault in ("no image by its name", "folder") else 11
    assert len(source.table) == expected
    assert len(source.regions) == 6 - (12 - expected)


def test_yolo_images_with_the_same_fault_are_listed_together(yolo):
    write_label(yolo, "4 0.5 0.5 0.1 0.1\n")
    (yolo / "valid/labels/limb 0 größe_valid.txt").write_text("7 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1 1.1\n")
    with pytest.raises(ValueError, match="refused") as error:
        read_yolo(yolo, labels=YOLO_LABELS)
    assert str(error.value).splitlines()[1:] == [
        "- label files: classes that are none of 0 to 3 (2): 'train/images/limb 0 größe_train.jpg': limb 0 "
        "größe_train.txt line 1: 4, 'valid/images/limb 0 größe_valid.jpg': limb 0 größe_valid.txt line 1: 7",
        "- label files: coordinates outside 0 to 1 (1): 'valid/images/limb 0 größe_valid.jpg': limb 0 "
        "größe_valid.txt line 2",
    ]


def test_a_yolo_image_that_cannot_be_read_is_named_with_all_others_when_a_cohort_is_made(yolo, tmp_path):
    for split, content in (("train", b""), ("valid", b"<html>")):
        (yolo / split / "images" / f"limb 0 größe_{split}.jpg").write_bytes(content)
    source = read_yolo(yolo, labels=YOLO_LABELS)
    says = r"cannot be read \(2\): 'yolo: train/images/limb 0 größe_train.jpg': .*empty.*'yolo: valid/.*"
    with pytest.raises(ValueError, match=says) as error:
        consolidate([source], tmp_path / "cohort")
    assert str(yolo) not in str(error.value)  # in a long folder, the reason would be cut off
    assert len(consolidate([source], tmp_path / "cohort", skip_unusable=True)) == 10


def test_an_empty_label_file_says_intact(yolo):
    write_label(yolo, "")
    table = read_yolo(yolo, labels=YOLO_LABELS).table.set_index("image")
    assert table.loc["limb-0-grosse_train", "label"] == 0


def test_a_class_map_may_be_a_file(made, tmp_path):
    path = tmp_path / "labels.json"
    with pytest.raises(FileNotFoundError, match=r'Write \{"elbow positive": 1, "fingers positive": 1, '):
        read_yolo(made / "yolo", labels=path)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="holds no labels of classes"):
        read_yolo(made / "yolo", labels=path)
    path.write_text(json.dumps(YOLO_LABELS).replace("{", '{"humerus": 1, '))
    with pytest.raises(ValueError, match=r"labels.json is not JSON \(named twice: 'humerus'\)"):
        read_yolo(made / "yolo", labels=path)
    path.write_text(json.dumps(YOLO_LABELS))
    assert read_yolo(made / "yolo", labels=path).classes == YOLO_LABELS


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"elbow positive": 1}, r"classes of data.yaml without a label \(3\): 'fingers positive', "),
        (YOLO_LABELS | {"wrist": 1}, r"labels of no class of data.yaml \(1\): 'wrist' \("),
        (YOLO_LABELS | {"humerus": "no"}, r"labels that are not 0 or 1 \(1\): 'humerus': 'no'"),
        (YOLO_LABELS | {"humerus": True}, r"labels that are not 0 or 1 \(1\): 'humerus': True"),
    ],
)
def test_a_class_map_is_about_every_class_and_no_other(made, labels, says):
    with pytest.raises(ValueError, match=says):
        read_yolo(made / "yolo", labels=labels)


@pytest.mark.parametrize(
    ("was", "now", "error", "says"),
    [
        ("nc: 4", "nc: 5", ValueError, "nc = 5"),
        ("names: [", "classes: [", ValueError, "has no names"),
        ("names: [", "names: [1, ", ValueError, "has no names"),
        ("names: [", "names: ]", ValueError, r"data.yaml is not YAML that can be read \(.*\). Correct it."),
        ("names: [", "date: 2020-13-45\nnames: [", ValueError, r"data.yaml .* \(month must be in 1..12\)"),
        ("names: [", "x: !!timestamp y\nnames: [", ValueError, "data.yaml is not YAML that can be read"),
        ("names: [", "x: !!bool y\nnames: [", ValueError, "data.yaml is not YAML that can be read"),
        ("names: [", f"x: {'[' * 700}{']' * 700}\nnames: [", ValueError, "data.yaml is not YAML"),
        ("names: [", "? [1, 2]\n: 3\nnames: [", ValueError, "data.yaml is not YAML that can be read"),
        ("names: [", "names: {0: a, b: c}\nold: [", ValueError, "data.yaml has no names, the classes"),
        ("names: [", "names: {no: a, yes: c}\nold: [", ValueError, "data.yaml has no names, the classes"),
        ("../train/images", "../elsewhere/images", FileNotFoundError, "'../elsewhere/images'"),
        ("../train/images", "../train/labels", FileNotFoundError, "no folder of labels"),
    ],
)
def test_a_data_yaml_that_cannot_be_used_is_refused(yolo, was, now, error, says):
    change(yolo / "data.yaml", was, now)
    with pytest.raises(error, match=says) as raised:
        read_yolo(yolo, labels=YOLO_LABELS)
    assert "\n" not in str(raised.value)


def composed_as(form: str, *paths: Path) -> None:
    """Write the names of files and folders so."""
    for path in paths:
        path.rename(path.with_name(unicodedata.normalize(form, path.name)))


@pytest.mark.parametrize("decomposed", ["images", "labels", "folder"])
def test_accents_composed_and_decomposed_are_the_same_name(yolo, tmp_path, decomposed):
    before = read_yolo(yolo, labels=YOLO_LABELS)
    if decomposed == "folder":
        (yolo / "train").rename(yolo / "Größe")
        (yolo / "data.yaml").write_text((yolo / "data.yaml").read_text().replace("train/", "Größe/"), "utf-8")
        composed_as("NFD", yolo / "Größe")
    else:
        composed_as("NFD", *(yolo / "train" / decomposed).iterdir())
    source = read_yolo(yolo, labels=YOLO_LABELS)
    assert sorted(source.table["image"]) == sorted(before.table["image"])
    assert source.regions.keys() == before.regions.keys()
    assert len(consolidate([source], tmp_path / "cohort")) == 12


def test_an_image_with_two_label_files_of_one_name_but_for_composed_accents_is_refused(yolo):
    label = yolo / "train/labels/limb 0 größe_train.txt"
    label.with_name(unicodedata.normalize("NFD", label.name)).write_text("")  # says intact
    with pytest.raises(
        ValueError, match=r"images with two label files of one name \(1\): 'train/images/limb 0 gr"
    ):
        read_yolo(yolo, labels=YOLO_LABELS)
    assert len(read_yolo(yolo, labels=YOLO_LABELS, skip_unusable=True).table) == 11


def test_varied_copies_of_one_original_are_one_patients_in_whatever_split(yolo):
    for split, copies in (("train", "ab"), ("valid", "c")):
        for kind, ending in (("images", "jpg"), ("labels", "txt")):
            folder = yolo / split / kind
            path = folder / f"limb 0 größe_{split}.{ending}"
            for copy in copies:
                shutil.copy(path, folder / f"Bein 7_jpg.rf.{copy * 32}.{ending}")
            path.rename(folder / f"limb 0_jpg.rf.{split}.{ending}")
    table = read_yolo(yolo, labels=YOLO_LABELS).table.set_index("original")
    patient = {
        "train/images/limb 0_jpg.rf.train.jpg": "limb-0_jpg",
        "valid/images/limb 0_jpg.rf.valid.jpg": "limb-0_jpg",
    }
    patient |= {
        f"{split}/images/Bein 7_jpg.rf.{copy * 32}.jpg": "Bein-7_jpg"
        for split, copy in (("train", "a"), ("train", "b"), ("valid", "c"))
    }
    assert table["copy_of"][table["copy_of"] != ""].to_dict() == patient
    assert (table["patient"] == "").all()  # an original is a lower bound of a patient


@pytest.mark.parametrize("group", [None, GroupConfig()])
def test_varied_copies_are_one_patients_in_a_cohort_grouped_or_not(yolo, tmp_path, group):
    for kind, ending in (("images", "jpg"), ("labels", "txt")):
        for number, copy in ((0, "a"), (1, "b")):  # of other pixels
            path = yolo / "train" / kind / f"limb {number} größe_train.{ending}"
            path.rename(path.with_name(f"Bein 7_jpg.rf.{copy}.{ending}"))
    table = consolidate([read_yolo(yolo, labels=YOLO_LABELS)], tmp_path / "cohort", group=group)
    assert table["patient"].nunique() == 11
    assert table.loc[table["image"].str.startswith("Bein"), "patient"].nunique() == 1


@pytest.mark.parametrize("text", ["", "0 0.5 0.5 0.5 0.5\n"])
def test_originals_of_almost_the_same_pixels_are_one_patients_and_of_two_labels_left_out(tmp_path, text):
    """As the same radiograph, exported under two names."""
    rng = np.random.default_rng(3)
    limb = draw_radiograph(rng, fractures=1).pixels.clip(0, 200)

    def put(split: str, name: str, pixels: np.ndarray, text: str) -> None:
        path = tmp_path / "yolo" / split / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        label = tmp_path / "yolo" / split / "labels" / f"{name}.txt"
        label.parent.mkdir(exist_ok=True)
        label.write_text(text)

    for copy, brighter in (("a", 0), ("b", 20)):
        put("train", f"A_png.rf.{copy}", limb + np.uint8(brighter), "0 0.5 0.5 0.5 0.5\n")
        put("valid", f"B_png.rf.{copy}", limb + np.uint8(brighter + 1), text)
    put("train", "x", draw_radiograph(rng).pixels, "")
    (tmp_path / "yolo/data.yaml").write_text("train: train/images\nval: valid/images\nnames: [broken]\n")
    source = read_yolo(tmp_path / "yolo", labels={"broken": 1})
    table = consolidate([source], tmp_path / "cohort", group=GroupConfig())
    if text:
        assert len(table) == 5
        assert table["patient"].nunique() == 2
    else:
        assert table["image"].tolist() == ["x"]
        (told,) = read_sources(tmp_path / "cohort")["sources"]
        assert len(told["left_out"]) == 4


def test_a_folder_named_as_two_splits_is_read_once_and_noted(yolo):
    change(yolo / "data.yaml", "test: ../test/images", "test: ../valid/images")
    source = read_yolo(yolo, labels=YOLO_LABELS)
    assert source.table["split"].value_counts().to_dict() == {"train": 4, "val": 4}
    assert source.notes == ["data.yaml names one folder as val and as test; its images are val."]


def test_a_data_yaml_without_folders_is_refused(yolo):
    path = yolo / "data.yaml"
    path.write_text("names: ['a']\n")
    with pytest.raises(ValueError, match="names no folder as train, val or test"):
        read_yolo(yolo, labels={"a": 1})


def test_names_that_differ_in_capitals_only_are_told_apart(yolo):
    for kind, ending in (("images", "jpg"), ("labels", "txt")):
        folder = yolo / "train" / kind
        shutil.copy(folder / f"limb 0 größe_train.{ending}", folder / f"LIMB 0 größe_train.{ending}")
    table = read_yolo(yolo, labels=YOLO_LABELS).table
    assert table["image"].str.casefold().is_unique
    assert len(table) == 13
