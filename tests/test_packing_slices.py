"""Slices of another program, one file each, become packed sequences; what cannot be used is named."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cspine_helpers.__main__ import main
from cspine_helpers.files.paths import link_cohort
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.packed import MASK, check_sequences, open_sequence, read_manifest, sequence_path
from cspine_helpers.packing.cohort import PackSource, pack_cohort
from cspine_helpers.packing.slices import find_slices, pack_slices

STUDIES, SLICES, SIZE = ("1.2.3", "1.2.40"), 5, 16


def a_slice(rng: np.random.Generator) -> np.ndarray:
    """(H, W, 6) uint8, as NumPy saves what a program of the competition made of one position."""
    array = rng.integers(0, 256, (SIZE, SIZE, 6), dtype=np.uint8)
    array[..., MASK] = 0
    array[4:12, 4:12, MASK] = 255
    return array


@pytest.fixture
def slices(tmp_path) -> Path:
    folder, rng = tmp_path / "slices", np.random.default_rng(0)
    folder.mkdir()
    for uid in STUDIES:
        for c in range(1, 8):
            for t in range(SLICES):
                np.save(folder / f"{uid}_{c}_{t}.npy", a_slice(rng))
    (folder / "readme.txt").write_text("notes")
    return folder


def change(slices: Path, name: str, how) -> None:
    path = slices / f"{name}.npy"
    np.save(path, how(np.load(path)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_slices_become_sequences_in_their_order(slices, tmp_path):
    report = pack_slices(tmp_path / "old", slices)
    assert report[[UID, "status", "sequences"]].to_numpy().tolist() == [[u, "packed", 7] for u in STUDIES]
    for uid in STUDIES:
        for c, vertebra in enumerate(VERTEBRAE, start=1):
            expected = np.stack([np.load(slices / f"{uid}_{c}_{t}.npy") for t in range(SLICES)])
            found = open_sequence(sequence_path(tmp_path / "old" / "packed", uid, vertebra))
            np.testing.assert_array_equal(found, expected)


def test_the_manifest_says_what_is_known_and_no_more(slices, tmp_path):
    pack_slices(tmp_path / "old", slices)
    packed = tmp_path / "old" / "packed"
    manifest = read_manifest(packed)
    assert len(manifest) == 14
    unknown = ["spacing_z_mm", "pixel_mm", "window_low_hu", "slice_truth", "completeness", "mask"]
    assert manifest[unknown].isna().all(axis=None)
    assert manifest["source_sha256"].nunique() == 14
    assert set(manifest["packer"]) == {"slices 1"}
    assert set(manifest["warnings"]) == {
        "packed from slices of another program: spacing, window, order and sides are not known"
    }
    samples = manifest[[UID, "vertebra"]]
    check_sequences(packed, samples, slices=SLICES, size=SIZE, verify=True)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (lambda a: a / np.float32(255), lambda a: a),
        (lambda a: a.astype(np.float64), lambda a: a),
        (lambda a: a.astype(np.int32), lambda a: a),
        (lambda a: np.dstack([a[..., :MASK], a[..., MASK] // 255]), lambda a: a),
    ],
    ids=["floats to 1", "floats to 255", "whole numbers", "a mask of 0 and 1"],
)
def test_values_are_the_same_however_they_were_stored(slices, tmp_path, how, expected):
    whole = np.stack([np.load(slices / f"1.2.3_4_{t}.npy") for t in range(SLICES)])
    for t in range(SLICES):
        change(slices, f"1.2.3_4_{t}", how)
    pack_slices(tmp_path / "old", slices)
    found = open_sequence(sequence_path(tmp_path / "old" / "packed", "1.2.3", "C4"))
    np.testing.assert_array_equal(found, expected(whole))


def test_a_soft_mask_is_kept_and_said(slices, tmp_path):
    change(slices, "1.2.3_4_0", lambda a: np.where(np.arange(6) == MASK, a // 2, a).astype(np.uint8))
    pack_slices(tmp_path / "old", slices)
    manifest = read_manifest(tmp_path / "old" / "packed").set_index([UID, "vertebra"])
    soft = manifest["warnings"].str.endswith("its mask is soft, not 0 or 255")
    assert soft[soft].index.tolist() == [("1.2.3", "C4")]
    found = open_sequence(sequence_path(tmp_path / "old" / "packed", "1.2.3", "C4"))
    assert found[0, ..., MASK].max() == 127


@pytest.mark.parametrize("first", [0, 1])
def test_slices_may_be_counted_from_0_or_1(slices, tmp_path, first):
    expected = np.load(slices / "1.2.3_4_2.npy")
    for path in sorted(slices.glob("*.npy"), reverse=True):
        stem, _, t = path.stem.rpartition("_")
        path.rename(slices / f"{stem}_{int(t) + first}.npy")
    report = pack_slices(tmp_path / "old", slices)
    assert set(report["status"]) == {"packed"}
    found = open_sequence(sequence_path(tmp_path / "old" / "packed", "1.2.3", "C4"))
    np.testing.assert_array_equal(found[2], expected)


BROKEN = {
    "a slice is missing": (lambda f: (f / "1.2.3_4_2.npy").unlink(), "slices 2 are missing of 5"),
    "a slice too many": (
        lambda f: np.save(f / "1.2.3_4_5.npy", np.load(f / "1.2.3_4_4.npy")),
        "slices 5 are more than the 5 of other vertebrae",
    ),
    "cut off": (
        lambda f: (f / "1.2.3_4_2.npy").write_bytes((f / "1.2.3_4_2.npy").read_bytes()[:-9]),
        "1.2.3_4_2.npy is no whole .npy file",
    ),
    "a pickle": (
        lambda f: np.save(f / "1.2.3_4_2.npy", np.array([{}]), allow_pickle=True),
        "1.2.3_4_2.npy is no whole .npy file",
    ),
    "five channels": (
        lambda f: change(f, "1.2.3_4_0", lambda a: a[..., :5]),
        "1.2.3_4_0.npy has shape (16, 16, 5), expected (H, W, 6)",
    ),
    "channels first": (
        lambda f: change(f, "1.2.3_4_0", lambda a: a.transpose(2, 0, 1)),
        "1.2.3_4_0.npy has shape (6, 16, 16), expected (H, W, 6)",
    ),
    "another size": (
        lambda f: change(f, "1.2.3_4_2", lambda a: a[:8]),
        "1.2.3_4_2.npy is (8, 16, 6) of uint8, the slices before are (16, 16, 6) of uint8",
    ),
    "Hounsfield units": (
        lambda f: [change(f, f"1.2.3_4_{t}", lambda a: a.astype(np.int16) - 1000) for t in range(SLICES)],
        "values from -1000 to",
    ),
    "NaN": (
        lambda f: [change(f, f"1.2.3_4_{t}", lambda a: a * np.float32("nan")) for t in range(SLICES)],
        "values from nan to nan",
    ),
    "broken values": (
        lambda f: [change(f, f"1.2.3_4_{t}", lambda a: a * 0.7) for t in range(SLICES)],
        "expected whole ones to 255, or 0 to 1",
    ),
    "a crop that failed": (
        lambda f: [change(f, f"1.2.3_4_{t}", np.ones_like) for t in range(SLICES)],
        "all of its values are 1: a crop that failed",
    ),
    "no mask": (
        lambda f: [
            change(f, f"1.2.3_4_{t}", lambda a: np.where(np.arange(6) == MASK, 0, a).astype(np.uint8))
            for t in range(SLICES)
        ],
        "1.2.3_4.npy was not written: empty mask",
    ),
}


@pytest.mark.parametrize(("damage", "said"), BROKEN.values(), ids=BROKEN)
def test_a_vertebra_that_cannot_be_packed_is_named_and_the_others_go_on(slices, tmp_path, damage, said):
    damage(slices)
    report = pack_slices(tmp_path / "old", slices).set_index(UID)
    assert report["status"].to_dict() == {"1.2.3": "partial", "1.2.40": "packed"}
    assert report["message"]["1.2.3"].startswith("C4: ")
    assert said in report["message"]["1.2.3"]
    packed = tmp_path / "old" / "packed"
    assert not sequence_path(packed, "1.2.3", "C4").exists()
    assert len(read_manifest(packed)) == 13


def test_packing_again_does_nothing_and_what_changed_is_packed_again(slices, tmp_path, monkeypatch):
    packed = tmp_path / "old" / "packed"
    pack_slices(tmp_path / "old", slices)
    before = contents(packed)
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", lambda *_, **__: pytest.fail("a slice was read again"))
        pack_slices(tmp_path / "old", slices)
    assert contents(packed) == before
    change(slices, "1.2.3_4_2", lambda a: a[::-1])
    (packed / "1.2.40_1.npy").unlink()
    pack_slices(tmp_path / "old", slices)
    after = contents(packed)
    assert after["1.2.40_1.npy"] == before["1.2.40_1.npy"]
    changed = {name for name in before if name.endswith(".npy") and after[name] != before[name]}
    assert changed == {"1.2.3_4.npy"}
    (slices / "1.2.3_4_2.npy").unlink()  # its old sequence does not stay
    pack_slices(tmp_path / "old", slices)
    assert "1.2.3_4.npy" not in contents(packed)


def test_a_study_at_a_time_ends_with_the_same_bytes(slices, tmp_path):
    pack_slices(tmp_path / "whole", slices)
    for uid in reversed(STUDIES):
        pack_slices(tmp_path / "parts", slices, only=[uid])
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: np.save(f / "volume.npy", np.zeros(3)), r"1 files in .* are not named .*: 'volume\.npy'"),
        (lambda f: np.save(f / "1.2.3_0_0.npy", np.zeros(3)), r"numbered 1 to 7, .*; found 0 in .*add one"),
        (lambda f: np.save(f / "1.2.3_8_0.npy", np.zeros(3)), r"numbered 1 to 7, .*; found 8 in "),
        (lambda f: np.save(f / "a b_1_0.npy", np.zeros(3)), r"1 StudyInstanceUID that cannot be file names"),
    ],
)
def test_a_folder_that_is_not_understood_is_refused_and_nothing_is_written(
    slices, tmp_path, damage, sentence
):
    damage(slices)
    with pytest.raises(ValueError, match=sentence):
        pack_slices(tmp_path / "old", slices)
    assert not (tmp_path / "old").exists()


def test_no_slices_other_sequences_and_unknown_studies_are_refused(slices, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No slices in .*empty"):
        find_slices(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"No slices in .* of '9\.9'\. Check the names"):
        pack_slices(tmp_path / "old", slices, only=["9.9"])
    assert not (tmp_path / "old").exists()
    (tmp_path / "old" / "packed").mkdir(parents=True)
    (tmp_path / "old" / "packed" / "1_1.npy").write_bytes(b"theirs")
    with pytest.raises(FileExistsError, match="holds sequences that were not packed here"):
        pack_slices(tmp_path / "old", slices)
    assert (tmp_path / "old" / "packed" / "1_1.npy").read_bytes() == b"theirs"


def test_the_command_packs_slices_and_says_what_failed(slices, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    command = ["pack", "--cohort", "old", "--slices-from", str(slices)]
    assert main([*command, "--only", "1"]) == 0
    assert capsys.readouterr().out.startswith("1 studies: 1 packed")
    for path in slices.glob("1.2.40_*_0.npy"):
        path.unlink()
    assert main(command) == 3
    out = capsys.readouterr().out
    assert re.search(r"2 studies: 1 packed, .*, 1 failed; 7 sequences", out)
    assert "- 1.2.40: C1: slices 0 are missing of 5; C2: " in out
    assert pd.read_csv(tmp_path / "data" / "old" / "packed" / "report.csv")["status"].tolist() == [
        "packed",
        "failed",
    ]


@pytest.mark.parametrize("option", ["--images x", "--size 64", "--soft-mask", "--only 0", "--series 1.2"])
def test_options_of_ct_are_refused_with_slices(slices, tmp_path, monkeypatch, capsys, option):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    assert main(["pack", "--cohort", "old", "--slices-from", str(slices), *option.split()]) == 100
    assert option.split()[0] in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_packed_folder_that_is_linked_is_not_written_through(slices, tmp_path, monkeypatch):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path / "project"))
    pack_slices(tmp_path / "archive", slices, only=STUDIES[:1])
    folder = link_cohort("mine", tmp_path / "archive")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"packed is a link out of its folder, to .*archive"):
        pack_slices(folder, slices)
    source = PackSource(slices, slices)
    with pytest.raises(ValueError, match=r"packed is a link out of its folder, to .*archive"):
        pack_cohort(folder, source=source)
    assert contents(tmp_path) == before
