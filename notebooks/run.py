"""Run the numbered notebooks in order, each in a fresh kernel, and keep what a reader needs of their outputs.

For the built-in cohort (11: the sample of FracAtlas) the committed notebooks are rendered in place, so that
running twice on one machine changes nothing. With any other parameter they stay as they are, and executed
copies go to `notebooks/rendered/<cohort>/`, those of a run with another name to a folder of that name in it.

    python notebooks/run.py [--cohort NAME] [--run NAME] [--retrain] [--settings FILE] [NN ...]
"""

import argparse
import ast
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from tqdm import tqdm
from traitlets.config import Config

from cspine_helpers.files import paths

FOLDER = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SAID = re.compile(r"\*Time\* about (\d+) seconds on")
COST = """
import resource, sys
from pathlib import Path
used = resource.getrusage(resource.RUSAGE_SELF)
status = Path("/proc/self/status")
if status.exists():  # Linux: ru_maxrss may be that of the process that forked the kernel
    peak = int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
else:
    peak = used.ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)  # bytes, else kilobytes
print(used.ru_utime + used.ru_stime, peak)
"""


class Run(NamedTuple):
    """What one notebook took: wall-clock time, CPU time and largest resident memory of its kernel."""

    name: str
    seconds: float
    cpu_seconds: float
    peak_mib: float


def series(folder: Path = FOLDER, numbers: Iterable[str] = ()) -> list[Path]:
    """The numbered notebooks of a folder in order; with `numbers` ("01", "03", …) only those.

    Raises:
        FileNotFoundError: a number has no notebook; names each.
    """
    notebooks = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    wanted = [number[:2] for number in numbers]
    unknown = sorted(set(wanted) - {path.name[:2] for path in notebooks})
    if unknown or not notebooks:
        known = ", ".join(path.stem for path in notebooks) or "none"
        raise FileNotFoundError(
            f"No notebook numbered {', '.join(unknown) or 'NN'} in {folder}; found {known}."
        )
    return [path for path in notebooks if not wanted or path.name[:2] in wanted]


def parameters_cell(notebook: NotebookNode) -> int:
    """Position of the one cell tagged `parameters`."""
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(
            f"{len(tagged)} cells are tagged 'parameters'; exactly one holds a notebook's parameters."
        )
    return tagged[0]


def inject(notebook: NotebookNode, parameters: dict[str, object]) -> None:
    """Put a cell after the `parameters` cell that sets those of `parameters` that the notebook has."""
    position = parameters_cell(notebook)
    body = ast.parse(notebook.cells[position].source).body
    names = {
        target.id
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    lines = [f"{name} = {value!r}" for name, value in parameters.items() if name in names]
    if lines:
        cell = nbformat.v4.new_code_cell(
            "\n".join(lines), id="injected", metadata={"tags": ["injected-parameters"]}
        )
        notebook.cells.insert(position + 1, cell)


def clean(notebook: NotebookNode) -> None:
    """Keep what can be read without running the notebook, and nothing that differs from run to run.

    A live widget cannot be shown without its kernel: its view goes, a picture beside it stays, and an output
    with nothing else than its text form (a progress bar) goes as a whole.
    """
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        kept: list[NotebookNode] = []
        for output in cell.outputs:
            widget = output.get("data", {}).pop(WIDGET, None)
            output.get("metadata", {}).clear()
            if widget is not None and not set(output.data) - {"text/plain"}:
                continue
            if kept and output.output_type == "stream" and output.name == kept[-1].get("name"):
                kept[-1].text += output.text  # one print may arrive in one or in several messages
            else:
                kept.append(output)
        cell.outputs = kept


def say_time(notebook: NotebookNode, seconds: float) -> None:
    """Correct what the opening cell says of *Time* where it is off by a factor of 3, to the next 5 seconds.

    What is nearly right stays, so that a notebook that runs again stays as it is. Seconds are those of the
    CPU, which other programs disturb least.
    """
    opening = notebook.cells[0]
    if (said := SAID.search(opening.source)) and not 1 / 3 <= seconds / int(said[1]) <= 3:
        found = max(5, 5 * math.ceil(seconds / 5))
        opening.source = opening.source[: said.start(1)] + str(found) + opening.source[said.end(1) :]


def relink(notebook: NotebookNode, folder: Path, copies: Path) -> None:
    """Let links of a notebook in `folder` that begin with `../` lead to the same files from `copies`."""
    up = Path(os.path.relpath(folder.parent, copies)).as_posix()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\(\.\./", f"]({up}/", cell.source)


def complaints(notebook: NotebookNode) -> list[str]:
    """Everything the cells wrote on stderr (warnings, as a rule), a line each with the cell's number.

    Progress bars are widgets in a kernel, so whatever is on stderr needs fixing.
    """
    return [
        f"cell {cell.execution_count}: {output.text.strip()}"
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr"
    ]


def execute(path: Path, parameters: dict[str, object] | None = None, *, out: Path | None = None) -> Run:
    """Run one notebook in a fresh kernel whose working directory is the notebook's folder; write the result.

    Args:
        path: the notebook.
        parameters: values that replace those of its `parameters` cell, where it has them.
        out: where the executed notebook goes; over `path` where not given.

    Raises:
        RuntimeError: a cell fails or writes on stderr; says which notebook and cell, and nothing is written.
    """
    notebook = nbformat.read(path, as_version=4)
    inject(notebook, parameters or {})
    client = NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        resources={"metadata": {"path": path.parent}},
        config=Config(KernelManager={"transport_encryption": "auto"}),  # others share the machine
    )
    start = time.perf_counter()
    bar = tqdm(notebook.cells, desc=path.stem, unit="cell", leave=False, disable=None)
    with client.setup_kernel():
        for index, cell in enumerate(bar):
            try:
                client.execute_cell(cell, index, execution_count=client.code_cells_executed + 1)
            except CellExecutionError as error:
                raise RuntimeError(
                    f"{path.stem}, cell {client.code_cells_executed}: {error.ename}: {error.evalue}"
                ) from error
            except DeadKernelError as error:
                raise RuntimeError(f"{path.stem}: the kernel died, often for lack of memory.") from error
        seconds = time.perf_counter() - start
        notebook.cells.append(nbformat.v4.new_code_cell(COST))
        client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1, store_history=False)
        probe = notebook.cells.pop()
    if found := complaints(notebook):
        raise RuntimeError(f"{path.stem} wrote on stderr; fix the cause:\n" + "\n".join(found))
    clean(notebook)
    cost = "".join(output.text for output in probe.outputs)  # one print may arrive in several messages
    cpu_seconds, peak_mib = map(float, cost.split())
    say_time(notebook, cpu_seconds)
    out = out or path
    relink(notebook, path.parent, out.parent)
    with paths.atomic_path(out) as temporary:
        nbformat.write(notebook, temporary)
    return Run(path.stem, seconds, cpu_seconds, peak_mib)


