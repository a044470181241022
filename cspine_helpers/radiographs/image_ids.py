"""Names of image files: how they are compared, and ids made of them that are names on every system."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256

from cspine_helpers.files import paths


def composed(name: str) -> str:
    """A name with its accents as most systems write them (NFC); archives of macOS hold them apart (NFD).

    Names are compared in this form, and files opened by the name that they have.

    Example:
        >>> len("Kno\u0308chel"), len(composed("Kno\u0308chel"))
        (8, 7)
    """
    return unicodedata.normalize("NFC", name)


def file_ids(names: Iterable[str], tails: Iterable[str] | None = None) -> list[str]:
    """Ids that can be file names on every system, one for each name, no two alike whatever the capitals.

    A letter with an accent loses it, and what no file name may hold becomes `-`. Names that would be alike,
    too long or empty end with eight digits of a hash.

    Args:
        names: such as "limb 2 größe".
        tails: what is hashed, one a name: something that no two share, as paths; None: the names.

    Example:
        >>> file_ids(["IMG0000019", "Knöchel links"])
        ['IMG0000019', 'Knochel-links']
    """
    names = list(names)
    plain = [_plain(name) for name in names]
    often = Counter(map(str.casefold, plain))
    ids = []
    for name, text, tail in zip(names, plain, names if tails is None else tails, strict=True):
        try:
            paths.check_uids([text])
            good = often[text.casefold()] == 1
        except ValueError:
            good = False
        ids.append(text if good else f"{text[:48].strip('.-_') or 'image'}-{_short_hash(tail or name)}")
    return ids


def _plain(name: str) -> str:
    """ASCII letters, digits, `.`, `_`, `-`; no dot at the ends."""
    ascii_ = unicodedata.normalize("NFKD", name.replace("ß", "ss")).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", ascii_).lstrip("._-").rstrip(".")


def _short_hash(text: str) -> str:
    return sha256(composed(text).encode()).hexdigest()[:8]
