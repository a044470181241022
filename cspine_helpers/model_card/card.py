"""The model card of a run, `MODEL_CARD.md`: what it is, how good it is, how sure that is, and its limits.

Every number comes from the files of the run folder, and the same files give the same bytes:

    python -m cspine_helpers card --run builtin

Source: Mitchell et al., Model cards for model reporting, FAT* (2019) 220-229, for the sections.
"""

from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

import pandas as pd

from cspine_helpers import __version__
from cspine_helpers.decisions.test_split import Frozen
from cspine_helpers.decisions.thresholds import Decision
from cspine_helpers.evaluation.cases import at_level, patients_in_words, resampled_units
from cspine_helpers.files.paths import atomic_path, inside
from cspine_helpers.labels import UID
from cspine_helpers.model_card.results import (
    BINS,
    RESAMPLES,
    UNITS,
    Findings,
    cell,
    find,
    markdown,
    number,
    share,
)
from cspine_helpers.model_card.run_files import UNKNOWN, Dossier, limits_of, read_dossier

CARD = "MODEL_CARD.md"
_COHORT, _RUN = ("labels", "split", "manifest"), ("weights", "history", "record")  # that have hashes
_CITATION = "Cervical Spine Fracture Detection Dataset, Copyright RSNA, 2023"


def write_card(run_folder: str | Path) -> Path:
    """Write `<run>/MODEL_CARD.md` from what lies there; returns its path.

    The test split is never opened here: its results stand in the card once the record of openings says that
    it was opened with the decision that is frozen there.

    Raises:
        FileNotFoundError: there is neither a run nor a predictions table.
        ValueError: a file is damaged, or belongs to another run than those beside it; names it.
        OSError: the card cannot be written.
    """
    text, path = render(read_dossier(run_folder)), inside(Path(run_folder) / CARD)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path


def render(run: Dossier) -> str:
    """The card's Markdown."""
    found = {
        name: find(rows, run.decisions)
        for name, rows in run.splits.items()
        if len(rows[UID].unique()) > 1 and (name != "test" or run.opened)
    }
    parts = [_title(run), _model(run), _USE, _data(run)]
    parts += [_decision(run), *(_results(run, *each) for each in found.items() if each[0] != "test")]
    parts += [_openings(run), *(_results(run, *each) for each in found.items() if each[0] == "test")]
    parts += ["## Limits\n\n" + "\n".join(f"- {line}" for line in limits_of(run, found)), _reproduce(run)]
    return "\n\n".join(parts) + "\n"


def _title(run: Dossier) -> str:
    whose = (
        "The record does not say where the CT came from. Where they are the RSNA 2022 data, they are for "
        f"non-commercial use, and to be cited: {_CITATION}."
    )
    if run.synthetic:
        whose = (
            "Its data are synthetic CT phantoms: what stands here says that the method works, and nothing "
            "about patients. Which vertebrae break together was drawn as in RSNA 2022 "
            f"({_CITATION})."
        )
    return (
        f"# Model card: `{cell(run.name)}`\n\n**Research software, not a medical device.** Nothing here is "
        f"meant for the care of patients. {whose}\n\nEvery number comes from the files of this folder. In "
        f"parentheses behind it stands its 95 % interval, from {RESAMPLES:,} resamples of the patients: the "
        "vertebrae of one are drawn together, as they are broken and found together. Each interval holds by "
        "itself, and says how far other patients of the same kind could move the number, not another "
        "training or another hospital."
    )


def _model(run: Dossier) -> str:
    if not run.record:
        return "## Model\n\nNot known: the folder holds predictions without a run (`run.json`)."
    lines = []
    if run.said("model"):
        told = partial(run.told, "model")
        start = "random weights"
        if run.said("model", "pretrained"):
            file = PureWindowsPath(run.said("model", "pretrained_file") or "").name  # without its folders
            start = f"timm's pretrained weights {file}".strip()
        lines.append(
            f"It looks at one vertebra at a time, in {told('slices')} axial slices of {told('size')} × "
            f"{told('size')} pixels, each with its neighbours and the vertebra's mask. A CNN (timm's "
            f"`{told('backbone')}` down to stride {told('feature_stride')}, pooling {told('pooling')}, begun "
            f"from {cell(start)}) reads each slice, a bidirectional LSTM ({told('lstm_layers')} × "
            f"{told('lstm_hidden')} features each way) goes along them, and attention over its states gives "
            "one probability of fracture. It is "
            f"{'' if run.said('model', 'vertebra_embedding') else 'not '}told which vertebra it sees."
        )
    if (parameters := run.said("parameters")) is not None:
        lines.append(f"It has {parameters:,} parameters.")
    if run.said("train"):
        told = partial(run.told, "train")
        first = f"after {told('slice_epochs')} epochs of the CNN on single slices, "
        floor = run.said("train", "precision_floor")
        lines.append(
            f"Trained with focal loss and AdamW, {first if run.said('train', 'slice_epochs') else ''}for "
            f"{UNKNOWN if run.epochs is None else run.epochs} of at most {told('epochs')} epochs, seed "
            f"{told('seed')}. Kept: epoch {run.told('best_epoch')}, with the highest recall on validation at "
            f"a precision of {UNKNOWN if floor is None else number(floor)} or more."
        )
    frozen = run.frozen is not None and bool(run.frozen.calibrators)
    lines.append(
        "All settings stand in `run.json`. The probabilities are not calibrated"
        f"{'; calibrators are frozen, which `inference --calibrated` applies' if frozen else ''}."
    )
    return "## Model\n\n" + " ".join(lines)


