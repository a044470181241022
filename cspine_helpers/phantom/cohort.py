"""The built-in cohort: synthetic CT of the cervical spine in Hounsfield units, with the truth known.

Every study is drawn from (cohort seed, study index) alone, so the cohort is the same whatever the number of
workers. It stands in for real data where there is none; it is no evidence about patients.

    python -m cspine_helpers phantom --cohort builtin
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cspine_helpers import labels, packed
from cspine_helpers.files import paths
from cspine_helpers.files.records import parse_json
from cspine_helpers.packed import write_manifest
from cspine_helpers.packing.crop import PackConfig, manifest_row, pack_vertebra
from cspine_helpers.phantom.rendering import Study, generator, render_study, study_uid

MADE_BY = "cspine_helpers.phantom"
PHANTOM_VERSION = 1  # raised by hand when the same seed would give other phantoms, or other packed arrays
_REMEDY = "Move the cohort aside, and make it again."
MIN_FRACTURE_VOXELS = 6  # fewer in a slice cannot be seen, and do not make it a fractured slice


@dataclass(frozen=True)
class CohortConfig:
    """A cohort of phantoms: how many studies, and the seed they are drawn from."""

    studies: int
    seed: int
    pack: PackConfig = field(default_factory=lambda: PackConfig(size=64, margin_mm=2.5))

    def __post_init__(self) -> None:
        """Refuse an empty cohort, and a seed that is negative or too long for a UID."""
        if self.studies < 1 or not 0 <= self.seed < 2**63:
            raise ValueError(
                f"A cohort has 1 study or more and a seed from 0 to 2^63 - 1; found {self.studies} studies "
                f"and the seed {self.seed}. Correct them."
            )


COHORTS = {"builtin": CohortConfig(studies=360, seed=2022), "quick": CohortConfig(studies=30, seed=7)}


def fracture_patterns() -> pd.DataFrame:
    """How often each pattern of fractured vertebrae occurs in RSNA 2022: C1 … C7 (0/1) and studies.

    Source: Cervical Spine Fracture Detection Dataset, Copyright RSNA, 2023 (2,019 labelled studies).
    """
    with resources.files("cspine_helpers.phantom").joinpath("rsna2022_fracture_patterns.csv").open() as file:
        return pd.read_csv(file)


def draw_labels(config: CohortConfig) -> pd.DataFrame:
    """The cohort's label table: joint patterns drawn as RSNA 2022 has them, one row a study."""
    patterns = fracture_patterns()
    share = patterns["studies"] / patterns["studies"].sum()
    rows = [
        patterns.loc[generator(config.seed, i, 0).choice(len(patterns), p=share), list(labels.VERTEBRAE)]
        for i in range(config.studies)
    ]
    table = pd.DataFrame(rows).reset_index(drop=True).astype(int)
    table.insert(0, labels.PATIENT, table.max(axis=1))
    table.insert(0, labels.UID, [study_uid(config.seed, i) for i in range(config.studies)])
    return table


def make_cohort(folder: Path, config: CohortConfig, *, workers: int | None = None) -> None:
    """Render and pack a cohort: `train.csv`, `train_bounding_boxes.csv`, `packed/` and `cohort.json`.

    A folder that this very code and config made is left as it is. The cohort is built beside its place and
    moved there when complete.

    Args:
        folder: where it goes, `data/<cohort>`.
        config: what to make.
        workers: processes; default one a core. They change nothing but the time.

    Raises:
        BlockingIOError: another process makes it.
        FileExistsError: the folder holds something that is not a phantom cohort.
    """
    with paths.exclusive(folder.with_name(f".{folder.name}.lock"), f"making {folder}"):
        record = _record(config)
        if folder.exists():
            _check_ours(folder)
            if _read_record(folder) == record:
                print(f"{folder.name}: {config.studies} studies are there already.")
                return
        for unfinished in folder.parent.glob(f".{folder.name}-*"):  # by a process that was killed
            shutil.rmtree(unfinished)
        _make(folder, config, record, workers)


def _make(folder: Path, config: CohortConfig, record: dict, workers: int | None) -> None:
    """The cohort, beside its place and then there."""
    import joblib  # here alone: notebooks that only look at a phantom need not wait for it

    table = draw_labels(config)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / folder.name
        job = joblib.delayed(_make_study)
        jobs = [job(config, i, table.loc[i, list(labels.VERTEBRAE)].to_dict(), new) for i in table.index]
        parallel = joblib.Parallel(n_jobs=workers or os.cpu_count(), return_as="generator")
        made = list(
            tqdm(parallel(jobs), total=len(jobs), desc=f"cohort {folder.name}", unit="study", mininterval=1)
        )
        write_manifest(pd.DataFrame([row for rows, _ in made for row in rows]), new / "packed")
        labels.write_labels(table, new / "train.csv")
        boxes = pd.DataFrame([box for _, found in made for box in found], columns=list(labels.BOX_COLUMNS))
        labels.write_boxes(boxes, new / "train_bounding_boxes.csv")
        paths.write_checksums(new / "packed")
        (new / "cohort.json").write_text(json.dumps(record, indent=2) + "\n")
        if folder.exists():
            if (folder / "train.csv").read_bytes() == (new / "train.csv").read_bytes():
                for split in folder.glob("split.*"):  # the same patients: their split stays
                    shutil.copy2(split, new)
            folder.rename(Path(temporary) / "old")
        new.rename(folder)


