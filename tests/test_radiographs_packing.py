import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import REAL_DATA
from PIL import Image
from radiograph_folders import SMALL

from cspine_helpers.radiographs import packing as room
from cspine_helpers.radiographs.annotations import rasterise
from cspine_helpers.radiographs.consolidation import consolidate
from cspine_helpers.radiographs.dataset import RadiographDataset
from cspine_helpers.radiographs.image_table import read_images, read_regions
from cspine_helpers.radiographs.images import Frame, read_radiograph
from cspine_helpers.radiographs.packing import ImagePackConfig, pack_images, read_packing
from cspine_helpers.radiographs.sources.fracatlas import read_fracatlas

FRACATLAS = REAL_DATA / "fracatlas"
needs_fracatlas = pytest.mark.skipif(not FRACATLAS.is_dir(), reason=f"FracAtlas is not at {FRACATLAS}")


def test_a_packed_radiograph_is_its_frame_and_masks_are_its_outlines_there(packed):
    table, regions = read_images(packed.parent), read_regions(packed.parent)
    assert sorted(path.stem for path in (packed / "images").iterdir()) == table["image"].tolist()
    marked = [image for image, polygons in regions.items() if polygons]
    assert sorted(path.stem for path in (packed / "masks").iterdir()) == sorted(marked)
    for row in table.itertuples():
        frame = Frame.of(row.height, row.width, long=96, short=64)
        pixels = np.load(packed / "images" / f"{row.image}.npy")
        np.testing.assert_array_equal(pixels, frame.pixels(read_radiograph(packed.parent / row.file)))
        assert pixels.shape == ((96, 64) if row.height >= row.width else (64, 96))
        if regions[row.image]:
            mask = np.load(packed / "masks" / f"{row.image}.npy")
            assert set(np.unique(mask)) == {0, 255}
            # oracle: drawn in the radiograph's own pixels, and that picture brought into the frame
            drawn = frame.pixels(255 * rasterise(regions[row.image], row.height, row.width))
            assert np.abs(mask.astype(float) - drawn).mean() < 0.25 * mask.mean() + 0.5


