"""How well a run finds and outlines fractures on radiographs: masks, lesions, presence, subgroups, studies.

Every metric is a ratio of sums over whole groups (`patient`), which are what is resampled. Shapes: n images,
P patients, R resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.stats import t

from cspine_helpers.evaluation import intervals
from cspine_helpers.evaluation.cases import Cases, check_choice
from cspine_helpers.evaluation.resampling import (
    Floats,
    Ranking,
    Ratio,
    check_confidence,
    confusion_sums,
    effective_cases,
    estimates,
    mean_interval,
    patient_weights,
    resampled,
    score_interval,
    shares_of,
)
from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import (
    numbers,
    require_columns,
)
from cspine_helpers.labels import UID
from cspine_helpers.metrics import check_scores
from cspine_helpers.predictions import COLUMNS
from cspine_helpers.radiographs.mask_cases import SAME, SUBGROUPS, MaskCases

FEW = 10  # patients; below, a subgroup's value is shown without an interval
FALSE_MARKS = (0.25, 0.5, 1.0)  # an image, at which a FROC curve is summed up
PRESENCE = ("auroc", "average_precision", "recall", "specificity", "precision")
NOT_STATED = "not stated"
How = Literal["mean", "max"]


class _Measure(NamedTuple):
    """A metric of masks as a ratio of sums over groups.

    Attributes:
        above: numerator of each image, (n,).
        below: denominator of each image, (n,); its sum is the n that is reported.
        of: what n counts.
        kind: how its interval is made: a "share" of things that are or are not, a "mean" of shares, or a
            "count" of things an image.
    """

    above: Floats
    below: Floats
    of: str
    kind: Literal["share", "mean", "count"]


def _measures(cases: MaskCases) -> dict[str, _Measure]:
    if not cases.has_masks:
        return {}
    columns = cases.images.select_dtypes("number").astype(np.float64)
    find = {name: columns[name].to_numpy() for name in columns}
    one, fractured = np.ones(len(columns)), (find["true"] > 0).astype(np.float64)
    seen = (find["true_frame"] > 0).astype(np.float64)
    none = fractured * (find["overlap"] == 0)
    marked = (1 - fractured) * (find["marks"] > 0)
    return {
        "dice_pos": _Measure(find["dice"] * fractured, fractured, "fractured images", "mean"),
        "dice_pos_frame": _Measure(find["dice_frame"] * seen, seen, "fractured images", "mean"),
        "dice": _Measure(find["dice"], one, "images", "mean"),
        "pixel_precision": _Measure(find["overlap"], find["predicted"], "predicted pixels", "share"),
        "pixel_recall": _Measure(find["overlap"], find["true"], "true pixels", "share"),
        "lesion_recall": _Measure(find["lesions_hit"], find["lesions"], "lesions", "share"),
        "false_marks": _Measure(find["false_marks"], one, "images", "count"),
        "missed_whole": _Measure(none, fractured, "fractured images", "share"),
        "intact_marked": _Measure(marked, 1 - fractured, "intact images", "share"),
    }


def _ratio(cases: MaskCases, measure: _Measure) -> Ratio:
    return cases.sums(measure.above), cases.sums(measure.below)


def _value(ratio: Ratio) -> float:
    return float(ratio[0].sum() / ratio[1].sum()) if ratio[1].sum() else np.nan


def _interval(ratio: Ratio, kind: str, resamples: int, seed: int, confidence: float) -> tuple[float, float]:
    """Limits of a ratio of sums over groups (P,); NaN where it is undefined or one group alone counts.

    Source: number of alike groups, Kish, Survey Sampling (1965).
    """
    groups, value = int((ratio[1] > 0).sum()), _value(ratio)
    if groups < 2:
        return np.nan, np.nan
    if kind == "share":
        drawn = resampled(np.stack(ratio, axis=1), resamples, seed)
        drawn = drawn[drawn[:, 1] > 0]
        cases = effective_cases(value, drawn[:, 0] / drawn[:, 1], ratio[1].sum(), groups)
        alike = ratio[1].sum() ** 2 / (ratio[1] ** 2).sum()  # groups of one size that would tell as much
        return _score(value, cases, confidence, max(float(alike) - 1, 1.0))
    shares = shares_of(ratio)
    low, high = mean_interval(shares, confidence)
    if np.ptp(shares) < SAME:  # all alike: they show no spread, and groups are what is known
        if kind == "count":
            return low, high - float(np.log((1 - confidence) / 2)) / groups
        low, high = _score(value, groups, confidence)
    return max(low, 0.0), high if kind == "count" else min(high, 1.0)


def _score(value: float, cases: float, confidence: float, freedom: float = np.inf) -> tuple[float, float]:
    low, high = score_interval(value, cases, confidence, freedom=freedom)
    return float(low), float(high)


def evaluate(
    cases: MaskCases,
    *,
    threshold: float | None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    keep_undefined: bool = False,
) -> pd.DataFrame:
    """Every headline number of radiographs with its interval, resampling groups of images.

    Of presence: `auroc, average_precision`, and at the threshold `recall, specificity, precision`. Of masks:
    `dice_pos` (mean Dice of fractured images, in the image's own pixels), `dice_pos_frame` (the same as the
    public benchmark measures it, at its frame), `dice` (of all images; an empty pair counts 1),
    `pixel_precision, pixel_recall` (pooled), `lesion_recall` (lesions hit), `false_marks` (an image),
    `missed_whole` (fractured images whose mask shares no pixel with the truth), `intact_marked` (intact
    images with a mark).

    Args:
        cases: of one split.
        threshold: of presence: called fractured at or above it; None leaves rates out.
        resamples: of the groups.
        seed: of the resamples.
        confidence: of each interval by itself.
        keep_undefined: keep a metric that is undefined, as NaN, rather than raise.

    Returns:
        Columns `metric, value, low, high, n, of` (what n counts), `groups` (how many those are of).

    Raises:
        ValueError: one class only, no predicted pixel, and whatever else leaves a metric undefined, unless
            such are kept; an option out of range.

    Example:
        >>> table = pd.DataFrame({"image": [*"abcd"], "patient": [*"abcd"], "label": [1, 1, 0, 0]})
        >>> table["probability"] = [0.9, 0.6, 0.2, 0.1]
        >>> found = evaluate(MaskCases.of(table, truth={}), threshold=0.5, keep_undefined=True)
        >>> found.set_index("metric")["value"].to_dict()["auroc"]
        1.0
    """
    check_confidence(confidence)
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "confidence": confidence}
    if len(cases.population) < 2 and not keep_undefined:
        raise ValueError("The images are of 1 patient or group, which cannot be resampled. Use more.")
    tables = [_presence_table(cases.presence, threshold, options), _mask_table(cases, **options)]
    found = pd.concat([table for table in tables if len(table)], ignore_index=True)
    rare = found.pop("undefined").fillna(0) > intervals.MOST_UNDEFINED * resamples
    if (undefined := found["value"].isna() | rare).any() and not keep_undefined:
        named = ", ".join(f"{row.metric} of {row.n} {row.of}" for row in found[undefined].itertuples())
        raise ValueError(
            f"Undefined, or so in more than {intervals.MOST_UNDEFINED:.0%} of the resamples: {named}. Use "
            "more images of both classes, with something predicted, or keep_undefined=True."
        )
    return found


def _presence_table(presence: Cases, threshold: float | None, options: Mapping[str, Any]) -> pd.DataFrame:
    """Metrics of `PRESENCE` with intervals, where there is more than one patient."""
    if presence.n_patients > 1:
        found = intervals.bootstrap(presence, threshold=threshold, keep_undefined=True, **options)
    else:
        alone = estimates(presence, threshold)
        found = pd.DataFrame({"metric": alone.names, "value": alone.under(np.ones((1, 1)))[:, 0]})
        found = found.assign(low=np.nan, high=np.nan, undefined=0)
    found = found.set_index("metric").reindex([name for name in PRESENCE if name in set(found["metric"])])
    called = np.zeros(len(presence), bool) if threshold is None else presence.probability >= threshold
    whole = np.ones(len(presence), dtype=bool)
    rests = {
        "recall": (presence.label == 1, "fractured images"),
        "specificity": (presence.label == 0, "intact images"),
        "precision": (called, "images called fractured"),
    }
    rows = [(name, *rests.get(name, (whole, "images"))) for name in found.index]
    found = found[["value", "low", "high", "undefined"]].assign(
        n=[int(kept.sum()) for _, kept, _ in rows],
        of=[of for _, _, of in rows],
        groups=[len(np.unique(presence.patient[kept])) for _, kept, _ in rows],
    )
    return found.reset_index()


def _mask_table(cases: MaskCases, *, resamples: int, seed: int, confidence: float) -> pd.DataFrame:
    rows = []
    for name, measure in _measures(cases).items():
        ratio = _ratio(cases, measure)
        low, high = _interval(ratio, measure.kind, resamples, seed, confidence)
        groups = int((ratio[1] > 0).sum())
        n = int(measure.below.sum())
        rows.append((name, _value(ratio), low, high, 0, n, measure.of, groups))
    return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "undefined", "n", "of", "groups"])


def froc(
    cases: MaskCases,
    *,
    at: ArrayLike = FALSE_MARKS,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Lesions found at so many false marks an image, on the free-response curve, with intervals.

    Marks are taken from the highest score down, as long as there are no more false ones an image, of all
    images, fractured or not. The curve ends where all marks are taken: beyond, `reached` is 0, and the
    recall is that of the end.

    Args:
        cases: with masks.
        at: false marks an image, (K,): many of them make a curve.
        resamples: of the groups.
        seed: of the resamples.
        confidence: of each interval by itself.

    Returns:
        Columns `false_marks, lesion_recall, low, high, score` (the least that is taken; NaN if no mark is),
        `reached` (0/1), `lesions, images`.

    Raises:
        ValueError: no masks were predicted; there is no lesion; a point is negative.

    Source: Chakraborty, Observer Performance Methods for Diagnostic Imaging (2017), chapter 12: lesion
    localisations a lesion over non-lesion localisations an image.

    Example:
        >>> table = pd.DataFrame({"image": [*"ab"], "patient": [*"ab"], "label": 1, "probability": 0.5})
        >>> masks = dict.fromkeys("ab", np.eye(4) * 0.9)
        >>> found = froc(MaskCases.of(table, truth=masks, predicted=masks), at=[0.5])
        >>> found[["lesion_recall", "reached"]].iloc[0].tolist()
        [1.0, 0.0]
    """
    check_confidence(confidence)
    points = np.atleast_1d(np.asarray(at, dtype=np.float64))
    if not cases.has_masks or cases.lesions.empty:
        raise ValueError("A FROC curve needs predicted masks and one lesion or more. Use such images.")
    if not (points >= 0).all():
        raise ValueError(f"False marks an image are 0 or more; found {points.min()}. Give others.")
    hit = cases.lesions[cases.lesions["score"].notna()]
    false = cases.marks[cases.marks["false"] == 1]
    score = np.unique(np.concatenate([hit["score"], false["score"]]))[::-1]

    def steps(rows: pd.DataFrame) -> csr_array:
        where = (
            np.searchsorted(-score, -rows["score"].to_numpy()),
            cases.population.get_indexer(pd.Index(rows["patient"])),
        )
        return csr_array((np.ones(len(rows)), where), shape=(len(score), len(cases.population)))

    hits, wrong = steps(hit), steps(false)
    lesions, images = cases.sums(1, cases.lesions), cases.sums(1)

    def under(weights: Floats) -> tuple[Floats, NDArray[np.intp]]:
        """Recall (K, R), and how many scores are taken."""
        found = np.cumsum(hits @ weights, axis=0)
        alarms = np.cumsum(wrong @ weights, axis=0) / (images @ weights)
        taken = np.stack([(alarms <= point * (1 + SAME)).sum(axis=0) for point in points])
        padded = np.pad(found, ((1, 0), (0, 0)))
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample without a lesion
            return np.take_along_axis(padded, taken, axis=0) / (lesions @ weights), taken

    value, taken = (part[:, 0] for part in under(np.ones((len(images), 1))))
    weights = patient_weights(len(images), resamples, seed, rows=len(cases))
    draws = np.concatenate([under(drawn)[0] for drawn in weights], axis=1)
    groups = int((lesions > 0).sum())
    limits = np.full((2, len(points)), np.nan)
    for place, drawn in enumerate(draws if groups > 1 else ()):
        some = drawn[~np.isnan(drawn)]
        independent = effective_cases(value[place], some, lesions.sum(), groups)
        limits[:, place] = score_interval(value[place], independent, confidence, freedom=groups - 1)
    return pd.DataFrame(
        {
            "false_marks": points,
            "lesion_recall": value,
            "low": limits[0],
            "high": limits[1],
            "score": [score[many - 1] if many else np.nan for many in taken],
            "reached": (len(false) / len(cases) >= points * (1 - SAME)).astype(int),
            "lesions": len(cases.lesions),
            "images": len(cases),
        }
    )


