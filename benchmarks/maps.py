"""Maps of the built-in run: eight sequences by each method."""

from collections.abc import Iterator
from functools import partial

from benchmarks.measure import Row, interleaved, spread
from cspine_helpers.checkpoints import load_run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.explain.maps import METHODS, map_sequences
from cspine_helpers.files import paths
from cspine_helpers.inference.prediction import predict

SEQUENCES, REPEATS = 8, 5
SECONDS = 1.5
A_CHECK = "occlusion"  # runs the network for every patch


def rows() -> Iterator[Row]:
    run, cohort = load_run(paths.run_dir("builtin")), read_cohort(paths.cohort_dir("builtin"))
    samples = cohort.samples["test"].head(SEQUENCES)
    whole = {method: partial(map_sequences, run, samples, cohort.packed, method=method) for method in METHODS}
    times = interleaved(
        {"predict": partial(predict, run, samples, cohort.packed, split="test"), **whole}, repeats=REPEATS
    )
    for method in METHODS:
        took = sorted(times[method])
        quartiles = took[REPEATS // 2], took[REPEATS // 4], took[-1 - REPEATS // 4]
        slower = took[REPEATS // 2] / sorted(times["predict"])[REPEATS // 2]
        is_asked = method != A_CHECK
        yield Row(
            f"{method}, {SEQUENCES} sequences",
            f"predicting them: {slower:.1f} ×",
            f"{spread(quartiles)} s",
            f"≤ {SECONDS} s" if is_asked else "",
            quartiles[0] <= SECONDS if is_asked else None,
        )
