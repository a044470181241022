"""A radiograph's file to the pixels that a viewer shows, and from there into the network's frame and back."""

import numpy as np
import pytest
from conftest import REAL_DATA
from PIL import Image, ImageOps

from cspine_helpers.radiographs.images import read_radiograph

FRACATLAS = REAL_DATA / "fracatlas"
needs_fracatlas = pytest.mark.skipif(not FRACATLAS.is_dir(), reason=f"FracAtlas is not at {FRACATLAS}")
# What the eye sees of an image with this EXIF orientation, by EXIF 2.3's own words on row 0 and column 0.
SEEN = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.T,
    6: lambda stored: stored.T[:, ::-1],
    7: lambda stored: stored.T[::-1, ::-1],
    8: lambda stored: stored.T[::-1],
}


def limb(height: int = 40, width: int = 30) -> np.ndarray:
    """Grey with no symmetry: 8 bits, nothing at the ends of the scale."""
    rows, columns = np.mgrid[:height, :width]
    return (20 + 3 * rows + 2 * columns).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_exif_orientation_comes_first(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(limb()).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_radiograph(path), SEEN[orientation](limb()))


@needs_fracatlas
def test_real_rotated_images_are_seen_as_pil_shows_them():
    rotated = 0
    for name in ("IMG0002588.jpg", "IMG0002628.jpg"):
        path = FRACATLAS / "images" / "Fractured" / name
        with Image.open(path) as image:
            rotated += image.getexif().get(0x0112) in (3, 6, 8)
            shown = np.asarray(ImageOps.exif_transpose(image).convert("L"))
        np.testing.assert_array_equal(read_radiograph(path), shown)
    assert rotated == 2