def subgroups(
    cases: MaskCases,
    *,
    threshold: float | None,
    by: Sequence[str] = SUBGROUPS,
    few: int = FEW,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """The headline numbers of parts, views, images with metal and others, with how many each rests on.

    An image of several views (joined by `+`) counts in each; an empty cell is "not stated"; of a column of 0
    and 1 there are images with and without it.

    Args:
        cases: of one split.
        threshold: of presence, as in `evaluate`; so are the other options.
        by: columns of `cases.images`.
        few: groups of images (patients), of each class where both count, below which a number is flagged and
            has no interval.
        resamples: of the groups.
        seed: of the resamples.
        confidence: of each interval by itself.

    Returns:
        Columns `by, subgroup, images, fractured, metric, value, low, high, n, of, groups, few` (0/1).

    Raises:
        ValueError: the table lacks a column of `by`; see `evaluate`.

    Example:
        >>> table = pd.DataFrame({"image": [*"abcd"], "patient": [*"abcd"], "label": [1, 1, 0, 0]})
        >>> table = table.assign(probability=[0.9, 0.6, 0.2, 0.1], part="hand", hardware=[1, 0, 0, 0])
        >>> found = subgroups(MaskCases.of(table, truth={}), threshold=0.5, by=["part", "hardware"])
        >>> found[["subgroup", "images", "few"]].drop_duplicates().to_numpy().tolist()
        [['hand', 4, 1], ['without hardware', 3, 1], ['with hardware', 1, 1]]
    """
    require_columns(cases.images, by, what="The table of images")
    tables = []
    for column in by:
        words = _members(cases, column)
        for name in sorted({word for each in words for word in each}, key=_order):
            kept = np.array([name in each for each in words])
            part = cases.where(kept)
            found = _of_few(part, threshold, few, resamples, seed, confidence)
            fractured = int(part.images["label"].sum())
            shown = {"by": column, "subgroup": name, "images": len(part), "fractured": fractured}
            tables.append(pd.DataFrame([shown]).merge(found, how="cross"))
    return pd.concat(tables, ignore_index=True)


def _members(cases: MaskCases, column: str) -> list[list[str]]:
    """The subgroups of a column that each image belongs to, (n,)."""
    cells = cases.images[column]
    is_flag = bool(numbers(cells[cells.notna() & (cells.astype(str) != "")]).isin([0, 1]).all())
    return [_words(column, cell, is_flag=is_flag) for cell in cells]


def _words(column: str, cell: Any, *, is_flag: bool) -> list[str]:
    """The subgroups that an image belongs to by one cell."""
    if pd.isna(cell) or str(cell).strip() == "":
        return [f"{column} {NOT_STATED}"]
    if is_flag:
        return [f"{'with' if float(cell) else 'without'} {column}"]
    return [word.strip() for word in str(cell).split("+")]


def _order(word: str) -> tuple[bool, bool, str]:
    """Subgroups by name, those without something before those with it, those not stated last."""
    return word.endswith(NOT_STATED), word.startswith("with "), word


def _of_few(
    part: MaskCases, threshold: float | None, few: int, resamples: int, seed: int, confidence: float
) -> pd.DataFrame:
    """Headline numbers of a subgroup; those of few patients flagged and without interval."""
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "confidence": confidence}
    found = evaluate(part, threshold=threshold, keep_undefined=True, **options)
    labels = part.images.groupby("label")["patient"].nunique().reindex([0, 1], fill_value=0)
    areas = found["metric"].isin(["auroc", "average_precision"])
    rests = found["groups"].where(~areas, labels.min())
    found["few"] = (rests < few).astype(int)
    found.loc[found["few"] == 1, ["low", "high"]] = np.nan
    return found