def table(runs: Sequence[Run]) -> str:
    """Seconds, CPU seconds and memory of each notebook, and of all."""
    _, seconds, cpu_seconds, peaks = zip(*runs, strict=True)
    rows = [*runs, Run("all", sum(seconds), sum(cpu_seconds), max(peaks))]
    width = max(len(run.name) for run in rows)
    return "\n".join(
        [f"{'notebook':{width}}  {'seconds':>8}  {'CPU s':>8}  {'peak MiB':>8}"]
        + [
            f"{run.name:{width}}  {run.seconds:8.1f}  {run.cpu_seconds:8.1f}  {run.peak_mib:8.0f}"
            for run in rows
        ]
    )


def of_radiographs(path: Path) -> bool:
    """Whether a notebook is about radiographs, whose cohort and run are its own."""
    return path.stem.startswith("11_")


def has_ct(folder: Path) -> bool:
    """Whether notebook 00 has CT to pack: that of the cohort's folder, or phantoms, which it writes as CT."""
    return (folder / "train_images").is_dir() or (folder / "cohort.json").is_file()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cohort", default="builtin", help="folder of data/ to run on (default: builtin)")
    parser.add_argument("--run", help="folder of checkpoints/ to use (default: named like the cohort)")
    parser.add_argument("--retrain", action="store_true", help="set RETRAIN = True where a notebook has it")
    parser.add_argument("--settings", type=Path, help="settings file of a new run (notebooks 02 and 03)")
    parser.add_argument("numbers", nargs="*", metavar="NN", help="only these notebooks (default: all)")
    options = parser.parse_args(arguments)
    parameters: dict[str, object] = {}
    if options.cohort != "builtin":
        parameters["COHORT"] = options.cohort
    if options.run:
        parameters["RUN"] = options.run
    if options.retrain:
        parameters["RETRAIN"] = True
    if options.settings:
        parameters["SETTINGS"] = str(options.settings.resolve())
    runs = []
    try:
        chosen = series(numbers=options.numbers)
        if not options.numbers and not has_ct(paths.cohort_dir(options.cohort)):
            print(f"{chosen[0].stem} is skipped: the cohort {options.cohort!r} has no CT in train_images/.")
            chosen = chosen[1:]
        if parameters and not options.numbers:  # these are of CT, or it would be asked for by number
            chosen = [path for path in chosen if not of_radiographs(path)]
        copies = FOLDER / "rendered" / paths.checked_name(options.cohort, "cohort")
        if options.run:
            copies /= paths.checked_name(options.run, "run")
        for path in chosen:
            out = copies / path.name if parameters else path
            run = execute(path, parameters, out=out)
            runs.append(run)
            where = out.relative_to(FOLDER.parent)
            print(f"{run.name}: {run.seconds:.1f} s, {run.peak_mib:.0f} MiB -> {where}", flush=True)
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{table(runs)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