@needs_fracatlas
def test_masks_of_fracatlas_lie_where_its_boxes_of_another_format_do(tmp_path):
    # IMG0002588 and IMG0002628 are turned by their EXIF orientation
    fractured = ["IMG0002588", "IMG0002628", "IMG0000019", "IMG0000025"]
    published, own = FRACATLAS, tmp_path / "published"
    table = pd.read_csv(published / "dataset.csv", dtype=str)
    chosen = table[table["image_id"].isin([f"{name}.jpg" for name in [*fractured, "IMG0000000"]])]
    for name, label in zip(chosen["image_id"], chosen["fractured"], strict=True):
        place = f"images/{'Fractured' if label == '1' else 'Non_fractured'}/{name}"
        (own / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(published / place, own / place)
    chosen.to_csv(own / "dataset.csv", index=False)
    (outlines,) = (published / "Annotations" / "VGG JSON").iterdir()
    (own / "Annotations" / "VGG JSON").mkdir(parents=True)
    kept = {
        key: each for key, each in json.loads(outlines.read_text()).items() if _is_one_of(each, fractured)
    }
    (own / "Annotations" / "VGG JSON" / outlines.name).write_text(json.dumps(kept))
    consolidate([read_fracatlas(own)], tmp_path / "cohort")
    packed = pack_images(tmp_path / "cohort", ImagePackConfig(long=384, short=320))
    dataset = RadiographDataset(read_images(packed.parent), packed, stride=1)
    rows = {row.image: (n, row) for n, row in enumerate(read_images(packed.parent).itertuples())}
    assert dataset.labels.sum() == 4
    for name in fractured:
        index, row = rows[name]
        lines = (published / "Annotations" / "YOLO" / f"{name}.txt").read_text().splitlines()
        boxes = np.array([line.split()[1:] for line in lines], float)  # middle and size, shares of the image
        sizes = np.array([row.width, row.height])
        corners = np.concatenate([(boxes[:, :2] + sign * boxes[:, 2:] / 2) * sizes for sign in (-1, 1)])
        frame = Frame.of(row.height, row.width, long=384, short=320)
        low, high = (find(frame.points(corners), axis=0) for find in (np.min, np.max))
        y, x = np.nonzero(dataset[index]["mask"].numpy())
        assert np.abs([x.min() - low[0], y.min() - low[1]]).max() <= 4
        assert np.abs([x.max() + 1 - high[0], y.max() + 1 - high[1]]).max() <= 4


def _is_one_of(each: dict, names: list[str]) -> bool:
    return each["filename"].removesuffix(".jpg") in names


def test_packing_again_writes_nothing_and_a_stopped_packing_goes_on(own_packed):
    whole = {path: path.read_bytes() for path in own_packed.rglob("*.npy")}
    first, second, *_ = sorted((own_packed / "images").iterdir())
    mask = sorted((own_packed / "masks").iterdir())[-1]
    first.unlink()
    for path in (second, mask):
        path.write_bytes(whole[path][:-1])  # as after a power failure
    before = {path: path.stat().st_mtime_ns for path in own_packed.rglob("*.npy")}
    pack_images(own_packed.parent, SMALL)
    assert {path: path.read_bytes() for path in own_packed.rglob("*.npy")} == whole
    again = {path.stem for path in whole if path.stat().st_mtime_ns != before.get(path)}
    assert again == {first.stem, second.stem, mask.stem}


def test_another_frame_or_another_packing_begins_from_nothing(own_packed, monkeypatch):
    pack_images(own_packed.parent, ImagePackConfig(long=64, short=64))
    assert {np.load(path).shape for path in (own_packed / "images").iterdir()} == {(64, 64)}
    with monkeypatch.context() as patch:
        patch.setattr(room, "PACKING_VERSION", 99)
        with pytest.raises(ValueError, match=r"was packed by another version of the package. Now pack the"):
            read_packing(own_packed)
        (own_packed / "images" / "left.npy").touch()
        pack_images(own_packed.parent, SMALL)
        assert not (own_packed / "images" / "left.npy").exists()
        assert read_packing(own_packed)["packing"] == 99


def test_packing_of_other_images_or_outlines_is_noticed(own_packed):
    folder = own_packed.parent
    RadiographDataset(read_images(own_packed.parent), own_packed)
    annotations = json.loads((folder / "annotations.json").read_text())
    annotations["annotations"][0]["segmentation"][0][0] += 1
    (folder / "annotations.json").write_text(json.dumps(annotations))
    with pytest.raises(ValueError, match=r"was packed with other outlines than annotations.json holds. Now"):
        RadiographDataset(read_images(own_packed.parent), own_packed)
    table = pd.read_csv(folder / "images.csv")
    table.loc[0, "sha256"] = "0" * 64
    table.to_csv(folder / "images.csv", index=False)
    with pytest.raises(ValueError, match=r"of other images than images.csv lists and with other outlines"):
        read_packing(own_packed)
    pack_images(folder, SMALL)
    assert read_packing(own_packed)["frame"] == {"long": 96, "short": 64}


def test_another_split_or_patient_leaves_the_packing_valid(own_packed):
    table = pd.read_csv(own_packed.parent / "images.csv")
    table["split"] = "train"
    table.to_csv(own_packed.parent / "images.csv", index=False)
    assert read_packing(own_packed)["packing"] == room.PACKING_VERSION


def test_damaged_images_are_named_and_the_others_packed(own_packed):
    folder, table = own_packed.parent, read_images(own_packed.parent)
    shutil.rmtree(own_packed)
    paths = [folder / file for file in table["file"][:3]]
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()  # a link to the published folder, which stays as it is
    paths[0].write_bytes(whole[0][: len(whole[0]) // 2])
    paths[1].write_bytes(b"")
    Image.fromarray(np.arange(2000, dtype=np.uint8).reshape(40, 50)).save(paths[2])
    with pytest.raises(ValueError, match="3 of 24 images cannot be packed: ") as error:
        pack_images(folder, SMALL)
    assert all(f"{image} (" in str(error.value) for image in table["image"][:3])
    assert "it has 40 × 50 pixels, images.csv says 160 × 128" in str(error.value)
    assert len(list((own_packed / "images").iterdir())) == 21
    with pytest.raises(ValueError, match=r"3 of 24 packed images in .* cannot be used: \w+ \(missing\), "):
        RadiographDataset(table, own_packed)


def test_outlines_beside_their_image_are_refused(own_packed, monkeypatch):
    regions = read_regions(own_packed.parent)
    name = next(image for image, outlines in regions.items() if outlines)
    regions[name] = [points + 1000 for points in regions[name]]
    monkeypatch.setattr(room, "read_regions", lambda folder: regions)
    (own_packed / "masks" / f"{name}.npy").unlink()
    with pytest.raises(
        ValueError, match=rf"1 of 24 images cannot be packed: {name} \(its outlines lie beside"
    ):
        pack_images(own_packed.parent, SMALL)


def test_a_folder_of_other_sequences_is_left_alone(own_packed):
    (own_packed / "packing.json").unlink()
    with pytest.raises(FileExistsError, match=r"holds what was not packed here. Move it aside"):
        pack_images(own_packed.parent, SMALL)
    with pytest.raises(FileNotFoundError, match=r"No packed radiographs at .* First pack the cohort again"):
        read_packing(own_packed)
    assert len(list((own_packed / "images").iterdir())) == 24


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ({"long": 320, "short": 384}, "long not below short; found long 320, short 384"),
        ({"long": 330}, "multiples of 32"),
        ({"short": 0}, "short"),
    ],
)
def test_a_frame_that_no_network_takes_is_refused(frame, said):
    with pytest.raises(ValueError, match=said):
        ImagePackConfig(**frame)


def test_fewer_workers_than_none_are_refused(packed):
    with pytest.raises(ValueError, match="workers is a number of threads, 0 for one a core; found -1"):
        pack_images(packed.parent, SMALL, workers=-1)