def shortcut(
    cases: MaskCases,
    *,
    by: str = "hardware",
    subgroup: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """How much of the AUROC a sign could explain: nearly every image with metal may be fractured.

    Images of which `by` is not stated are left out of all rows.

    Args:
        cases: of one split.
        by: a column of `cases.images`, as in `subgroups`.
        subgroup: the one whose images bear the sign; None: those with it, of a column of 0 and 1; of another
            column the rarest.
        resamples: of the groups.
        seed: of the resamples.
        confidence: of each interval by itself.

    Returns:
        Columns `sign` (the subgroup), `what, value, low, high, images, fractured`: AUROC of `all images`; of
        those `without` the sign; of the sign `alone`, in place of the model; and the difference
        `without − all`, both measured on the same resamples.

    Raises:
        ValueError: no such column, the sign is on all images or on none; one class only without it.

    Example:
        >>> table = pd.DataFrame({"image": [*"abcde"], "patient": [*"abcde"], "label": [1, 1, 0, 0, 1]})
        >>> table = table.assign(probability=[0.9, 0.3, 0.4, 0.1, 0.8], hardware=[1, 0, 0, 0, 0])
        >>> found = shortcut(MaskCases.of(table, truth={})).set_index("what")["value"]
        >>> found.round(2).to_dict()["alone"]
        0.67
    """
    check_confidence(confidence)
    require_columns(cases.images, [by], what="The table of images")
    words = pd.Series(_members(cases, by), dtype=object)
    stated = words.map(lambda each: f"{by} {NOT_STATED}" not in each).to_numpy(dtype=bool)
    cases, words = cases.where(stated), words[stated]
    if subgroup is None:
        many = words.explode().value_counts()
        subgroup = f"with {by}" if {f"with {by}", f"without {by}"} & {*many.index} else str(many.idxmin())
    sign = words.map(lambda each: subgroup in each).to_numpy(dtype=bool)
    if sign.all() or not sign.any():
        raise ValueError(
            f'{sign.sum()} of {len(cases)} images are "{subgroup}": the shortcut needs both. Use more images.'
        )
    presence = cases.presence
    without = presence.where(~sign)
    check_scores(without.label, without.probability, both_classes=True)
    named = {
        "all images": presence,
        "without": without,
        "alone": presence.with_probability(sign.astype(float)),
    }
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "confidence": confidence}
    tables = [_presence_table(each, None, options).query("metric == 'auroc'") for each in named.values()]
    found = pd.concat(tables)[["value", "low", "high"]].assign(what=[*named])
    found["images"] = [len(each) for each in named.values()]
    found["fractured"] = [int(each.label.sum()) for each in named.values()]
    rankings = [Ranking(presence), Ranking(without)]
    weights = patient_weights(len(presence.population), resamples, seed, rows=len(presence))
    draws = np.concatenate([[r.areas(drawn)[0] for r in rankings] for drawn in weights], axis=1)
    draws = draws[:, ~np.isnan(draws).any(axis=0)]
    freedom = max(_ranked(without) - 1, 1)
    half = t.ppf((1 + confidence) / 2, freedom) * (draws[1] - draws[0]).std() * np.sqrt(1 + 1 / freedom)
    change = found["value"].iloc[1] - found["value"].iloc[0]
    limits = {"value": change, "low": change - half, "high": change + half}
    last = found.iloc[:1].assign(what="without − all", **limits)
    found = pd.concat([found, last], ignore_index=True).assign(sign=subgroup)
    return found[["sign", "what", "value", "low", "high", "images", "fractured"]]


