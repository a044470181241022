"""Augmentation of packed sequences: one draw for all slices and channels, in uint8, the mask moved along."""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import cv2
import numpy as np

from cspine_helpers.files.records import check_settings, setting, whole, within
from cspine_helpers.packed import MASK

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network for a newer version
import albumentations as A

_SHARE = within("[0, 1]")


@dataclass(frozen=True)
class AugmentConfig:
    """How sequences are varied in training; probabilities are per sequence, 0 turns a step off.

    Attributes:
        flip: probability of exchanging left and right.
        affine: probability of rotating, scaling and shifting.
        rotate_degrees: largest rotation to either side.
        scale: largest relative change of size.
        shift: largest shift, share of the image's side.
        contrast: probability of changing brightness and contrast.
        contrast_limit: largest relative change of either.
        noise: probability of Gaussian noise.
        noise_std: largest standard deviation of the noise, share of the intensity range.
        dropout: probability of blackening holes in the intensities (the mask stays).
        holes: most holes.
        hole_size: largest side of a hole, share of the image's side.
    """

    flip: float = setting(0.5, _SHARE)
    affine: float = setting(0.7, _SHARE)
    rotate_degrees: float = setting(10.0, within("[0, 180]"))
    scale: float = setting(0.1, _SHARE)
    shift: float = setting(0.05, _SHARE)
    contrast: float = setting(0.5, _SHARE)
    contrast_limit: float = setting(0.15, _SHARE)
    noise: float = setting(0.2, _SHARE)
    noise_std: float = setting(0.04, _SHARE)
    dropout: float = setting(0.1, _SHARE)
    holes: int = setting(3, whole(1))
    hole_size: float = setting(0.12, _SHARE)

    def __post_init__(self) -> None:
        check_settings(self)


class Augment:
    """One random variation of a sequence: the same draw for all slices and channels, the mask moved along.

    albumentations draws for the whole sequence. What it drew is then applied slice by slice (or two by two),
    every step in turn while the slice lies in the processor's cache.
    """

    def __init__(self, config: AugmentConfig) -> None:
        c = config
        size = (c.hole_size / 2, c.hole_size)
        self._compose = A.Compose(
            [
                _Flip(p=c.flip),
                _Affine(
                    rotate=(-c.rotate_degrees, c.rotate_degrees),
                    scale=(1 - c.scale, 1 + c.scale),
                    translate_percent=(-c.shift, c.shift),
                    keep_ratio=True,
                    p=c.affine,
                ),
                _Contrast(
                    (-c.contrast_limit, c.contrast_limit), (-c.contrast_limit, c.contrast_limit), p=c.contrast
                ),
                _Noise(std_range=(0, c.noise_std), p=c.noise),
                _Dropout((1, c.holes), size, size, p=c.dropout),
            ]
        )

    def __call__(
        self, sequence: np.ndarray, *, seed: tuple[int, ...], out: np.ndarray | None = None
    ) -> np.ndarray:
        """Vary a uint8 `(T, H, W, 6)` sequence into `out`, or a new array; same seed, same variation."""
        drawn = draw(self._compose, seed, images=sequence)
        out = np.empty(sequence.shape, np.uint8) if out is None else out
        slices: Iterator[np.ndarray] = iter(np.asarray(sequence))
        for step in drawn:
            slices = step.over(slices)
        for place, image in zip(out, slices, strict=True):
            place[:] = image
        return out


def draw(compose: A.Compose, seed: tuple[int, ...], **data: np.ndarray) -> list[Any]:
    """The steps that this seed draws for the data, each with its `params`.

    All steps draw from one stream: `Compose(seed=...)` would hand the same seed to each of them, and every
    flipped sequence would also be the noisy one.
    """
    words = np.random.SeedSequence(seed).generate_state(2, np.uint64)
    compose.set_random_state(np.random.default_rng(words[0]), random.Random(int(words[1])))
    compose(**data)
    return [step for step in compose.transforms if step.params]


