"""Groups of radiographs: copies, images alike, series; splits of whole groups; what two splits share."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from cspine_helpers.labels import SPLITS, UID
from cspine_helpers.radiographs.groups import (
    FRACTIONS,
    GroupConfig,
    group_images,
    leakage,
    outside_published,
    split_images,
)
from cspine_helpers.splits import SplitConfig, read_split, split_hash, write_split

FRACATLAS = Path(__file__).parents[2] / "shared" / "data" / "fracatlas"
PARTS = ("hand", "leg", "hip", "shoulder")


def image_table(names, labels, *, part="hand", patient="", source="own"):
    rows = {"image": list(names), "file": [f"{name}.png" for name in names], "label": list(labels)}
    table = pd.DataFrame(rows).assign(part=part, patient=patient, source=source, hardware=0, multiscan=0)
    return table.assign(split="")


def drawn(names, seed=0):
    """Pixels of each image, all different, and what reads them by the file's name."""
    rng = np.random.default_rng(seed)
    pixels = {f"{name}.png": rng.integers(0, 256, (48, 40), dtype=np.uint8) for name in names}
    return pixels, lambda path: pixels[path.name]


def grouped(table, read, **options):
    found = group_images(table, read, **options)
    return dict(zip(found.table["image"], found.table["patient"], strict=True)), found


def test_identical_pixels_are_one_patient_whatever_the_names():
    names = ["a", "b", "c"]
    pixels, read = drawn(names)
    pixels["c.png"] = pixels["a.png"].copy()
    patients, found = grouped(image_table(names, [1, 0, 1]), read)
    assert patients == {"a": "a", "b": "b", "c": "a"}
    assert found.pairs[["image", "other", "why"]].to_numpy().tolist() == [["a", "c", "identical"]]
    assert found.pairs["similarity"].item() == pytest.approx(1, abs=1e-5)


def test_the_same_bytes_in_another_shape_are_not_identical():
    pixels, read = drawn(["a", "b"])
    pixels["b.png"] = pixels["a.png"].reshape(40, 48)
    assert grouped(image_table(["a", "b"], [0, 0]), read)[0] == {"a": "a", "b": "b"}


def test_alike_are_the_pairs_that_numpy_correlates_above_the_threshold():
    import cv2

    names = [f"image{n}x" for n in range(30)]
    pixels, read = drawn(names)
    rng = np.random.default_rng(5)
    for n in range(0, 30, 3):  # copies with more and more noise
        noisy = pixels[f"image{n}x.png"] + rng.normal(0, 0.8 * n, (48, 40))
        pixels[f"image{n + 1}x.png"] = np.clip(noisy, 0, 255).astype(np.uint8)
    _, found = grouped(image_table(names, [0] * 30), read)
    small = [
        cv2.resize(pixels[f"{name}.png"], (16, 16), interpolation=cv2.INTER_AREA).ravel() for name in names
    ]
    one, two = np.nonzero(np.triu(np.corrcoef(small), 1) > 0.995)
    expected = {(names[n], names[m]) for n, m in zip(one, two, strict=True)}
    assert 3 <= len(expected) <= 8
    assert set(zip(found.pairs["image"], found.pairs["other"], strict=True)) == expected
    again = np.array(
        [
            np.corrcoef(small)[names.index(a), names.index(b)]
            for a, b in found.pairs[["image", "other"]].to_numpy()
        ]
    )
    np.testing.assert_allclose(found.pairs["similarity"], again, atol=1e-5)


def test_images_of_one_grey_are_alike_to_none():
    pixels, read = drawn(["a", "b", "c"])
    pixels["a.png"][:], pixels["b.png"][:] = 7, 8
    assert grouped(image_table(["a", "b", "c"], [0, 0, 0]), read)[0] == {"a": "a", "b": "b", "c": "c"}


@pytest.mark.parametrize(
    ("numbers", "labels", "parts", "expected"),
    [
        ((7, 8, 9), (1, 1, 1), ("hand",) * 3, "aaa"),
        ((7, 8, 9), (1, 1, 0), ("hand",) * 3, "aac"),
        ((7, 8, 9), (0, 0, 0), ("hand", "leg", "leg"), "abb"),
        ((7, 8, 9), (0, 0, 0), ("leg", "leg+hip", "hip"), "aaa"),
        ((7, 9, 12), (0, 0, 0), ("hand",) * 3, "aac"),  # 8 is absent, and so are 10 and 11
        ((7, 8, 9), (0, 1, 0), ("hand",) * 3, "abc"),  # a gap of 2 only where nothing is between
        ((7, 8, 9), (0, 0, 0), ("", "", ""), "abc"),  # of no known part
    ],
)
def test_series_are_neighbours_by_number_of_one_part_and_label(numbers, labels, parts, expected):
    names = [f"IMG{number:07d}" for number in numbers]
    patients, _ = grouped(image_table(names, labels, part=list(parts)), drawn(names)[1])
    assert list(patients.values()) == [names["abc".index(letter)] for letter in expected]


