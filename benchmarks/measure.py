"""How the benchmarks measure: interleaved repeats, medians, and a ratio against a peer in the same run."""

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the results.

    Attributes:
        what: was measured.
        against: which peer or limit.
        found: the figure, with its spread.
        target: what it should be; "" where there is none.
        met: whether it is; None where there is no target.
        note: why it is as it is, where that needs saying.
    """

    what: str
    against: str
    found: str
    target: str = ""
    met: bool | None = None
    note: str = ""


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(
    functions: dict[str, Callable[[], object]], *, repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each function, called in turn, so that what disturbs one disturbs all."""
    for _ in range(warm_up):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times


def ratio(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Ratio of the medians, and the lower and upper quartile of the ratios of each repeat."""
    pairs = sorted(a / b for a, b in zip(above, below, strict=True))
    low, _, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
    return statistics.median(above) / statistics.median(below), low, high


def spread(values: tuple[float, float, float], digits: int = 2) -> str:
    """A ratio and its quartiles as they stand in the results."""
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low}–{high})"


def milliseconds(times: list[float]) -> str:
    """The median in milliseconds."""
    return f"{1000 * statistics.median(times):.3g} ms"


def peak_mib() -> float:
    """Peak resident memory of this process so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def in_fresh_process(code: str, *arguments: str) -> str:
    """What a piece of Python prints in a process of its own, so that its peak memory is its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()


def machine() -> Iterator[tuple[str, str]]:
    """What a reader must know to compare: processor, cores, memory, system."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    yield "processor", names[0] if names else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield "cores", str(cores)
    total = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    if total:
        yield "memory", f"{total[0] / 2**20:.0f} GiB"
    import torch  # here, so that no peak of memory measured with this module holds it

    if torch.cuda.is_available():
        yield "GPU", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    yield "system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readlines()
    except FileNotFoundError:  # another system than Linux
        return []
