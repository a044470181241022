"""The model card of a run, `MODEL_CARD.md`: its numbers, put into the words of `MODEL_CARD.md.jinja`.

Every number comes from the files of the run folder, and the same files give the same bytes:

    python -m cspine_helpers card --run builtin

Source: Mitchell et al., Model cards for model reporting, FAT* (2019) 220-229, for the sections.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from cspine_helpers import __version__
from cspine_helpers.decisions.test_split import MEMORY
from cspine_helpers.decisions.thresholds import MIN_POSITIVES
from cspine_helpers.evaluation.cases import PLURALS, Cases
from cspine_helpers.evaluation.intervals import MOST_UNDEFINED
from cspine_helpers.files.paths import atomic_path, inside
from cspine_helpers.labels import UID
from cspine_helpers.model_card.results import (
    BINS,
    RESAMPLES,
    UNKNOWN,
    RunFiles,
    cell,
    find,
    markdown,
    number,
    read_run_files,
    share,
)

CARD = "MODEL_CARD.md"
_COHORT, _RUN = ("labels", "split", "manifest"), ("weights", "history", "record")  # that have hashes
_OF_IMAGES = ("labels", "annotations", "split")
_CITATION = "Cervical Spine Fracture Detection Dataset, Copyright RSNA, 2023"
_TEMPLATES = Environment(
    loader=PackageLoader("cspine_helpers", "model_card"),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_TEMPLATES.filters |= {"cell": cell, "number": number}


def write_card(
    run_folder: str | Path, *, more: Callable[[RunFiles], Mapping[str, str]] = lambda run: {}
) -> Path:
    """Write `<run>/MODEL_CARD.md` from the files of the run folder; returns its path.

    It never opens the test split: test results are in the card once the record of openings says that it was
    opened with the decision that is frozen.

    Args:
        run_folder: of a run, an ensemble, or predictions made elsewhere.
        more: what a track knows beside that, place in the card → Markdown: `sources` of its images, `model`,
            `subgroups`, the name of a split that is shown, `limits`.

    Raises:
        FileNotFoundError: there is neither a run nor a predictions table.
        ValueError: a file is damaged, or belongs to another run than those beside it; names it.
        OSError: the card cannot be written.

    Example:
        >>> write_card(run_folder).name  # doctest: +SKIP
        'MODEL_CARD.md'
    """
    run = read_run_files(run_folder)
    text, path = render(run, more(run)), inside(Path(run_folder) / CARD)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path


def render(run: RunFiles, more: Mapping[str, str]) -> str:
    """The card's Markdown; `more` as in `write_card`, of what that gives."""
    many = {name: len(rows[UID].unique()) > 1 for name, rows in run.splits.items()}
    shown = [name for name in many if many[name] and (name != "test" or run.opened)]
    counts = [[name, *_counted(rows)] for name, rows in run.splits.items()]
    if run.record and "train" not in run.splits:
        counts.insert(0, ["train", *_on_record(run)])
    patients = {name: Cases.of(rows).words for name, rows in run.splits.items()}
    text = _TEMPLATES.get_template(f"{CARD}.jinja").render(
        run=run,
        more=more,
        found={name: find(run.splits[name], run.decisions) for name in shown},
        counts=counts,
        several=[f"{cell(name)}, {words}" for name, words in patients.items() if "studies" in words],
        single=[name for name in many if not many[name]],
        openings=_openings(run),
        hashes=_hashes(run),
        table=markdown,
        units=PLURALS,
        unknown=UNKNOWN,
        memory=MEMORY,
        min_positives=MIN_POSITIVES,
        most_undefined=MOST_UNDEFINED,
        resamples=RESAMPLES,
        bins=BINS,
        citation=_CITATION,
        version=__version__,
    )
    return _unwrapped(text)


def _unwrapped(text: str) -> str:
    """Markdown with each paragraph, list item and table row on one line, and blocks one empty line apart."""
    blocks = [block.strip() for block in re.split(r"\n\s*\n", text)]
    lines = [block if block[:3] == "```" else re.sub(r"\s*\n\s*(?![-|] )", " ", block) for block in blocks]
    return "\n\n".join(filter(None, lines)) + "\n"


def _on_record(run: RunFiles) -> list[str]:
    """What the record counts in the training split; of older runs, only the share in the loss is known."""
    if (counts := run.said("cohort", "counts", "train")) and run.level != "vertebra":
        images, patients = counts["images"], counts["patients"]
        ill, fractured = share(counts["fractured_patients"], patients), share(counts["fractured"], images)
        return [f"{patients:,}", ill, f"{images:,}", fractured]
    if counts:
        patients, vertebrae = counts["patients"], counts["sequences"]
        ill, fractured = (counts["fractured"][level] for level in ("patient", "vertebra"))
        return [f"{patients:,}", share(ill, patients), f"{vertebrae:,}", share(fractured, vertebrae)]
    alpha = run.said("loss", "alpha")
    return [UNKNOWN] * 3 + [UNKNOWN if alpha is None else f"{UNKNOWN} ({number(1 - alpha)})"]


def _counted(rows: pd.DataFrame) -> list[str]:
    cases = Cases.of(rows)
    parts = (cases.studies.groupby("patient")["label"].max(), cases.label)
    counts = [(f"{len(part):,}", share(int(part.sum()), len(part))) for part in parts]
    return [value for pair in counts for value in pair]


def _openings(run: RunFiles) -> list[list[str]]:
    """First openings of the test split: when, with which rules, with which frozen decision."""
    rows = []
    for row in run.openings.itertuples():
        this = run.frozen is not None and row.decision_sha256 == run.frozen.sha256
        what = f"{row.objective} at {row.level} level".replace("_", " ")
        rows.append([str(row.opened_utc), what, f"{str(row.decision_sha256)[:12]}{', those above' * this}"])
    return rows


def _hashes(run: RunFiles) -> list[list[str]]:
    of_cohort = _COHORT if run.level == "vertebra" else _OF_IMAGES
    hashes = {f"{what} of the cohort": run.said("data", f"{what}_sha256") for what in of_cohort}
    hashes |= {what: run.said(f"{what}_sha256") for what in _RUN}
    hashes = hashes if run.record else {}
    hashes |= {"predictions": run.predictions_sha256, "frozen decision": run.frozen and run.frozen.sha256}
    return [[what, f"`{found}`" if found else "none"] for what, found in hashes.items()]
