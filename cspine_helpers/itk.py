"""Optional libraries that read images, SimpleITK and nibabel; imported when they are needed."""

import re
from importlib import import_module
from typing import Any

LIBRARIES = {"SimpleITK": "2.4", "nibabel": "5.3"}  # and the versions that do


def optional(name: str) -> Any:
    """The module `SimpleITK` or `nibabel`.

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