def _ranked(cases: Cases) -> int:
    """Patients with a case of either class, the fewer of the two."""
    return min(len(np.unique(cases.patient[cases.label == label])) for label in (0, 1))


def compare(
    cases: MaskCases,
    other: MaskCases,
    *,
    threshold: float | None,
    other_threshold: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Differences between two runs on the same images, other − first, with intervals of the pairs.

    Presence as in `evaluation.compare`; of a metric of masks each group's own difference counts, so that what
    makes an image hard for both cancels. Metrics that only one of the two has are left out.

    Args:
        cases: of the first run.
        other: of the second, of the same images, groups, labels and truth.
        threshold: of the first run's presence; None leaves rates out.
        other_threshold: of the second; that of the first where not given.
        resamples: of the groups.
        seed: of the resamples.
        confidence: of each interval by itself.

    Returns:
        Columns `metric, value, other, difference, low, high`.

    Raises:
        ValueError: the two are not of the same images; see `evaluate`.

    Example:
        >>> table = pd.DataFrame({"image": [*"abcd"], "patient": [*"abcd"], "label": [1, 1, 0, 0]})
        >>> first, second = (MaskCases.of(table.assign(probability=p), truth={})
        ...                  for p in ([0.9, 0.2, 0.4, 0.1], [0.9, 0.6, 0.4, 0.1]))
        >>> compare(first, second, threshold=None)["difference"].round(2).tolist()[0]
        0.25
    """
    other = _aligned(cases, other)
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "confidence": confidence}
    found = intervals.compare(
        cases.presence,
        other.presence,
        threshold=threshold,
        other_threshold=other_threshold,
        keep_undefined=True,
        **options,
    )
    columns = ["metric", "value", "other", "difference", "low", "high"]
    tables = [found[found["metric"].isin(PRESENCE)][columns]]
    first, second = _measures(cases), _measures(other)
    rows = []
    for name in first if first and second else ():
        pair = [_ratio(cases, first[name]), _ratio(other, second[name])]
        value, changed = (_value(ratio) for ratio in pair)
        rows.append((name, value, changed, changed - value, *_paired(pair, first[name].kind, confidence)))
    if rows:
        tables.append(pd.DataFrame(rows, columns=columns))
    order = {name: place for place, name in enumerate((*PRESENCE, *first))}
    return pd.concat(tables).sort_values("metric", key=lambda names: names.map(order), ignore_index=True)


def _paired(pair: Sequence[Ratio], kind: str, confidence: float) -> tuple[float, float]:
    """Limits of the second ratio − the first, by what each group that counts in either contributes."""
    either = np.logical_or.reduce([below > 0 for _, below in pair])
    values = [_value(ratio) for ratio in pair]
    if either.sum() < 2 or np.isnan(values).any():
        return np.nan, np.nan
    first, second = (
        value + (above[either] - value * below[either]) / below[either].mean()
        for value, (above, below) in zip(values, pair, strict=True)
    )
    if kind == "share" and values[0] == values[1] and values[0] in (0, 1):  # no group shows any spread
        low, high = _score(values[0], float(either.sum()), confidence)
        return low - high, high - low
    return mean_interval(second - first, confidence)


def _aligned(cases: MaskCases, other: MaskCases) -> MaskCases:
    """The other cases in the order of the first."""
    both = {each: set(each.images["image"]) for each in (cases, other)}
    for here, there, which in ((cases, other, "second"), (other, cases, "first")):
        if alone := sorted(both[here] - both[there]):
            raise ValueError(
                f"{len(alone)} images are not in the {which} run's predictions: {listing(alone)}. "
                "Compare two runs on the same images."
            )
    place = other.images.set_index("image", drop=False).loc[cases.images["image"]].reset_index(drop=True)
    names = [name for name in ("patient", "label", "true") if {name} <= {*cases.images} & {*place}]
    differ = (place[names] != cases.images[names]).any(axis=1)
    if differ.any():
        raise ValueError(
            f"{differ.sum()} images differ in {', '.join(names)} between the two runs: "
            f"{listing(cases.images['image'][differ])}. Predict both with one image table."
        )
    return replace(other, images=place)


def ablation(
    runs: Mapping[str, MaskCases],
    *,
    reference: str,
    thresholds: Mapping[str, float] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Every run's headline numbers, and how much they differ from the reference's on the same images.

    Args:
        runs: name → cases, all of the same images.
        reference: the run that the others are compared with.
        thresholds: of presence, by run; None leaves rates out.
        resamples: of the groups.
        seed: of the resamples.
        confidence: of each interval by itself.

    Returns:
        Columns `run, metric, value, low, high, n, difference, difference_low, difference_high`; differences
        are run − reference, and NaN for the reference itself and where it lacks the metric.

    Raises:
        ValueError: the reference is none of the runs; a run without threshold; see `compare`.

    Example:
        >>> table = pd.DataFrame({"image": [*"abcd"], "patient": [*"abcd"], "label": [1, 1, 0, 0]})
        >>> runs = {name: MaskCases.of(table.assign(probability=p), truth={})
        ...         for name, p in {"plain": [0.9, 0.2, 0.4, 0.1], "flips": [0.9, 0.6, 0.4, 0.1]}.items()}
        >>> found = ablation(runs, reference="plain", resamples=50)
        >>> found.query("metric == 'auroc'")[["value", "difference"]].to_numpy().tolist()
        [[0.75, nan], [1.0, 0.25]]
    """
    check_choice("reference", reference, tuple(runs))
    if thresholds is not None and (lacking := [name for name in runs if name not in thresholds]):
        raise ValueError(f"No threshold for {listing(lacking)}. Give each run its frozen one.")
    given: Mapping[str, float | None] = thresholds or dict.fromkeys(runs)
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "confidence": confidence}
    names = {"difference": "difference", "low": "difference_low", "high": "difference_high"}
    tables = []
    for name, cases in runs.items():
        found = evaluate(cases, threshold=given[name], keep_undefined=True, **options)
        found = found[["metric", "value", "low", "high", "n"]]
        if name == reference:
            found = found.assign(**dict.fromkeys(names.values(), np.nan))
        else:
            change = compare(
                runs[reference], cases, threshold=given[reference], other_threshold=given[name], **options
            )
            found = found.merge(change[["metric", *names]].rename(columns=names), on="metric", how="left")
        found.insert(0, "run", name)
        tables.append(found)
    return pd.concat(tables, ignore_index=True)


