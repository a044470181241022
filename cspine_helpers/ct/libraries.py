"""Optional libraries that read images, SimpleITK, nibabel and pydicom; imported when they are needed."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Lock
from typing import Any

LIBRARIES = {"SimpleITK": "2.4", "nibabel": "5.3", "pydicom": "3.0"}  # and the versions that do
_HARMLESS = re.compile(  # what decoders write of files that they read right
    rb"Corrupt JPEG data: [12] extraneous bytes before marker 0xd9"  # the end; they make its length even
    rb"|Unsupported JPEG data precision \d+|Invalid SOS parameters for sequential JPEG|\s*$"
)
_STANDARD_ERROR, _ONE_AT_A_TIME = 2, Lock()


def optional(name: str) -> Any:
    """The module `SimpleITK`, `nibabel` or `pydicom`.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Reading and writing CT needs {name}, which is not installed. Install this package with its "
            f"group ct (pip install -e '.[ct]'), or {name} alone (pip install '{name}>={LIBRARIES[name]}')."
        ) from error


def simpleitk() -> Any:
    """The module `SimpleITK`.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    return optional("SimpleITK")


def reason(error: BaseException) -> str:
    """The last line of an error of SimpleITK, without addresses in memory and places in its source."""
    line = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return re.sub(r"ITK ERROR: \w+\(0x[0-9a-f]+\): |^.*/\S+:\d+:\s*", "", line).strip()


@contextmanager
def complaints() -> Iterator[list[str]]:
    """What decoders find wrong with data in the block; they make pixels up, and only write that they did.

    The list is filled when the block ends. Lines known to be harmless get to standard error.
    """
    said: list[str] = []
    with _ONE_AT_A_TIME, tempfile.TemporaryFile() as file:
        outside = os.dup(_STANDARD_ERROR)
        os.dup2(file.fileno(), _STANDARD_ERROR)
        try:
            yield said
        finally:
            os.dup2(outside, _STANDARD_ERROR)
            os.close(outside)
            file.seek(0)
            for line in file:
                if _HARMLESS.match(line):
                    os.write(_STANDARD_ERROR, line)
                else:
                    said.append("its decoder finds its pixels corrupt")