def test_series_end_with_source_prefix_and_where_patients_are_named():
    names = ["a1", "a2", "b3", "b4", "b5", "b6"]
    table = image_table(names, [0] * 6, patient=["", "a2", "", "p", "p", "q"])  # a2: called as the image
    assert list(grouped(table, drawn(names)[1])[0].values()) == ["a1", "a1", "b3", "p", "p", "q"]
    other = table.assign(source=["one", "two", *["three"] * 4])
    assert list(grouped(other, drawn(names)[1])[0].values()) == ["a1", "a2", "b3", "p", "p", "q"]
    alone, found = grouped(table, drawn(names)[1], config=GroupConfig(gap=0))
    assert list(alone.values()) == ["a1", "a2", "b3", "p", "p", "q"]
    assert found.pairs.empty


def test_named_patients_are_joined_by_identical_pixels_and_not_by_thumbnails():
    names = ["a", "b", "c", "d"]
    pixels, read = drawn(names)
    pixels["b.png"] = pixels["a.png"] ^ 1
    pixels["d.png"] = pixels["c.png"].copy()
    patients, _ = grouped(image_table(names, [0] * 4, patient=["p", "q", "r", "s"]), read)
    assert patients == {"a": "p", "b": "q", "c": "r", "d": "r"}
    patients, _ = grouped(image_table(names, [0] * 4, patient=["p", "", "r", "s"]), read)
    assert patients == {"a": "p", "b": "p", "c": "r", "d": "r"}


def test_copies_of_one_original_are_together_and_an_original_is_no_patient():
    names = ["a", "b", "c", "d", "e"]
    pixels, read = drawn(names)
    pixels["c.png"] = pixels["b.png"] ^ 1
    table = image_table(names, [0] * 5).assign(copy_of=["A", "A", "B", "B", ""])
    patients, found = grouped(table, read)
    assert patients == {"a": "a", "b": "a", "c": "a", "d": "a", "e": "e"}
    assert list(found.table) == list(table)
    patients, _ = grouped(table.assign(patient=["p", "", "", "q", ""], label=[0, 1, 1, 0, 0]), read)
    assert set(patients.values()) == {"p", "e"}
    assert list(grouped(table.assign(label=[0, 0, 1, 1, 0]), read)[0]) == ["a", "d", "e"]


def test_with_similarity_1_only_identical_pixels_are_together():
    names = ["a", "b", "c"]
    pixels, read = drawn(names)
    pixels["b.png"], pixels["c.png"] = pixels["a.png"] ^ 1, pixels["a.png"].copy()
    patients, _ = grouped(image_table(names, [0] * 3), read, config=GroupConfig(similarity=1))
    assert patients == {"a": "a", "b": "b", "c": "a"}


def test_outside_a_published_split_is_what_is_not_in_the_one_nearest_to_the_test():
    table = image_table("abcdef", [0] * 6).assign(patient=list("ppppqr"))
    table["split"] = ["train", "valid", "held", "", "train", "valid"]
    pairs = pd.DataFrame({"image": ["c"], "other": ["a"], "why": ["alike"]})
    found = outside_published(table, {"valid": "validation", "held": "test"}, pairs)
    assert found.to_numpy().tolist() == [
        ["a", "p", "c", "held", "alike"],
        ["b", "p", "c", "held", "of one patient"],
        ["d", "p", "c", "held", "of one patient"],
    ]
    assert outside_published(table[4:], {"valid": "test"}).empty


def test_together_with_a_third_is_together():
    names = ["IMG1", "IMG2", "IMG9", "IMG10"]
    pixels, read = drawn(names)
    pixels["IMG9.png"] = pixels["IMG2.png"].copy()
    patients, found = grouped(image_table(names, [0] * 4), read)
    assert set(patients.values()) == {"IMG1"}
    assert found.sizes().to_dict("records") == [{"size": 4, "groups": 1, "images": 4, "fractured": 0}]