def examples(
    cases: MaskCases, *, threshold: float, measure: str = "probability", each: int = 4
) -> pd.DataFrame:
    """Images to look at: hits, misses, false alarms and cleared ones, spread evenly over a measure.

    The lowest, the highest and those between by rank, so that neither the best nor the worst stand for all.

    Args:
        cases: of one split.
        threshold: of presence: called fractured at or above it.
        measure: a column of `cases.images`, such as `probability` or `dice`.
        each: how many of each kind at most.

    Returns:
        The rows of `cases.images` with `kind`: "hit", "miss", "false alarm" or "cleared".

    Raises:
        ValueError: an unknown measure, or none of each is asked for.

    Example:
        >>> table = pd.DataFrame({"image": [*"abc"], "patient": [*"abc"], "label": [1, 1, 0]})
        >>> cases = MaskCases.of(table.assign(probability=[0.9, 0.2, 0.8]), truth={})
        >>> examples(cases, threshold=0.5)["kind"].tolist()
        ['hit', 'miss', 'false alarm']
    """
    require_columns(cases.images, [measure], what="The table of images")
    if each < 1:
        raise ValueError(f"each is a whole number from 1; found {each}. Ask for some of each kind.")
    fractured, called = cases.images["label"] == 1, cases.images["probability"] >= threshold
    kinds = {
        "hit": fractured & called,
        "miss": fractured & ~called,
        "false alarm": ~fractured & called,
        "cleared": ~fractured & ~called,
    }
    found = []
    for kind, kept in kinds.items():
        rows = cases.images[kept].sort_values([measure, "image"])
        places = np.unique(np.linspace(0, len(rows) - 1, min(each, len(rows))).round().astype(int))
        found.append(rows.iloc[places].assign(kind=kind))
    return pd.concat([rows for rows in found if len(rows)], ignore_index=True)