def _check_ours(folder: Path) -> None:
    """Refuse to replace a folder that this module did not make, or that holds more than it made."""
    made = {"cohort.json", "train.csv", "train_bounding_boxes.csv", "packed"}
    made |= {"split.csv", "split.csv.sha256", "split.json"}
    if not (folder / "cohort.json").is_file() or _read_record(folder).get("made_by") != MADE_BY:
        raise FileExistsError(
            f"{folder} exists and is no phantom cohort. Choose another cohort name, or move it."
        )
    if strangers := sorted(path.name for path in folder.iterdir() if path.name not in made):
        raise FileExistsError(
            f"{folder} holds more than its cohort: {paths.listing(strangers)}. Move it elsewhere."
        )


def _make_study(
    config: CohortConfig, index: int, fractured: dict[str, int], folder: Path
) -> tuple[list, list]:
    study = render_study(config.seed, index, fractured)
    return pack_study(study, folder / "packed", config.pack), fracture_boxes(study)


def study_of(folder: Path, uid: str) -> Study:
    """The CT of one study of a phantom cohort, rendered again (a cohort keeps the packed sequences only).

    Raises:
        FileNotFoundError: the folder is no phantom cohort.
        ValueError: the cohort has no such study.

    Example:
        >>> study_of(cohort_dir("builtin"), uid).volume_hu.dtype.name  # doctest: +SKIP
        'float32'
    """
    if not (folder / "cohort.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no phantom cohort: it has no cohort.json. Its CT is not made here."
        )
    config = _read_record(folder).get("config")
    seed = config.get("seed") if isinstance(config, dict) else None
    if not isinstance(seed, int):
        raise ValueError(f"{folder / 'cohort.json'} has no seed; found {seed!r}. {_REMEDY}")
    table = labels.read_labels(folder / "train.csv").set_index(labels.UID)
    number = uid.rpartition(".")[2]
    if uid not in table.index or not number.isdigit() or study_uid(seed, int(number) - 1) != uid:
        raise ValueError(f"{folder.name} has no phantom {uid!r}; its first study is {table.index[0]}.")
    row = table.loc[[uid], list(labels.VERTEBRAE)].to_numpy()[0]
    fractured = dict(zip(labels.VERTEBRAE, row.tolist(), strict=True))
    return render_study(seed, int(number) - 1, fractured)


def _read_record(folder: Path) -> dict:
    """`cohort.json` as it is.

    Raises:
        ValueError: it is no JSON object.
    """
    path = folder / "cohort.json"
    found = parse_json(path.read_bytes(), str(path), remedy=_REMEDY)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object. {_REMEDY}")
    return found


def _record(config: CohortConfig) -> dict:
    """What made a cohort: its config and `PHANTOM_VERSION`; one of an older version is made again."""
    return json.loads(json.dumps({"made_by": MADE_BY, "version": PHANTOM_VERSION, "config": asdict(config)}))


def pack_study(study: Study, folder: Path, config: PackConfig) -> list[dict]:
    """Write a study's seven packed sequences and return their manifest rows."""
    config = replace(config, window_hu=study.window_hu)
    rows = []
    for number, vertebra in enumerate(labels.VERTEBRAE, start=1):
        piece = pack_vertebra(study.volume_hu, study.label_map, study.spacing_mm, vertebra, config)
        packed.write_sequence(folder, study.uid, vertebra, piece.array)
        voxels = (study.fracture_map[piece.slice_indices] == number).sum(axis=(1, 2))
        truth = "".join(".x"[int(n >= MIN_FRACTURE_VOXELS)] for n in voxels)
        rows.append(manifest_row(study.uid, vertebra, piece, study.spacing_mm, config, truth))
    return rows


def fracture_boxes(study: Study) -> list[dict]:
    """Boxes around fractured bone, one a vertebra and axial slice: x, y, width, height in voxels."""
    boxes = []
    for index, plane in enumerate(study.fracture_map):
        for number in np.unique(plane[plane > 0]):
            ys, xs = np.nonzero(plane == number)
            if ys.size >= MIN_FRACTURE_VOXELS:
                x, y = float(xs.min()), float(ys.min())
                values = (study.uid, x, y, float(np.ptp(xs) + 1), float(np.ptp(ys) + 1), index)
                boxes.append(dict(zip(labels.BOX_COLUMNS, values, strict=True)))
    return boxes
