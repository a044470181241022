"""Maps of the shipped runs against the truth, case by case: `measured/maps.csv` and `perturbation.csv`.

    python -m benchmarks.map_scores builtin            validation and test of the built-in cohort
    python -m benchmarks.map_scores hard --cohort DIR  200 phantoms that are hard to read, made where missing
    python -m benchmarks.map_scores fracatlas          validation and test of FracAtlas

Fractured cases only: there is nothing to localise in the others. The threshold of the IoU is chosen on
validation, method by method, and each row names it. What runs the network many times for a map is left out:
occlusion, and integrated gradients of radiographs; and of these a part is perturbed, by some maps.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from benchmarks.triage import HARD
from cspine_helpers.checkpoints import Run, load_run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.explain.attention import attention_table
from cspine_helpers.explain.localisation import (
    METRICS,
    QUANTILES,
    attention_maps,
    best_iou_quantile,
    iou_at,
    localise,
    trivial_maps,
)
from cspine_helpers.explain.maps import METHODS, map_sequences
from cspine_helpers.explain.perturbation import perturb_sequences, perturbation_curves
from cspine_helpers.files.paths import cohort_dir, run_dir
from cspine_helpers.files.tables import write_table
from cspine_helpers.labels import UID, expand, read_labels
from cspine_helpers.model.forward import as_on_a_cpu
from cspine_helpers.packed import MASK, open_sequence, sequence_path
from cspine_helpers.phantom.cohort import fracture_truth, make_cohort
from cspine_helpers.radiographs.cohort import read_radiograph_cohort
from cspine_helpers.radiographs.maps import Framed, framed, map_radiographs
from cspine_helpers.radiographs.task import load_radiograph_run

MEASURED = "measured"
MAPPED = tuple(name for name in METHODS if name != "occlusion")
RADIOGRAPHS_MAPPED = tuple(name for name in MAPPED if name != "integrated_gradients")
OWN_MASK = "own_mask"  # of a radiograph network: the probability of each cell
RADIOGRAPH_TOLERANCE = 15.0  # pixels of a frame of 448 × 384, as Zhang et al. allow of images of such a size
CENTRAL = 2  # of the five intensity channels
PERTURBED = 0.15  # of the test radiographs
PERTURBED_METHODS = ("uniform", "edges", "grad_cam", "layer_cam", "gradient_input", "own_mask")
FEW_SHARES = (0.0, 0.005, 0.02, 0.1, 0.4, 1.0)  # of the larger radiographs
Maps = dict[str, NDArray[np.float32]]


def sequence_maps(run_name: str, packed: Path, samples: pd.DataFrame) -> Iterator[tuple[str, NDArray]]:
    """Maps of some samples by name, trivial ones and attention too; then "inside" and "probability"."""
    run = load_run(run_dir(run_name))
    whole = np.stack(
        [
            open_sequence(sequence_path(packed, *which))
            for which in samples[[UID, "vertebra"]].itertuples(index=False)
        ]
    )
    inside = whole[..., MASK] > 127
    yield from trivial_maps(whole[..., CENTRAL], inside=inside).items()
    table = attention_table(run, samples, packed)
    weights = table["attention"].to_numpy().reshape(len(samples), run.config.slices)
    yield "attention", attention_maps(weights, run.config.size, run.config.size)
    for method in MAPPED:
        yield method, map_sequences(run, samples, packed, method=method).pixels()
    yield "inside", inside
    yield "probability", table["probability"].to_numpy()[:: run.config.slices]


def score_sequences(
    cohort: str, split: str, samples: pd.DataFrame, truth: NDArray, maps: Maps, cuts: dict[str, float]
) -> pd.DataFrame:
    """Rows of `maps.csv`, a method after the other."""
    ids = samples[[UID, "vertebra"]].reset_index(drop=True)
    ids = ids.assign(probability=maps["probability"].round(4))
    parts = []
    for method, its in maps.items():
        if method in ("inside", "probability"):
            continue
        rows = localise(its, truth, inside=maps["inside"], iou_quantile=cuts[method]).round(4)
        parts.append(pd.concat([ids, rows], axis=1).assign(method=method, iou_quantile=cuts[method]))
    table = pd.concat(parts, ignore_index=True).assign(cohort=cohort, split=split)
    order = ["cohort", "split", "method", UID, "vertebra", "probability", *METRICS, "chance", "iou_quantile"]
    return table[order]


def measure_builtin(hard: Path | None) -> None:
    """Tables of the built-in run; with `hard`, rows of that cohort, at the thresholds of the stored table."""
    folder = run_dir("builtin") / MEASURED
    folder.mkdir(exist_ok=True)
    path = folder / "maps.csv"
    if hard is None:
        cohort, parts, cuts = read_cohort(cohort_dir("builtin")), [], dict[str, float]()
        for split in ("validation", "test"):
            samples = cohort.samples[split].query("label == 1").reset_index(drop=True)
            truth = fracture_truth(cohort.folder, samples)
            maps = dict(sequence_maps("builtin", cohort.packed, samples))
            if split == "validation":
                named = (name for name in maps if name not in ("inside", "probability"))
                cuts = {name: best_iou_quantile(maps[name], truth) for name in named}
            parts.append(score_sequences("builtin", split, samples, truth, maps, cuts))
        write_table(pd.concat(parts), path, sealed=True)
        asked = {name: its for name, its in maps.items() if name in cuts and name != "mask"}
        curves = perturb_sequences(load_run(run_dir("builtin")), samples, cohort.packed, asked)
        curves = curves.drop(columns="case").round(4).assign(cohort="builtin", split="test")
        order = ["cohort", "split", "method", UID, "vertebra", "share", "deletion", "insertion"]
        write_table(curves[order], folder / "perturbation.csv", sealed=True)
        return
    if not (hard / "train.csv").is_file():
        make_cohort(hard, HARD)
    stored = pd.read_csv(path, dtype={UID: str})
    stored = stored[stored["cohort"] == "builtin"]
    cuts = stored.groupby("method", sort=False)["iou_quantile"].first().to_dict()
    labels = read_labels(hard / "train.csv")
    samples = expand(labels, labels[UID]).query("label == 1").reset_index(drop=True)
    truth = fracture_truth(hard, samples)
    seen = truth.any(axis=(1, 2, 3))  # thick slices may pass a hairline by
    if not seen.all():
        print(f"{(~seen).sum()} of {len(seen)} hard fractures are on none of their sequence's slices")
    samples, truth = samples[seen].reset_index(drop=True), truth[seen]
    maps = dict(sequence_maps("builtin", hard / "packed", samples))
    rows = score_sequences("hard", "test", samples, truth, maps, cuts)
    write_table(pd.concat([stored, rows]), path, sealed=True)


def measure_fracatlas() -> None:
    """Tables of the run on FracAtlas, in the network's frames; portrait and landscape are judged together."""
    run, cohort = load_radiograph_run(run_dir("fracatlas")), read_radiograph_cohort(cohort_dir("fracatlas"))
    folder = run_dir("fracatlas") / MEASURED
    cuts: dict[str, float] = {}
    parts = []
    for split in ("validation", "test"):
        groups = [outlined(group) for group in framed(cohort, cohort.of(split).query("label == 1"))]
        maps = [radiograph_maps(run, group) for group in groups]
        for method in maps[0][0]:
            pairs = [(its[method], group, rows) for (its, rows), group in zip(maps, groups, strict=True)]
            if split == "validation":
                each = np.concatenate([iou_at(values, group.truth) for values, group, _ in pairs])
                cuts[method] = QUANTILES[each.mean(axis=0).argmax()]
            how: dict[str, Any] = {"tolerance": RADIOGRAPH_TOLERANCE, "iou_quantile": cuts[method]}
            for values, group, rows in pairs:
                found = pd.concat([rows, localise(values, group.truth, **how).round(4)], axis=1)
                parts.append(found.assign(split=split, method=method, iou_quantile=cuts[method]))
    scores = [name for name in METRICS if name != "auroc_inside"]
    order = [
        "cohort",
        "split",
        "method",
        "image",
        "patient",
        "probability",
        *scores,
        "chance",
        "iou_quantile",
    ]
    write_table(pd.concat(parts).assign(cohort="fracatlas")[order], folder / "maps.csv", sealed=True)
    curves = [
        radiograph_curves(run, group, its, rows) for group, (its, rows) in zip(groups, maps, strict=True)
    ]
    table = pd.concat(curves).assign(cohort="fracatlas", split="test")
    order = ["cohort", "split", "method", "image", "patient", "share", "deletion", "insertion"]
    write_table(table[order], folder / "perturbation.csv", sealed=True)