def study_scores(table: pd.DataFrame, how: How = "mean") -> pd.DataFrame:
    """Predictions of studies of several views: the mean, or the highest, of each study's probabilities.

    Args:
        table: one row an image: `study, patient, split, label, probability`, as `judged_images` gives them.
        how: "mean", as MURA's authors do, or "max".

    Returns:
        A predictions table of unit `study`, in order of first appearance, which notebooks, `Cases` and
        `write_predictions` take; with a column `images`, how many views a study has.

    Raises:
        ValueError: the images of a study differ in label, patient or split; an unknown `how`; columns are
            missing; there is no row.

    Source: Rajpurkar et al., MURA (2018), section 3.

    Example:
        >>> views = pd.DataFrame({"study": [*"aab"], "patient": [*"ppq"], "label": [1, 1, 0]})
        >>> views = views.assign(probability=[0.9, 0.5, 0.2], split="test")
        >>> study_scores(views)["probability"].tolist()
        [0.7, 0.2]
    """
    check_choice("how", how, get_args(How))
    same = ["patient", "split", "label"]
    require_columns(table, ("study", *same, "probability"), what="The table of images")
    if table.empty:
        raise ValueError("The table of images has no rows. Choose a split that has some.")
    by_study = table.groupby("study", sort=False)
    differ = table["study"][(by_study[same].transform("first") != table[same]).any(axis=1)].drop_duplicates()
    if len(differ):
        raise ValueError(
            f"{len(differ)} studies have images that differ in {', '.join(same)}: {listing(differ)}. "
            "All images of a study have one of each: correct the table."
        )
    found = by_study[same].first()
    found["probability"] = by_study["probability"].agg(how)
    found["images"] = by_study.size()
    found = found.rename_axis(UID).reset_index().assign(vertebra="study")
    return found[[*COLUMNS, "patient", "images"]]