def test_the_same_picture_with_both_labels_is_left_out_on_both_sides():
    names = ["a", "b", "c", "d", "e"]
    pixels, read = drawn(names)
    pixels["b.png"] = pixels["a.png"].copy()
    pixels["d.png"] = pixels["c.png"] ^ 1
    patients, found = grouped(image_table(names, [1, 0, 1, 0, 1]), read)
    assert list(patients) == ["e"]
    assert found.left_out[["image", "label", "other", "other_label", "why"]].to_numpy().tolist() == [
        ["a", 1, "b", 0, "identical"],
        ["b", 0, "a", 1, "identical"],
        ["c", 1, "d", 0, "alike"],
        ["d", 0, "c", 1, "alike"],
    ]
    assert found.report()["left_out"] == ["a", "b", "c", "d"]
    assert found.report()["pairs"] == {"identical": 1, "alike": 1, "series": 0}


def test_what_cannot_be_grouped_is_refused_and_named():
    names = ["a", "b"]
    table, read = image_table(names, [0, 1]), drawn(names)[1]
    for broken, said in (
        (table.drop(columns="part"), "lacks the column"),
        (table.iloc[:0], "no rows"),
        (table.assign(image="a"), r"named once; these are not \(1\): 'a'"),
        (table.assign(label=[0, 2]), r"another \(1\): 'b'"),
    ):
        with pytest.raises(ValueError, match=said):
            group_images(broken, read)

    def torn(path):
        raise ValueError(f"{path.name} is cut off")

    with pytest.raises(ValueError, match=r"cannot be read \(2\): a \(a.png is cut off\), b"):
        group_images(table, torn)
    with pytest.raises(ValueError, match="similarity = 2"):
        GroupConfig(similarity=2)


@pytest.fixture(scope="module")
def many():
    """A table of 1,200 images in groups of 1 to 8, as after grouping."""
    rng = np.random.default_rng(3)
    group = np.repeat(np.arange(400), rng.integers(1, 9, 400))[:1200]
    names = [f"image{n:04}" for n in range(len(group))]
    label, part = rng.random(400) < 0.2, rng.integers(0, 4, 400)
    table = image_table(names, label[group].astype(int), patient=[f"p{n}" for n in group])
    table["part"] = np.array(PARTS)[part[group]]
    return table.assign(hardware=((rng.random(len(group)) < 0.3) & label[group]).astype(int))


def test_split_keeps_groups_whole_and_balances_labels_parts_and_hardware(many):
    split = split_images(many)
    joined = many.merge(split, left_on="image", right_on=UID, suffixes=("", "_own"))
    assert joined.groupby("patient")["split_own"].nunique().max() == 1
    shares = dict(zip(SPLITS, FRACTIONS, strict=True))
    for rows in (joined, joined[joined["label"] == 1], joined[joined["hardware"] == 1]):
        found = rows["split_own"].value_counts(normalize=True)
        assert all(abs(found[name] - share) < 0.03 for name, share in shares.items())
    for _, rows in joined.groupby(["part", "label"]):
        found = rows["split_own"].value_counts(normalize=True)
        assert all(abs(found[name] - share) < 0.06 for name, share in shares.items())


def test_split_is_the_same_whatever_the_order_of_rows_and_another_with_another_seed(many, tmp_path):
    split = split_images(many)
    assert split_hash(split_images(many.sample(frac=1, random_state=1))) == split_hash(split)
    config = SplitConfig(fractions=FRACTIONS, seed=1)
    assert split_hash(split_images(many, config=config)) != split_hash(split)
    write_split(split, tmp_path / "split.csv", made_with={"seed": 0})
    assert read_split(tmp_path / "split.csv").equals(split)


def test_a_published_split_stays_and_the_others_are_divided(many):
    published = many.assign(split=np.where(many["patient"].isin(["p1", "p2"]), "valid", "train"))
    split = split_images(published, published={"valid": "test"})
    assert set(split["patient"][split["split"] == "test"]) == {"p1", "p2"}
    rest = split["split"][split["split"] != "test"].value_counts(normalize=True)
    assert rest["validation"] == pytest.approx(0.12 / 0.82, abs=0.01)
    torn = published.assign(split=["valid", *published["split"][1:]])
    others = published["image"][published["patient"] == "p0"].tolist()[1:]
    says = rf"published split that has their patient \({len(others)}\): {others[0]} with image0000 of valid"
    with pytest.raises(ValueError, match=says):
        split_images(torn, published={"valid": "test"})
    outside = outside_published(torn, {"valid": "test"})
    assert outside["image"].tolist() == others
    split_images(torn[~torn["image"].isin(outside["image"])], published={"valid": "test"})
    with pytest.raises(ValueError, match="published split 'test'; found 'train', 'valid'"):
        split_images(published, published={"test": "test"})
    with pytest.raises(ValueError, match="called 'train', 'validation', 'test'; found 'hidden'"):
        split_images(published, published={"valid": "hidden"})


