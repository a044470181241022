"""SimpleITK, which reads every image here; imported when it is needed, as it is an optional dependency."""

import re
from typing import Any


def simpleitk() -> Any:
    """The module `SimpleITK`.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    try:
        import SimpleITK
    except ImportError as error:
        raise ImportError(
            "Reading and writing CT needs SimpleITK, which is not installed. Install this package with its "
            "group ct (pip install -e '.[ct]'), or SimpleITK alone (pip install 'SimpleITK>=2.4')."
        ) from error
    return SimpleITK


def reason(error: BaseException) -> str:
    """The last line of an error of SimpleITK, without addresses in memory and places in its source."""
    line = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return re.sub(r"ITK ERROR: \w+\(0x[0-9a-f]+\): |^.*/\S+:\d+:\s*", "", line).strip()