def study_metrics(
    studies: pd.DataFrame,
    *,
    threshold: float,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """AUROC, Cohen's kappa and rates of studies with intervals that resample patients.

    Args:
        studies: of `study_scores`, of one split.
        threshold: called abnormal at or above it.
        resamples: of the patients.
        seed: of the resamples.
        confidence: of each interval by itself.

    Returns:
        Columns `metric, value, low, high, n` (studies that it rests on), `groups` (their patients).

    Raises:
        ValueError: one class only; one patient; several splits; an option out of range.

    Source: Cohen, Educational and Psychological Measurement 20 (1960) 37-46.

    Example:
        >>> views = pd.DataFrame({"study": [*"abcd"], "patient": [*"abcd"], "label": [1, 1, 0, 0]})
        >>> views = views.assign(probability=[0.9, 0.3, 0.2, 0.1], split="test")
        >>> found = study_metrics(study_scores(views), threshold=0.5)
        >>> found.set_index("metric")["value"].round(2)[["auroc", "kappa"]].to_dict()
        {'auroc': 1.0, 'kappa': 0.5}
    """
    cases = Cases.of(studies)
    check_scores(cases.label, cases.probability, both_classes=True)
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "confidence": confidence}
    columns = ["metric", "value", "low", "high", "n", "groups"]
    found = _presence_table(cases, threshold, options)[columns]
    kappa = ("kappa", *_kappa_interval(cases, threshold, **options), len(cases), cases.n_patients)
    both = [found[:1], pd.DataFrame([kappa], columns=columns), found[1:]]
    return pd.concat(both, ignore_index=True)


