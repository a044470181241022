"""What a run's record says against its results: the limits in a model card, each from numbers on record."""

from collections.abc import Iterator, Mapping

from cspine_helpers.aggregation import aggregate
from cspine_helpers.dossier import Dossier
from cspine_helpers.findings import Findings, cell, number
from cspine_helpers.intervals import MOST_UNDEFINED
from cspine_helpers.labels import UID
from cspine_helpers.levels import MIN_POSITIVES
from cspine_helpers.metrics import at_level
from cspine_helpers.openings import MEMORY


def limits_of(run: Dossier, found: Mapping[str, Findings]) -> list[str]:
    """One sentence or two for each limit.

    Args:
        run: of `dossier.read_dossier`.
        found: split → its findings.
    """
    lines = [*_of_record(run), *(line for split, one in found.items() for line in _of_split(split, one))]
    single = [split for split, rows in run.splits.items() if len(rows[UID].unique()) == 1]
    return [*lines, *(f"On {cell(split)} there is one patient only: no results." for split in single)]


def _of_record(run: Dossier) -> Iterator[str]:
    """Limits of the run, whatever its results."""
    if run.record:
        yield (
            "Validation chose the epoch and the threshold, so that results on validation look better than "
            "those of new patients will."
        )
        yield (
            f"It is one training with one seed ({run.told('train', 'seed')}): another one would end "
            "elsewhere, and no interval here counts that."
        )
        if run.epochs is not None and run.said("best_epoch") == run.epochs:
            yield "The best epoch was the last one, so that a longer training might have found a better one."
        yield _left_out(run.said("left_out"))
        if run.parameters is None:
            yield "The weights (`model.safetensors`) are not in the folder."
        if run.predictions is not None:
            yield "`predictions.csv` does not say with which weights it was made."
    else:
        yield "The predictions came without a run, so that model, training data and training are not known."
        if run.decisions:
            yield "Validation chose the threshold, so that rates on validation look better than others will."
    if run.frozen is not None and run.frozen.guarantees and run.record:
        yield (
            "A guarantee is for patients drawn as those it was made on, whom training has not used; here "
            "they have also chosen the epoch, so that it holds less strictly than it says."
        )
    aggregations = [each.aggregation for each in run.decisions.values() if each.aggregation is not None]
    if any(each.fitted_on for each in aggregations):
        yield "The aggregation was fitted on validation patients, whose results look the better for it."
    if run.frozen is not None and run.frozen.calibrators:
        yield "The calibrators were fitted on validation, where calibrated probabilities would look too good."
    if run.frozen is not None and (lost := run.frozen.record[MEMORY]["lost"]):
        yield f"The record of {lost} opening(s) of the test split was lost."
    if len(run.openings) > 1:
        many = len(run.openings)
        yield f"The test split was opened {many} times; results on it are less new with each."


def _left_out(left_out: Mapping[str, Mapping[str, list[str]]] | None) -> str:
    if left_out is None:
        return "The record does not say whether studies were left out of training."
    if not any(left_out.values()):
        return "No study was left out of training."
    counts = ", ".join(f"{len(studies):,} of {split}" for split, studies in left_out.items() if studies)
    return (
        f"Studies were left out, as their files could not be used ({counts}); nothing is known of such ones."
    )


def _of_split(split: str, found: Findings) -> Iterator[str]:
    """Limits of the results on one split."""
    where = f"On {cell(split)}"
    counts = found.vertebrae.drop_duplicates("vertebra")
    few = counts[counts["positives"] < MIN_POSITIVES]
    if len(few):
        named = ", ".join(f"{row.vertebra} {row.positives}" for row in few.itertuples())
        yield (
            f"{where}, few are fractured: {named}. With fewer than {MIN_POSITIVES}, the numbers of a single "
            "vertebra say little."
        )
    if lacking := found.lacking():
        yield (
            f"{where}, too few cases leave undefined, or without an interval: {'; '.join(lacking)}. A number "
            f"has no interval where more than {100 * MOST_UNDEFINED:.0f} % of the resamples do not define it."
        )
    patients = aggregate(found.rows, found.aggregation)
    if incomplete := int((patients["missing"] > 0).sum()):
        yield f"{where}, {incomplete:,} of {len(patients):,} patients lack a vertebra; nothing is said of it."
    yield (
        f"{where}, {number(at_level(found.rows, 'all')['label'].mean())} of the vertebrae and "
        f"{number(patients['label'].mean())} of the patients are fractured. Precision, negative predictive "
        "value, F1, accuracy, average precision and all losses change with these shares."
    )
