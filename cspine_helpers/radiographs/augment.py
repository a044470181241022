"""Variation of radiographs in training, in uint8, the mask moved along; and patches cut out of them."""

import math
import os
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from cspine_helpers.dataset.augment import draw
from cspine_helpers.files.records import check_settings, setting, within

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network for a newer version
import albumentations as A

_SHARE = within("[0, 1]")


@dataclass(frozen=True)
class ImageAugment:
    """How radiographs are varied in training; probabilities are per image, 0 turns a step off.

    Attributes:
        flip: probability of exchanging left and right.
        vertical_flip: probability of exchanging top and bottom.
        affine: probability of rotating, scaling and shifting.
        rotate_degrees: largest rotation to either side.
        shrink: most that the size is reduced: to e^−shrink.
        enlarge: most that the size grows: to e^enlarge.
        shift: largest shift, share of the image's side.
        gamma: probability of a gamma curve.
        gamma_limit: its exponent is at most e^gamma_limit, at least e^−gamma_limit.
        contrast: probability of changing brightness and contrast.
        contrast_limit: largest relative change of either.
        noise: probability of Gaussian noise.
        noise_std: largest standard deviation of the noise, share of the intensity range.
        blur: probability of Gaussian blur.
        blur_std: largest standard deviation of the blur, pixels.
    """

    flip: float = setting(0.5, _SHARE)
    vertical_flip: float = setting(0.5, _SHARE)
    affine: float = setting(0.9, _SHARE)
    rotate_degrees: float = setting(25.0, within("[0, 180]"))
    shrink: float = setting(0.2, within("[0, 2]"))
    enlarge: float = setting(0.25, within("[0, 2]"))
    shift: float = setting(0.06, _SHARE)
    gamma: float = setting(0.5, _SHARE)
    gamma_limit: float = setting(0.3, within("[0, 2]"))
    contrast: float = setting(0.5, _SHARE)
    contrast_limit: float = setting(0.2, _SHARE)
    noise: float = setting(0.2, _SHARE)
    noise_std: float = setting(0.03, _SHARE)
    blur: float = setting(0.15, _SHARE)
    blur_std: float = setting(1.2, within("[0.1, 10]"))

    def __post_init__(self) -> None:
        check_settings(self)


AS_THEY_ARE = ImageAugment(flip=0, vertical_flip=0, affine=0, gamma=0, contrast=0, noise=0, blur=0)