_USE = """## Intended use

For research on fracture detection and for teaching it: comparing methods, thresholds, calibration and what \
a model attends to, on CT packed as its data were.

Not for diagnosis, triage or any other care of patients, and not to clear a spine: "not called" is no \
all-clear, least of all where a vertebra is missing. It does not tell the kind, age or stability of a \
fracture, sees nothing but C1 to C7, and was not tried on scanners, protocols, ages or hospitals other than \
those of its data.

Results are told apart by vertebra only. Age, sex, scanner, hospital and kind of fracture are not in the \
predictions, so that how they matter is not known; whoever studies patients has to look. A missed fracture \
and a false alarm do different harm, so that both are counted, and no single score stands for them."""


def _data(run: Dossier) -> str:
    rows = [[name, *_counted(part)] for name, part in run.splits.items()]
    notes = ["Each patient belongs to one split; in parentheses, shares."]
    if run.record and "train" not in run.splits:
        rows.insert(0, ["train", *_on_record(run)])
    if run.record:
        notes.append(f"Cohort `{run.told('data', 'cohort')}`; its hashes stand at the end.")
    else:
        notes.append("What the model was trained on is not known.")
    if not run.splits:
        notes.append("Without `predictions.csv`, nothing is known of validation and test.")
    counted = {name: patients_in_words(part) for name, part in run.splits.items()}
    if several := [f"{cell(name)}, {words}" for name, words in counted.items() if "studies" in words]:
        notes.append(
            f"Studies are not patients here: {'; '.join(several)}. Each study is called and scored by "
            "itself, so that what is said below of patients counts studies; the resamples draw patients."
        )
    table = markdown(["split", "patients", "fractured patients", "vertebrae", "fractured vertebrae"], rows)
    return f"## Data\n\n{' '.join(notes)}\n\n{table}"


def _on_record(run: Dossier) -> list[str]:
    """What the record counts in the training split; of older runs, only the share in the loss is known."""
    if counts := run.said("cohort", "counts", "train"):
        patients, vertebrae = counts["patients"], counts["sequences"]
        ill, fractured = (counts["fractured"][level] for level in ("patient", "vertebra"))
        return [f"{patients:,}", share(ill, patients), f"{vertebrae:,}", share(fractured, vertebrae)]
    alpha = run.said("loss", "alpha")
    return [UNKNOWN] * 3 + [UNKNOWN if alpha is None else f"{UNKNOWN} ({number(1 - alpha)})"]


def _counted(rows: pd.DataFrame) -> list[str]:
    patients, vertebrae = rows.groupby(resampled_units(rows))["label"].max(), at_level(rows, "all")["label"]
    counts = [(f"{len(part):,}", share(int(part.sum()), len(part))) for part in (patients, vertebrae)]
    return [value for pair in counts for value in pair]


def _decision(run: Dossier) -> str:
    frozen = run.frozen
    if not run.decisions:
        return "## Decision\n\nNo threshold was chosen, so that no vertebra is called fractured."
    columns = {level: _chosen(decision) for level, decision in run.decisions.items()}
    said = "Not frozen: it is what training chose, and may not be tried on the test split."
    if frozen is not None:
        for level, column in columns.items():
            promises = [
                each.reason for each in frozen.guarantees if (each.level == "patient") == (level == "patient")
            ]
            if promises and run.predictions is None:
                promises = ["not shown: without `predictions.csv` it cannot be checked"]
            column["guarantee"] = " ".join(promises) or "none"
            column["frozen"] = frozen.said(level, "frozen_utc")
            column["openings of the test split before that"] = frozen.said(level, "test_openings_before")
            column["calibrator"] = _calibrator(frozen, level)
        said = "Frozen: held to the split and the predictions they were chosen on, by their hashes."
    rows = [[what, *(column[what] for column in columns.values())] for what in next(iter(columns.values()))]
    return f"## Decision\n\n{said}\n\n{markdown(['what', *(UNITS[level] for level in columns)], rows)}"


