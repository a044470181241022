"""`masks.csv`: the predicted masks of a run folder, a row an image, as run lengths; read without torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cspine_helpers.files.tables import Column, checked, read_columns, write_table
from cspine_helpers.radiographs.annotations import decode_rle

MASKS = "masks.csv"
_COLUMNS = (
    Column("image", "id"),
    Column("height", "whole", low=1),
    Column("width", "whole", low=1),
    Column("mask", pattern=r"\d+( \d+)*"),
)


def write_masks(sizes: pd.DataFrame, lengths: Sequence[str], path: Path) -> None:
    """Write masks in one step, with their SHA-256 beside them.

    Args:
        sizes: `image`, `height`, `width`, of the displayed image.
        lengths: of `annotations.encode_rle`, in the same order.
        path: of the file.
    """
    write_table(sizes.assign(mask=list(lengths))[[column.name for column in _COLUMNS]], path, sealed=True)


def read_masks(run_folder: str | Path) -> dict[str, NDArray[np.uint8]]:
    """Image → its predicted mask (H, W) 0/1, at the size of the displayed image.

    Raises:
        FileNotFoundError: there are none, as of networks without a mask.
        ValueError: the file is not as it was written.

    Example:
        >>> masks = read_masks("nobody")
        Traceback (most recent call last):
        ...
        FileNotFoundError: No table of masks at nobody/masks.csv. Predict them: python -m cspine_helpers ...
    """
    path = Path(run_folder) / MASKS
    source = "Predict them: python -m cspine_helpers predict --run NAME, of a run that has a mask."
    table = read_columns(path, what="table of masks", source=source, text=("image", "mask"))
    table = checked(table, _COLUMNS, what=str(path), key=("image",))
    columns = (table[column.name].tolist() for column in _COLUMNS)
    return {image: decode_rle(text, *size) for image, *size, text in zip(*columns, strict=True)}
