"""The threshold slider in a real JupyterLab: from the key to the changed picture.

Chromium without a window, on the machine that also runs the server and the kernel. The clock starts when the
browser has the key and stops two frames after the new picture is decoded, so that it is surely shown.
"""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import lab
from benchmarks.measure import Row, milliseconds

KEYS = 100
CLOCK = """() => {
    const picture = [...document.querySelectorAll(".cspine-picture img")].at(-1);  // the last one to change
    window.times = [];
    let begun = 0;
    document.addEventListener("keydown", event => { begun = event.timeStamp; }, true);
    picture.addEventListener("load", async () => {
        await picture.decode();
        requestAnimationFrame(() => requestAnimationFrame(() => times.push(performance.now() - begun)));
    });
}"""
LARGE = f"""
import sys
sys.path.insert(0, {str(lab.ROOT)!r})
from benchmarks.slider import predictions as as_many_as_rsna
explorer = ThresholdExplorer(as_many_as_rsna(), threshold=0.5)
explorer"""


def times(explorer: lab.Explorer) -> list[float]:
    """Seconds from each key to its picture."""
    page = explorer.page
    page.evaluate(CLOCK)
    for place in range(KEYS + 5):  # the first five warm up
        page.keyboard.press("ArrowRight" if place % 2 else "ArrowLeft")
        page.wait_for_function("count => window.times.length > count", arg=place)
    return [found / 1000 for found in page.evaluate("window.times")[5:]]


def row(what: str, found: list[float]) -> Row:
    middle, slow = statistics.median(found), statistics.quantiles(found, n=20)[-1]
    return Row(
        what,
        "200 ms",
        milliseconds(found),
        "≤ 200 ms",
        middle <= 0.2,
        f"one key in twenty takes {1000 * slow:.3g} ms or more.",
    )


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder, lab.browser() as running:
        lab.copy_project(Path(folder))
        with lab.jupyterlab(Path(folder)) as address:
            explorer = lab.open_explorer(running, address)
            yield row("key to changed picture, notebook 04 on the cached run", times(explorer))
            explorer.replace(LARGE)
            yield row("key to changed picture, 14,133 predictions", times(explorer))