def _chosen(decision: Decision) -> dict[str, Any]:
    """What a decision is and where it comes from."""
    threshold = "none" if decision.threshold is None else f"{decision.threshold:.4g}"
    if decision.thresholds is not None:
        threshold = ", ".join(f"{name} {value:.4g}" for name, value in decision.thresholds.items())
    rule = decision.rule
    level: str = rule.level
    if rule.aggregation is not None:
        level += f", by {rule.aggregation.phrase}"
    size = "" if decision.cases is None else f", {decision.positives:,} fractured of {decision.cases:,}"
    return {
        "level": f"{level}; it holds at no other",
        "threshold": f"{threshold}; what reaches it is called fractured",
        "why": decision.reason,
        "chosen on": f"validation{size}",
    }


def _calibrator(frozen: Frozen, level: str) -> str:
    """The calibrator at a decision's level, in words."""
    name = "all" if level == "vertebra" else level
    found = frozen.calibrators.get(name)
    if found is None:
        return "none"
    part = frozen.record["calibrators"][name]
    return (
        f"{found.kind}, fitted on {found.patients:,} patients of validation; frozen {part['frozen_utc']}, "
        f"openings of the test split before that: {part['test_openings_before']}"
    )


def _results(run: Dossier, split: str, found: Findings) -> str:
    parts = [f"## Results on {cell(split)}"]
    if split == "train":
        parts.append("These patients may have taught the model; then they say nothing of others.")
    if (recorded := run.said("metrics", split, "auroc")) is not None:
        score = number(found.scores["vertebrae"]["value"]["auroc"])
        parts.append(
            f"Training recorded an AUROC of {number(recorded)} here; these predictions have {score}."
        )
    if not found.reached:
        parts.append("No threshold was chosen, so that nothing is called, and there are no rates.")
    for level in found.reached:
        parts += [f"### The decision, at {level} level", found.decision_table(level)]
    parts += ["### Ranking", f"A patient's probability is {found.aggregation.phrase}."]
    parts += [found.ranking_table(), "### Each vertebra", found.vertebra_table()]
    parts += [
        "### Calibration",
        "Of the probabilities as they are. Bias and ECE are best at 0, the slope at 1: above 1, "
        "probabilities keep too far from 0 and 1, below, they come too near. The ECE is the root mean "
        f"squared distance over {BINS} bins of about equally many cases, less what chance adds; p is that of "
        "a test that probabilities are calibrated, with patients as units.",
        found.calibration_table(),
        *filter(None, [found.clipped()]),
    ]
    parts += [
        "### Loss of the RSNA 2022 competition",
        "Weighted log loss as the competition scored it; on other data than its own, no number to rank by.",
        found.competition_table() or "Not defined: some patients lack a vertebra.",
    ]
    return "\n\n".join(parts)


def _openings(run: Dossier) -> str:
    """What the test split was opened with, and when first."""
    title, rows = "## The test split", []
    for row in run.openings.itertuples():
        this = run.frozen is not None and row.decision_sha256 == run.frozen.sha256
        what = f"{row.objective} at {row.level} level".replace("_", " ")
        rows.append([row.opened_utc, what, f"{str(row.decision_sha256)[:12]}{', those above' * this}"])
    if not rows:
        return f"{title}\n\nIt was never opened, by the record: no results. Only frozen decisions open it."
    said = "" if run.opened else "No results: it was not opened with the decisions above.\n\n"
    return f"{title}\n\n{said}{markdown(['first opened', 'with', 'decision'], rows)}"


def _reproduce(run: Dossier) -> str:
    lines = ["## How to reproduce"]
    name, cohort = cell(run.name), run.told("data", "cohort")
    if run.record:
        again = f"--cohort {cohort} --run {name}-again"
        lines += [
            f"From the project's root, with the same data in `data/{cohort}/`; the same training gives the "
            "same weights bit for bit on a CPU only.",
            f"```\npython -m cspine_helpers train {again} --settings checkpoints/{name}/run.json\n"
            f"python -m cspine_helpers predict {again}\n"
            f"python -m cspine_helpers card --run {name}-again\n```",
        ]
        versions = ", ".join(f"{what} {which}" for what, which in (run.said("versions") or {}).items())
        lines.append(f"Trained with {cell(versions) or 'versions that are not on record'}.")
    lines.append(
        f"`python -m cspine_helpers card --run {name}` wrote this card, with cspine_helpers {__version__}."
    )
    hashes = {f"{what} of the cohort": run.said("data", f"{what}_sha256") for what in _COHORT}
    hashes |= {what: run.said(f"{what}_sha256") for what in _RUN}
    hashes = hashes if run.record else {}
    hashes |= {"predictions": run.predictions_sha256, "frozen decision": run.frozen and run.frozen.sha256}
    rows = [[what, f"`{found}`" if found else "none"] for what, found in hashes.items()]
    return "\n\n".join([*lines, markdown(["SHA-256 of", "is"], rows)])
