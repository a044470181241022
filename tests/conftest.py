"""Shared by the tests: real inputs where they are present, and small helpers."""

from pathlib import Path

import pytest

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"
RSNA = REAL_DATA / "rsna2022"
needs_rsna = pytest.mark.skipif(
    not RSNA.is_dir(), reason=f"the real RSNA 2022 label tables are not at {RSNA}"
)