def test_what_cannot_be_split_is_refused(many):
    with pytest.raises(ValueError, match=r"without a patient \(1200\): 'image0000'"):
        split_images(many.assign(patient=""))
    with pytest.raises(ValueError, match=r"2 patients \(groups\) are too few: nothing is left for"):
        split_images(many.assign(patient=np.where(many.index < 600, "p", "q")))
    with pytest.raises(ValueError, match="lacks the column"):
        split_images(many.drop(columns="hardware"))


def test_leakage_by_hand():
    names = ["IMG1", "IMG2", "IMG3", "IMG5", "IMG9"]
    pixels, read = drawn(names)
    pixels["IMG9.png"] = pixels["IMG1.png"].copy()
    pixels["IMG5.png"] = pixels["IMG3.png"] ^ 1
    found = group_images(image_table(names, [1, 1, 0, 0, 1]), read)
    # 1, 2 a series, 9 a copy of 1, 5 alike 3
    place = {"IMG1": "train", "IMG2": "val", "IMG3": "train", "IMG5": "val", "IMG9": "train"}
    row = leakage(found.table, place, found.pairs).to_dict("records")
    assert row == [
        {"split": "train", "other": "val", "groups": 2, "identical": 0, "alike": 1}
        | {"fractured_neighbours": 1, "fractured": 1}
    ]
    row = leakage(found.table, place | {"IMG9": "val", "IMG5": "train"}, found.pairs).to_dict("records")
    assert row == [
        {"split": "train", "other": "val", "groups": 1, "identical": 1, "alike": 1}
        | {"fractured_neighbours": 1, "fractured": 2}
    ]
    with pytest.raises(ValueError, match="between two splits; found 'train'"):
        leakage(found.table, dict.fromkeys(names, "train"), found.pairs)


def test_a_split_by_group_leaks_nothing(many):
    split = split_images(many)
    pairs = pd.DataFrame({"image": [], "other": [], "why": [], "similarity": []}, dtype="str")
    assert (leakage(many, split, pairs)[["groups", "identical", "alike"]] == 0).all(axis=None)


@pytest.fixture(scope="module")
def fracatlas():
    if not FRACATLAS.is_dir():
        pytest.skip("FracAtlas is not at ../shared/data/fracatlas")
    rows = pd.read_csv(FRACATLAS / "dataset.csv")
    folder = np.where(rows["fractured"] == 1, "Fractured", "Non_fractured")
    files = [FRACATLAS / "images" / each / name for each, name in zip(folder, rows["image_id"], strict=True)]
    table = image_table(rows["image_id"].str[:-4], rows["fractured"], source="fracatlas")
    words = [[part for part in PARTS if row[part]] for _, row in rows.iterrows()]
    table = table.assign(path=list(map(str, files)), part=["+".join(its) for its in words])
    kept = {name: rows[name] for name in ("hardware", "multiscan", "split")}
    table = table.assign(**kept)

    def read(path):
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("L"))

    return table, group_images(table, read)


@pytest.mark.slow
def test_fracatlas_copies_conflicts_and_the_leaks_of_its_published_split(fracatlas):
    table, found = fracatlas
    pairs = found.pairs
    identical = pairs[pairs["why"] == "identical"]
    assert len(set(identical["image"]) | set(identical["other"])) == 118
    assert len(pairs[pairs["why"] != "series"]) == 87
    both = {tuple(sorted(pair)) for pair in found.left_out[["image", "other"]].to_numpy()}
    assert both == {
        ("IMG0002886", "IMG0004243"),
        ("IMG0002952", "IMG0004262"),  # one exposure saved twice: its grey values differ by 9 at most
        ("IMG0003034", "IMG0004314"),
    }
    patient = table["image"].map(found.table.set_index("image")["patient"])
    row = leakage(table.assign(patient=patient), table.set_index("image")["split"], pairs).iloc[0]
    assert row[["identical", "alike", "fractured"]].tolist() == [16, 20, 108]
    assert row["groups"] > 300
    assert row["fractured_neighbours"] == 75


@pytest.mark.slow
def test_fracatlas_split_by_group_leaks_nothing_and_is_balanced(fracatlas):
    _, found = fracatlas
    assert found.sizes()["size"].max() < 40
    split = split_images(found.table)
    assert (leakage(found.table, split, found.pairs)[["groups", "identical", "alike"]] == 0).all(axis=None)
    joined = found.table.drop(columns="split").merge(split[[UID, "split"]], left_on="image", right_on=UID)
    assert abs(len(joined[joined["split"] == "test"]) - 615) < 5
    for rows in (joined, joined[joined["label"] == 1]):
        np.testing.assert_allclose(
            rows["split"].value_counts(normalize=True)[list(SPLITS)], FRACTIONS, atol=0.01
        )
