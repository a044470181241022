"""Run the benchmarks, each in a fresh process, and write `benchmarks/RESULTS.md`.

python -m benchmarks [NAME ...]     default: all; a part that is not run keeps its earlier rows
"""

import argparse
import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.measure import Row, machine

HERE = Path(__file__).parent
PARTS = (
    "model",
    "memory",
    "loop",
    "loader",
    "ensemble",
    "maps",
    "radiographs",
    "tables",
    "intervals",
    "scale",
    "phantom",
    "packing",
    "slider",
    "start",
    "guarantees",
    "browser",
)
VERSIONS = ("torch", "timm", "albumentations", "numpy", "pandas", "scikit-learn", "matplotlib")
STORE, TABLE = HERE / "results.json", HERE / "RESULTS.md"
ANSWER = {True: "yes", False: "**no**", None: ""}


def measure(name: str) -> dict:
    """One part's rows with when and where they were measured."""
    module = importlib.import_module(f"benchmarks.{name}")
    rows = []
    for row in module.rows():
        rows.append(asdict(row))
        print(f"{row.what} | {row.against} | {row.found} | {row.target} | {ANSWER[row.met]}", flush=True)
    return {
        "title": (module.__doc__ or name).strip().splitlines()[0].rstrip("."),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": dict(machine()),
        "versions": {package: version(package) for package in VERSIONS},
        "rows": rows,
    }


def render(results: dict[str, dict]) -> str:
    """The results as Markdown."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`. A ratio compares two things in one run, called in turn: the ratio of the "
        "medians, in parentheses the quartiles of the single ratios. Absolute times hold for the machine "
        "named above each table.",
    ]
    for name in (part for part in PARTS if part in results):
        part = results[name]
        where = "; ".join(f"{key} {value}" for key, value in {**part["machine"], **part["versions"]}.items())
        lines += ["", f"## {part['title']}", "", f"{part['date']}. {where}.", ""]
        lines += ["| what | against | measured | target | met |", "|---|---|---|---|---|"]
        rows = [Row(**row) for row in part["rows"]]
        lines += [
            f"| {row.what} | {row.against} | {row.found} | {row.target} | {ANSWER[row.met]} |" for row in rows
        ]
        notes = [f"- {row.what}: {row.note}" for row in rows if row.note]
        lines += ["", *notes] if notes else []
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        options.into.write_text(json.dumps(measure(options.one)))
        return
    results = json.loads(STORE.read_text()) if STORE.is_file() else {}
    for name in options.parts or PARTS:
        print(f"\n== {name}", flush=True)
        part = HERE / f".{name}.json"
        try:
            command = [sys.executable, "-m", "benchmarks", "--one", name, "--into", str(part)]
            subprocess.run(command, check=True, cwd=HERE.parent)
            results[name] = json.loads(part.read_text())
        finally:
            part.unlink(missing_ok=True)
        STORE.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        TABLE.write_text(render(results))


if __name__ == "__main__":
    main()