def outlined(group: Framed) -> Framed:
    """The radiographs with an outline in their frame."""
    kept = group.truth.any(axis=(1, 2))
    return Framed(group.rows[kept].reset_index(drop=True), group.pixels[kept], group.truth[kept])


def radiograph_maps(run: Run, group: Framed) -> tuple[Maps, pd.DataFrame]:
    """Maps of radiographs by name, trivial ones too; image, patient and probability of each."""
    found: Maps = trivial_maps(group.pixels)
    for method in (*RADIOGRAPHS_MAPPED, "mask"):
        its = map_radiographs(run, group.pixels, method=method)
        found[OWN_MASK if method == "mask" else method] = its.pixels()
        print(group.pixels.shape, method, flush=True)
    rows = group.rows[["image", "patient"]].assign(probability=its.probability.round(4))
    return found, rows.reset_index(drop=True)


def radiograph_curves(run: Run, group: Framed, maps: Maps, rows: pd.DataFrame) -> pd.DataFrame:
    """Deletion and insertion of the first radiographs of a group."""
    network = run.model.folded()

    def probability(these: torch.Tensor, _: slice) -> torch.Tensor:
        with as_on_a_cpu(these.device):
            return network(these).logit.double().sigmoid()

    few = slice(0, round(PERTURBED * len(rows)))
    parts = []
    for method in PERTURBED_METHODS:
        curves = perturbation_curves(
            probability, group.pixels[few], maps[method][few], shares=FEW_SHARES
        ).round(4)
        named = rows.loc[curves["case"], ["image", "patient"]].reset_index(drop=True)
        parts.append(pd.concat([named, curves.drop(columns="case")], axis=1).assign(method=method))
        print("perturbed", group.pixels.shape, method, flush=True)
    return pd.concat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("builtin", "hard", "fracatlas"))
    parser.add_argument("--cohort", type=Path, help="where the hard phantoms are, or go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "fracatlas":
        measure_fracatlas()
    elif options.what == "builtin":
        measure_builtin(None)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            measure_builtin(options.cohort or Path(temporary) / "hard")


if __name__ == "__main__":
    main()