class _Drawn:
    """A step that only draws when `Compose` calls it; `apply` takes and gives a slice of 6 channels."""

    params: dict[str, Any]
    apply: Callable[..., np.ndarray]

    def over(self, slices: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The slices, varied as drawn, one after the other."""
        return (self.apply(image, **self.params) for image in slices)

    def apply_to_images(self, images: np.ndarray, **_: Any) -> np.ndarray:
        return images


class _Flip(_Drawn, A.HorizontalFlip):
    def apply(self, img: np.ndarray, **_: Any) -> np.ndarray:
        return cv2.flip(img.view(np.uint16), 1).view(np.uint8)  # as three words a pixel, which is faster


class _Affine(_Drawn, A.Affine):
    # OpenCV has a fast way for 4 channels and none for 6. Two slices are therefore moved as three images: the
    # first four channels of each, and the last two of both. As whole numbers, which numpy copies fastest.
    _PIXEL = np.dtype([("four", np.uint32), ("two", np.uint16)])
    _LAST = np.dtype([("one", np.uint16), ("other", np.uint16)])

    def over(self, slices: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for one, other in zip_longest(slices, slices):
            yield from self.move([one] if other is None else [one, other], self.params["matrix"])

    def move(self, images: list[np.ndarray], matrix: np.ndarray) -> list[np.ndarray]:
        """One or two slices, moved."""
        height, width, _channels = images[0].shape
        moved = [np.empty_like(image) for image in images]
        last = np.zeros((height, width), self._LAST)
        for image, target, half in zip(images, moved, ("one", "other"), strict=False):
            source = self._pixels(image)
            self._pixels(target)["four"] = self._warp(source["four"], matrix)
            last[half] = source["two"]
        last = self._warp(last, matrix).view(self._LAST)
        for target, half in zip(moved, ("one", "other"), strict=False):
            self._pixels(target)["two"] = last[half]
            mask = cv2.extractChannel(target, MASK)  # interpolated, so its outline is made sharp again
            cv2.insertChannel(cv2.threshold(mask, 127, 255, cv2.THRESH_BINARY)[1], target, MASK)
        return moved

    def _pixels(self, image: np.ndarray) -> np.ndarray:
        return image.reshape(len(image), -1).view(self._PIXEL)  # (H, W)

    @staticmethod
    def _warp(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """Pixels (H, W) of four bytes each, moved."""
        height, width = pixels.shape
        part = np.ascontiguousarray(pixels).view(np.uint8).reshape(height, width, 4)
        return cv2.warpAffine(part, matrix[:2], (width, height)).view(np.uint32)[..., 0]


class _Contrast(_Drawn, A.RandomBrightnessContrast):
    def apply(self, img: np.ndarray, alpha: float, beta: float, **_: Any) -> np.ndarray:
        rows = img.reshape(len(img), -1)
        varied = cv2.addWeighted(rows, alpha, rows, 0, beta).reshape(img.shape)
        varied[..., MASK] = img[..., MASK]
        return varied


class _Noise(_Drawn, A.GaussNoise):
    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        noise = super().get_params_dependent_on_data(params, data)["noise_map"]
        noise[..., MASK] = 0
        brighter, darker = (np.rint(np.maximum(part, 0)).astype(np.uint8) for part in (noise, -noise))
        return {"brighter": brighter, "darker": darker}

    def apply(self, img: np.ndarray, brighter: np.ndarray, darker: np.ndarray, **_: Any) -> np.ndarray:
        return cv2.subtract(cv2.add(img, brighter), darker)


class _Dropout(_Drawn, A.CoarseDropout):
    def apply(self, img: np.ndarray, holes: np.ndarray, **_: Any) -> np.ndarray:
        varied = img.copy()
        for left, top, right, bottom in holes:
            varied[top:bottom, left:right, :MASK] = 0
        return varied