def _kappa_interval(
    cases: Cases, threshold: float, *, resamples: int, seed: int, confidence: float
) -> tuple[float, float, float]:
    """Cohen's kappa of calls and labels with its limits, by Student's t on the resamples' spread."""
    sums = confusion_sums(cases, threshold)  # (4, P)
    whole, patients = sums.sum(axis=1, keepdims=True), sums.shape[1]
    value = float(_kappa(whole)[0])
    if value == 1:  # no study is called wrongly: the agreement is that of so many patients at least
        least, chance = _score(1.0, patients, confidence)[0], float(_chance(whole)[0])
        return value, (least - chance) / (1 - chance), 1.0
    draws = _kappa(resampled(sums.T, resamples, seed).T)
    spread = np.nanstd(draws) * np.sqrt(patients / (patients - 1))
    half = float(t.ppf((1 + confidence) / 2, patients - 1) * spread)
    return value, max(value - half, -1.0), min(value + half, 1.0)


def _chance(counts: Floats) -> Floats:
    """Agreement expected by chance from tp, fp, fn, tn, (4, R)."""
    tp, fp, fn, tn = counts
    return ((tp + fp) * (tp + fn) + (fn + tn) * (fp + tn)) / np.maximum(counts.sum(axis=0), 1) ** 2


def _kappa(counts: Floats) -> Floats:
    """Cohen's kappa of tp, fp, fn, tn, (4, R); NaN where chance alone agrees always."""
    chance = _chance(counts)
    observed = (counts[0] + counts[3]) / np.maximum(counts.sum(axis=0), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1, (observed - chance) / (1 - chance), np.nan)
