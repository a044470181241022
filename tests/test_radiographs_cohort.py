import shutil
from pathlib import Path

import pandas as pd
import pytest
from radiograph_folders import radiograph_cohort

from cspine_helpers.files.paths import sha256_of
from cspine_helpers.labels import UID
from cspine_helpers.radiographs.cohort import copy_images, is_radiographs, read_radiograph_cohort
from cspine_helpers.radiographs.image_table import read_images, read_regions, read_sources
from cspine_helpers.splits import read_split, split_hash, write_split


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return radiograph_cohort(tmp_path_factory.mktemp("radiographs"))


@pytest.fixture
def own(made, tmp_path) -> Path:
    """A cohort that a test may change."""
    return shutil.copytree(made, tmp_path / "cohort", symlinks=True)


def divide(folder: Path, split: pd.DataFrame) -> None:
    for path in folder.glob("split.csv*"):
        path.unlink()
    write_split(split, folder / "split.csv")


def test_a_cohort_without_its_annotations_is_refused_in_a_sentence(own):
    (own / "annotations.json").unlink()
    with pytest.raises(FileNotFoundError, match="nobody said where the fractures are"):
        read_radiograph_cohort(own)


def test_each_image_has_the_split_and_patient_of_the_split_table(own):
    table, split = read_images(own), read_split(own / "split.csv").set_index(UID)
    split["patient"] = "group-" + split["patient"]
    divide(own, split.reset_index())
    found = read_radiograph_cohort(own)
    for row in found.images.itertuples():
        assert (row.split, row.patient) == tuple(split.loc[row.image, ["split", "patient"]])
    same = [name for name in table if name not in ("split", "patient")]
    pd.testing.assert_frame_equal(found.images[same], table[same])
    for name in ("train", "validation", "test"):
        rows = found.of(name)
        assert rows["image"].tolist() == sorted(split.index[split["split"] == name])
        counts = found.facts()["counts"][name]
        assert (counts["images"], counts["fractured"]) == (len(rows), rows["label"].sum())
    assert found.unsplit == ()


def test_images_in_no_split_are_left_out_and_counted(own):
    split = read_split(own / "split.csv")
    divide(own, split.iloc[2:])
    found = read_radiograph_cohort(own)
    assert found.unsplit == tuple(split[UID][:2])
    assert not found.images["image"].isin(found.unsplit).any()
    assert found.facts()["unsplit"] == 2


def test_a_cohort_is_known_by_its_hashes_and_says_where_it_is_from(made):
    cohort = read_radiograph_cohort(made)
    assert cohort.fingerprint() == {
        "cohort": "cohort",
        "labels_sha256": sha256_of(made / "images.csv"),
        "annotations_sha256": sha256_of(made / "annotations.json"),
        "split_sha256": split_hash(cohort.split),
    }
    facts = cohort.facts()
    assert [source["licence"] for source in facts["sources"]] == ["CC BY 4.0"]
    assert facts["packing"] is None


def test_a_cohort_that_is_not_whole_says_what_is_missing(own, tmp_path):
    assert is_radiographs(own)
    assert not is_radiographs(tmp_path)
    split = read_split(own / "split.csv")
    divide(own, pd.concat([split, split.iloc[:1].assign(**{UID: "ghost", "patient": "ghost"})]))
    with pytest.raises(ValueError, match=r"divides 1 images that images.csv does not list: 'ghost'"):
        read_radiograph_cohort(own)
    divide(own, split[split["split"] != "test"])
    with pytest.raises(ValueError, match=r"No image of .* is in the split 'test'; there are 'train', 'val"):
        read_radiograph_cohort(own).of("test")
    (own / "split.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"No split.csv in .*: nobody said which images train"):
        read_radiograph_cohort(own)


def test_some_images_make_a_cohort_of_their_own_with_their_bytes(made, tmp_path):
    whole, outlines = read_radiograph_cohort(made), read_regions(made)
    turned = next(image for image, file in zip(whole.images["image"], whole.images["file"], strict=True)
                  if b"Exif" in (made / file).read_bytes()[:40])  # fmt: skip
    names = [turned, *whole.images["image"][~whole.images["image"].eq(turned)].head(3)]
    some = copy_images(made, names, tmp_path / "some", note="four; reduced")
    assert sorted(some.images["image"]) == sorted(names)
    columns = ["image", "patient", "label", "split", "part", "sha256", "height", "width"]
    expected = whole.images[whole.images["image"].isin(names)][columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(some.images[columns], expected)
    for row in some.images.itertuples():
        path = some.folder / row.file
        assert not path.is_symlink()
        assert sha256_of(path) == row.sha256
        for found, outline in zip(read_regions(some.folder)[row.image], outlines[row.image], strict=True):
            assert found.tolist() == outline.tolist()
    (source,) = read_sources(some.folder)["sources"]
    assert (source["images"], source["positive"]) == (4, expected["label"].sum())
    assert (source["notes"], source["left_out"], source["licence"]) == (["four; reduced"], {}, "CC BY 4.0")
    assert not some.packed.exists()
    with pytest.raises(FileExistsError, match="another image table"):
        copy_images(made, names[:2], tmp_path / "some", note="two")


@pytest.mark.parametrize(
    ("names", "message"), [(["nowhere"], "does not hold 1 of the images"), ([], "No images to copy")]
)
def test_images_that_a_cohort_does_not_hold_are_not_copied(made, tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        copy_images(made, names, tmp_path / "some", note="")
    assert not (tmp_path / "some").exists()