class Variation:
    """One random variation of an image, its mask moved along.

    albumentations draws; what it drew is applied to uint8 by OpenCV: flips, affine and the cut-out of a patch
    in one interpolation, gamma, brightness and contrast in one table.
    """

    def __init__(self, config: ImageAugment) -> None:
        c = config
        limits = (-c.contrast_limit, c.contrast_limit)
        self._compose = A.Compose(
            [
                _Flip(p=c.flip),
                _VerticalFlip(p=c.vertical_flip),
                _Affine(
                    rotate=(-c.rotate_degrees, c.rotate_degrees),
                    scale=(math.exp(-c.shrink), math.exp(c.enlarge)),
                    translate_percent=(-c.shift, c.shift),
                    keep_ratio=True,
                    p=c.affine,
                ),
                _Gamma((100 * math.exp(-c.gamma_limit), 100 * math.exp(c.gamma_limit)), p=c.gamma),
                _Contrast(limits, limits, p=c.contrast),
                _Blur(0, (0.1, c.blur_std), p=c.blur),
                _Noise(std_range=(0, c.noise_std), p=c.noise),
            ]
        )

    def __call__(
        self,
        image: np.ndarray,
        mask: np.ndarray | None,
        *,
        seed: tuple[int, ...],
        patch: int | None = None,
        about: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The image, uint8 (H, W), and its mask, varied; with `patch`, a square of that side cut out of them.

        The same seed gives the same variation. Whatever is drawn, a part of the mask stays inside. A patch
        keeps the image's scale and holds a pixel of the mask; where there is none, the one at x, y `about`,
        or one of the body.
        """
        # 1. Draw.
        shape = image.shape if patch is None else (patch, patch)
        drawn = draw(self._compose, seed, image=image if patch is None else np.zeros(shape, np.uint8))
        rng = np.random.default_rng((*seed, 1))

        # 2. Move.
        begin, move = np.eye(3), np.eye(3)
        if patch is not None:
            pixel = _pixel(image, rng, about) if mask is None else _inside(mask, rng)
            begin[:2, 2] = -_corner(pixel, image.shape, rng, patch)
            move = begin
        for step in drawn:
            move = step.matrix(shape) @ move
        if patch is not None:
            move = _keeping(pixel, begin, move, shape)
        if patch is not None or not np.array_equal(move, np.eye(3)):
            size = (shape[1], shape[0])
            if mask is not None:
                moved = cv2.warpAffine(mask, move[:2], size)
                if not cv2.countNonZero(moved):  # moved out of a whole image
                    move = _keeping(_inside(mask, rng), begin, move, shape)
                    moved = cv2.warpAffine(mask, move[:2], size)
                mask = moved
            image = cv2.warpAffine(image, move[:2], size)

        # 3. Change the grey levels.
        levels = np.arange(256, dtype=np.float32)
        for step in drawn:
            levels = step.levels(levels)
        table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
        if table[0] or (np.diff(table.astype(int)) != 1).any():
            image = cv2.LUT(image, table)
        for step in drawn:
            image = step.filter(image)
        return image, mask


class _Drawn:
    """A step that only draws when `Compose` calls it, and says what it drew."""

    params: dict[str, Any]

    def apply(self, img: np.ndarray, **_: Any) -> np.ndarray:
        return img

    def matrix(self, shape: tuple[int, int]) -> np.ndarray:
        """Where pixels go, (3, 3)."""
        return np.eye(3)

    def levels(self, levels: np.ndarray) -> np.ndarray:
        """What becomes of grey levels, 0 to 255."""
        return levels

    def filter(self, image: np.ndarray) -> np.ndarray:
        """What becomes of pixels and their neighbours."""
        return image


class _Flip(_Drawn, A.HorizontalFlip):
    def matrix(self, shape: tuple[int, int]) -> np.ndarray:
        return np.array([[-1, 0, shape[1] - 1], [0, 1, 0], [0, 0, 1.0]])


class _VerticalFlip(_Drawn, A.VerticalFlip):
    def matrix(self, shape: tuple[int, int]) -> np.ndarray:
        return np.array([[1, 0, 0], [0, -1, shape[0] - 1], [0, 0, 1.0]])


class _Affine(_Drawn, A.Affine):
    def matrix(self, shape: tuple[int, int]) -> np.ndarray:
        return self.params["matrix"]


class _Gamma(_Drawn, A.RandomGamma):
    def levels(self, levels: np.ndarray) -> np.ndarray:
        return 255 * (levels / 255) ** self.params["gamma"]


class _Contrast(_Drawn, A.RandomBrightnessContrast):
    def levels(self, levels: np.ndarray) -> np.ndarray:
        return np.clip(self.params["alpha"] * levels + self.params["beta"], 0, 255)


class _Blur(_Drawn, A.GaussianBlur):
    def filter(self, image: np.ndarray) -> np.ndarray:
        kernel = self.params["kernel"]
        return cv2.sepFilter2D(image, -1, kernel, kernel)


class _Noise(_Drawn, A.GaussNoise):
    def filter(self, image: np.ndarray) -> np.ndarray:
        return cv2.add(image, self.params["noise_map"], dtype=cv2.CV_8U)


def _inside(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """x, y of any pixel of the mask."""
    pixels = np.flatnonzero(mask)
    row, column = divmod(int(pixels[rng.integers(len(pixels))]), mask.shape[1])
    return np.array([column, row])


def _pixel(image: np.ndarray, rng: np.random.Generator, about: np.ndarray | None) -> np.ndarray:
    """x, y about which to cut out; where it is not given, any of the body: what Otsu's threshold is below."""
    if about is not None:
        return np.clip(np.rint(about).astype(int), 0, np.array(image.shape[::-1]) - 1)
    small = cv2.resize(image, None, fx=1 / 8, fy=1 / 8, interpolation=cv2.INTER_AREA)
    _, body = cv2.threshold(small, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return 8 * _inside(body if body.any() else np.ones_like(body), rng) + 4


def _corner(pixel: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator, side: int) -> np.ndarray:
    """x, y of the upper left corner of a square in the image that holds this pixel, not at its very edge."""
    edge = side // 8
    return np.clip(pixel - rng.integers(edge, side - edge, size=2), 0, np.array(shape[::-1]) - side)


def _keeping(pixel: np.ndarray, begin: np.ndarray, move: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The movement, with a further shift where the pixel would come to lie at an edge, or beyond it.

    An edge is an eighth of the side, or as narrow as the pixel's distance was to `begin` with.
    """
    last = np.array(shape[::-1]) - 1
    was, place = (matrix @ [*pixel, 1] for matrix in (begin, move))
    edge = np.minimum(np.minimum(was[:2], last - was[:2]), min(shape) // 8)
    kept = move.copy()
    kept[:2, 2] += np.clip(place[:2], edge, last - edge) - place[:2]
    return kept
