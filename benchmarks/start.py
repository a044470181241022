"""What one waits for before the first number: imports, and the cached run read from its folder."""

import statistics
from collections.abc import Iterator
from pathlib import Path

import nbformat

from benchmarks.measure import Row, in_fresh_process

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
RELOAD = f"from cspine_helpers import checkpoints\nrun = {str(ROOT / 'checkpoints' / 'builtin')!r}"


def cpu_seconds(code: str, before: str = "") -> float:
    """Processor seconds of a piece of Python in a fresh process, median of three, after one to warm up."""
    timed = f"from time import process_time\nstart = process_time()\n{code}\nprint(process_time() - start)"
    probe = f"{before}\n{timed}"
    return statistics.median([float(in_fresh_process(probe)) for _ in range(4)][1:])


def limited(what: str, found: float, limit: float) -> Row:
    """A row of processor seconds under a limit."""
    return Row(what, f"{limit:g} s", f"{found:.2g} s of processor time", f"≤ {limit:g} s", found <= limit)


def rows() -> Iterator[Row]:
    """Imports of the package and of the notebooks without a model, and the cached run's reload."""
    yield limited("`import cspine_helpers`", cpu_seconds("import cspine_helpers"), 0.1)
    for name in (
        "01_label_prevalence",
        "02_split_and_expand",
        "04_thresholds",
        "06_calibration",
        "07_guarantees",
    ):
        cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
        source = next(cell.source for cell in cells if cell.cell_type == "code")
        yield limited(f"the imports of {name}", cpu_seconds(source), 3)
    yield limited("the cached run, loaded", cpu_seconds("checkpoints.load_run(run)", RELOAD), 1)
