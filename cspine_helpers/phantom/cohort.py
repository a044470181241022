"""Cohorts of phantoms: synthetic CT of the cervical spine in Hounsfield units, with the truth known.

Every study is drawn from (cohort seed, study index) alone, so the cohort is the same whatever the number of
workers. It stands in for real data where there is none; it is no evidence about patients.

    python -m cspine_helpers phantom --cohort builtin
    python -m cspine_helpers phantom --cohort weak --studies 360 --seed 2022 --truth rsna

The second are the patients of the first, known as RSNA 2022 is known. A run trained on them is judged by what
is true of them (`true_labels`, `true_slice_truth`), which their files do not say.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cspine_helpers import labels, packed
from cspine_helpers.files import paths
from cspine_helpers.files.records import parse_json
from cspine_helpers.packed import PackedVertebra, write_manifest
from cspine_helpers.packing.crop import PackConfig, manifest_row, pack_vertebra, packed_voxels
from cspine_helpers.packing.slice_truth import packed_truth, read_packed_boxes
from cspine_helpers.phantom.difficulty import Hard
from cspine_helpers.phantom.rendering import Study, generator, render_study, study_uid
from cspine_helpers.phantom.weak_truth import WeakTruth, framed, has_boxes, segmented, wrong_labels

MADE_BY = "cspine_helpers.phantom"
PHANTOM_VERSION = 2  # raised by hand when the same seed would give other phantoms, or other packed arrays
_REMEDY = "Move the cohort aside, and make it again."
SCHEMATIC = "Schematic: a phantom"  # said below its pictures
MIN_FRACTURE_VOXELS = 6  # fewer in a slice cannot be seen, and do not make it a fractured slice
Truth = Literal["full", "rsna"]
Difficulty = Literal["standard", "hard"]
_WEAK, _HARD = WeakTruth(), Hard()


@dataclass(frozen=True)
class CohortConfig:
    """A cohort of phantoms.

    Attributes:
        studies: how many.
        seed: that they are drawn from; the same phantoms whatever is known of them.
        pack: how their vertebrae are cut out.
        truth: what the cohort's files know: "full", each label and each slice; "rsna", what RSNA 2022's
            know, see `weak_truth`. What is true of these nobody reads in the cohort: it takes `true_labels`
            and `true_slice_truth`.
        difficulty: of the scans: "standard", or "hard" to read, see `difficulty`.
        like: a cohort of `data/` whose label table gives the labels, row by row, and whose boxes say which
            studies have some (of "rsna" truth; no label is made wrong). None: labels are drawn. The studies
            have UIDs of their own: no phantom goes by the name of a patient.

    Example:
        >>> CohortConfig(studies=360, seed=2022, truth="rsna").pack.size
        64
    """

    studies: int
    seed: int
    pack: PackConfig = field(default_factory=lambda: PackConfig(size=64, margin_mm=2.5))
    truth: Truth = "full"
    difficulty: Difficulty = "standard"
    like: str | None = None

    def __post_init__(self) -> None:
        """Refuse an empty cohort, a seed that is negative or too long for a UID, and unknown words."""
        for name, words in (("truth", get_args(Truth)), ("difficulty", get_args(Difficulty))):
            if getattr(self, name) not in words:
                found = getattr(self, name)
                raise ValueError(f"{name} is one of {', '.join(words)}; found {found!r}. Choose one.")
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
    """The label table of the cohort's files, one row a study; of weak truth, a few labels are wrong."""
    return _table(config, [patient.labelled for patient in _patients(config)])


def true_labels(config: CohortConfig) -> pd.DataFrame:
    """What is true of the same studies: joint patterns drawn as RSNA 2022 has them, one row a study.

    For tests and benchmarks of weak truth. Of full truth it is `draw_labels`.

    Example:
        >>> weak = CohortConfig(studies=40, seed=1, truth="rsna")
        >>> int((true_labels(weak) != draw_labels(weak)).to_numpy().sum())
        2
    """
    return _table(config, [patient.fractured for patient in _patients(config)])


@dataclass(frozen=True)
class _Patient:
    """One study of a cohort, before it is rendered.

    Attributes:
        index: in the cohort.
        fractured: what is true of C1–C7, 0 or 1.
        labelled: what the label table says.
        is_boxed: whether its boxes are known.
    """

    index: int
    fractured: dict[str, int]
    labelled: dict[str, int]
    is_boxed: bool


def _patients(config: CohortConfig) -> list[_Patient]:
    """All studies of a cohort.

    Raises:
        FileNotFoundError: the cohort whose labels they take has none.
        ValueError: it has fewer studies.
    """
    if config.like is None:
        return [_patient(config, index) for index in range(config.studies)]
    source = paths.cohort_dir(config.like)
    table, boxes = labels.read_labels(source / "train.csv"), source / "train_bounding_boxes.csv"
    boxed = {*labels.read_boxes(boxes)[labels.UID]} if boxes.is_file() else set()
    if config.studies > len(table):
        raise ValueError(f"{config.like} has {len(table)} studies; found {config.studies}. Ask for fewer.")
    its, found = table.set_index(labels.UID)[list(labels.VERTEBRAE)].head(config.studies), []
    for index, (uid, values) in enumerate(zip(its.index, its.to_numpy().tolist(), strict=True)):
        row = dict(zip(labels.VERTEBRAE, values, strict=True))
        found.append(_Patient(index, row, row, config.truth == "full" or uid in boxed))
    return found


def _patient(config: CohortConfig, index: int) -> _Patient:
    patterns, share = _patterns()
    row = patterns[generator(config.seed, index, 0).choice(len(patterns), p=share)]
    true = dict(zip(labels.VERTEBRAE, row.tolist(), strict=True))
    if config.truth == "full":
        return _Patient(index, true, true, is_boxed=True)
    rng = generator(config.seed, index, 2)
    labelled = wrong_labels(true, _WEAK, rng)
    return _Patient(index, true, labelled, has_boxes(labelled, _WEAK, rng))


@cache
def _patterns() -> tuple[np.ndarray, np.ndarray]:
    """Patterns (N, 7) of fractured vertebrae, and how common each is (N,)."""
    table = fracture_patterns()
    return table[list(labels.VERTEBRAE)].to_numpy(), (table["studies"] / table["studies"].sum()).to_numpy()


def _table(config: CohortConfig, rows: list[dict[str, int]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=list(labels.VERTEBRAE)).astype(int)
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

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / folder.name
        job = joblib.delayed(_make_study)
        jobs = [job(config, patient, new) for patient in _patients(config)]
        parallel = joblib.Parallel(n_jobs=workers or os.cpu_count(), return_as="generator")
        made = list(
            tqdm(parallel(jobs), total=len(jobs), desc=f"cohort {folder.name}", unit="study", mininterval=1)
        )
        write_manifest(pd.DataFrame([row for rows, _ in made for row in rows]), new / "packed")
        labels.write_labels(draw_labels(config), new / "train.csv")
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


def _make_study(config: CohortConfig, patient: _Patient, folder: Path) -> tuple[list, list]:
    """Write a study's sequences; returns its rows of the manifest, and its boxes."""
    study = _study(config, patient)
    pieces, boxes = _pieces(study, config.pack), fracture_boxes(study) if patient.is_boxed else []
    truth = (
        _true_slices(study, pieces)
        if config.truth == "full"
        else _known_slices(study, pieces, patient, boxes)
    )
    return _write(study, pieces, truth, folder / "packed", config.pack), boxes


def _study(config: CohortConfig, patient: _Patient) -> Study:
    """A study, with the label map that it is packed with."""
    hard = _HARD if config.difficulty == "hard" else None
    study = render_study(config.seed, patient.index, patient.fractured, hard=hard)
    if config.truth == "full":
        return study
    return replace(study, label_map=segmented(study, _WEAK, generator(config.seed, patient.index, 3)))


def study_of(folder: Path, uid: str) -> Study:
    """The CT of one study of a phantom cohort, rendered again (a cohort keeps the packed sequences only).

    Raises:
        FileNotFoundError: the folder is no phantom cohort.
        ValueError: the cohort has no such study.

    Example:
        >>> study_of(cohort_dir("builtin"), uid).volume_hu.dtype.name  # doctest: +SKIP
        'float32'
    """
    config = read_config(folder)
    return _study(config, _find(folder, config, uid))


def pieces_of(folder: Path, study: Study) -> dict[str, PackedVertebra]:
    """Vertebra → its sequence as the cohort has it packed, and where in the study's CT that was cut.

    Args:
        folder: the cohort, `data/<cohort>`.
        study: of `study_of`.

    Raises:
        FileNotFoundError, ValueError: as `read_config`.
    """
    return _pieces(study, read_config(folder).pack)


def true_slice_truth(folder: Path, studies: Collection[str], *, workers: int | None = None) -> pd.DataFrame:
    """Which slices of a phantom cohort's sequences show fractured bone, whatever the cohort knows.

    For tests and benchmarks of weak truth. Studies are rendered again, which takes as long as making them.

    Args:
        folder: the cohort, `data/<cohort>`.
        studies: StudyInstanceUIDs.
        workers: processes; default one a core.

    Returns:
        StudyInstanceUID, vertebra, and slice_truth as in the manifest; seven rows a study.

    Raises:
        FileNotFoundError, ValueError: as `study_of`.

    Example:
        >>> true_slice_truth(cohort_dir("weak"), uids)["slice_truth"][0]  # doctest: +SKIP
        '.....xxxx......'
    """
    import joblib

    config = read_config(folder)
    job = joblib.delayed(_true_slices_of)
    jobs = [job(config, _find(folder, config, uid)) for uid in studies]
    found = joblib.Parallel(n_jobs=workers or os.cpu_count())(jobs)
    rows = [
        (uid, level, text) for uid, its in zip(studies, found, strict=True) for level, text in its.items()
    ]
    return pd.DataFrame(rows, columns=[labels.UID, "vertebra", "slice_truth"])


def _true_slices_of(config: CohortConfig, patient: _Patient) -> dict[str, str]:
    study = _study(config, patient)
    return _true_slices(study, _pieces(study, config.pack))


def fracture_truth(
    folder: Path, samples: pd.DataFrame, *, workers: int | None = None, neighbour: bool = False
) -> np.ndarray:
    """Where packed sequences of a phantom cohort show broken bone, pixel by pixel: what maps are judged by.

    Studies are rendered again, half a second to a second each. A pixel is broken where broken bone covers a
    quarter of it or more on the position's own slice, which is channel 2 of the five.

    Args:
        folder: the cohort, `data/<cohort>`.
        samples: StudyInstanceUID and vertebra of the sequences, such as the fractured ones of a split.
        workers: processes; default one a core.
        neighbour: mark the broken bone of other vertebrae that the crop shows, instead of the vertebra's own.

    Returns:
        uint8 (N, T, H, W) of 0 and 1, in the samples' order.

    Raises:
        FileNotFoundError, ValueError: as `study_of`; also where there are no samples.

    Example:
        >>> fracture_truth(Path("data/of_patients"), cohort.samples["test"])
        Traceback (most recent call last):
        ...
        FileNotFoundError: data/of_patients is no phantom cohort: it has no cohort.json...
    """
    which = "fractures of others" if neighbour else "own fracture"
    return _in_packed_frame(folder, samples, which, least_share=0.25, workers=workers)


def fracture_marks(folder: Path, uid: str, vertebra: str) -> dict[str, Any]:
    """What is known of where a packed sequence shows broken bone, as `figures.sequence_montage` takes it.

    Args:
        folder: the cohort, `data/<cohort>`.
        uid: StudyInstanceUID.
        vertebra: C1 … C7.

    Returns:
        Of a phantom `fracture` and `neighbours`, each uint8 (T, H, W): the vertebra's own broken bone and
        that of others in its crop; and a `note` that this is a phantom. Of patients `boxes`, those that
        readers drew around the vertebra's own; nothing where the cohort was packed without any.

    Raises:
        ValueError: the cohort has no such phantom, or its table of boxes is not the one that was written.

    Example:
        >>> fracture_marks(Path("a cohort without boxes"), "1.2.3", "C2")
        {}
    """
    if (folder / "cohort.json").is_file():
        one = pd.DataFrame({labels.UID: [uid], "vertebra": [vertebra]})
        marks = {
            name: fracture_truth(folder, one, workers=1, neighbour=others)[0]
            for name, others in (("fracture", False), ("neighbours", True))
        }
        return marks | {"note": SCHEMATIC}
    path = folder / "packed" / "boxes.csv"
    if not path.is_file():
        return {}
    boxes = read_packed_boxes(path)
    return {"boxes": boxes[(boxes[labels.UID] == uid) & (boxes["vertebra"] == vertebra)]}


def neighbour_masks(folder: Path, samples: pd.DataFrame, *, workers: int | None = None) -> np.ndarray:
    """Where packed sequences of a phantom cohort show other vertebrae than their own.

    Args:
        folder: the cohort, `data/<cohort>`.
        samples: StudyInstanceUID and vertebra of the sequences.
        workers: processes; default one a core.

    Returns:
        uint8 (N, T, H, W) of 0 and 1, in the samples' order.

    Raises:
        FileNotFoundError, ValueError: as `fracture_truth`.
    """
    return _in_packed_frame(folder, samples, "other vertebrae", least_share=0.5, workers=workers)


_VOXELS = {  # study and number of a vertebra → which voxels, (Z, Y, X)
    "own fracture": lambda study, number: study.fracture_map == number,
    "fractures of others": lambda study, number: (study.fracture_map > 0) & (study.fracture_map != number),
    "other vertebrae": lambda study, number: (study.label_map > 0) & (study.label_map != number),
}


def _in_packed_frame(
    folder: Path, samples: pd.DataFrame, which: str, *, least_share: float, workers: int | None
) -> np.ndarray:
    """One of `_VOXELS` as the packed sequences show it, uint8 (N, T, H, W)."""
    import joblib

    if samples.empty:
        raise ValueError("There is no sample whose voxels could be looked up. Give one or more.")
    config = read_config(folder)
    levels = {str(uid): [*its] for uid, its in samples.groupby(labels.UID, sort=False)["vertebra"]}
    job = joblib.delayed(_packed_pixels)
    jobs = [job(config, _find(folder, config, uid), its, which, least_share) for uid, its in levels.items()]
    many = min(workers or os.cpu_count() or 1, len(jobs))
    found = zip(levels, joblib.Parallel(n_jobs=many)(jobs), strict=True)
    by_sample = {(uid, level): pixels for uid, its in found for level, pixels in its.items()}
    return np.stack(
        [by_sample[sample] for sample in zip(samples[labels.UID], samples["vertebra"], strict=True)]
    )


def _packed_pixels(
    config: CohortConfig, patient: _Patient, levels: list[str], which: str, least_share: float
) -> dict[str, np.ndarray]:
    """Vertebra → uint8 (T, H, W), see `_in_packed_frame`."""
    study = _study(config, patient)
    pieces, found = _pieces(study, config.pack), {}
    for level in levels:
        voxels = _VOXELS[which](study, labels.VERTEBRAE.index(level) + 1)
        found[level] = packed_voxels(voxels, pieces[level], config.pack.size, least_share=least_share)
    return found


def _find(folder: Path, config: CohortConfig, uid: str) -> _Patient:
    """The patient of a study.

    Raises:
        ValueError: the cohort has no such study.
    """
    table = labels.read_labels(folder / "train.csv").set_index(labels.UID)[list(labels.VERTEBRAE)]
    number = uid.rpartition(".")[2]
    if uid not in table.index or not number.isdigit() or study_uid(config.seed, int(number) - 1) != uid:
        raise ValueError(f"{folder.name} has no phantom {uid!r}; its first study is {table.index[0]}.")
    if config.like is None:
        return _patient(config, int(number) - 1)
    row = dict(zip(labels.VERTEBRAE, table.loc[[uid]].to_numpy()[0].tolist(), strict=True))
    return _Patient(int(number) - 1, row, row, is_boxed=False)  # who asks for one study wants no boxes


def read_config(folder: Path) -> CohortConfig:
    """What a cohort was made with, by its `cohort.json`.

    Raises:
        FileNotFoundError: the folder is no phantom cohort.
        ValueError: its record does not say it.
    """
    if not (folder / "cohort.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no phantom cohort: it has no cohort.json. Its CT is not made here."
        )
    found: Any = _read_record(folder).get("config")
    try:
        pack = PackConfig(**{**found["pack"], "window_hu": tuple(found["pack"]["window_hu"])})
        return CohortConfig(**{**found, "pack": pack})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'cohort.json'} does not say what made the cohort; found {found!r:.200}. {_REMEDY}"
        ) from error


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


def _record(config: CohortConfig) -> dict[str, Any]:
    """What made a cohort: its config and `PHANTOM_VERSION`; one of an older version is made again.

    What is full and standard is not named, as when there was nothing else: those cohorts stay as they are.
    """
    its = asdict(config)
    record = {"made_by": MADE_BY, "version": PHANTOM_VERSION, "config": its}
    for name, usual, key, parameters in (
        ("truth", "full", "weak_truth", _WEAK),
        ("difficulty", "standard", "hard", _HARD),
    ):
        if its[name] == usual:
            del its[name]
        else:
            record[key] = asdict(parameters)
    if config.like is None:
        del its["like"]
    else:
        table = paths.cohort_dir(config.like) / "train.csv"
        labels.read_labels(table)  # says what to do where there is none
        record["labels_sha256"] = paths.sha256_of(table)
    return json.loads(json.dumps(record))


def pack_study(study: Study, folder: Path, config: PackConfig) -> list[dict]:
    """Write a study's seven packed sequences and return their manifest rows, with what is true of slices."""
    pieces = _pieces(study, config)
    return _write(study, pieces, _true_slices(study, pieces), folder, config)


def _pieces(study: Study, config: PackConfig) -> dict[str, PackedVertebra]:
    """Each vertebra, packed with the study's own window."""
    config = replace(config, window_hu=study.window_hu)
    its = (study.volume_hu, study.label_map, study.spacing_mm)
    return {vertebra: pack_vertebra(*its, vertebra, config) for vertebra in labels.VERTEBRAE}


def _true_slices(study: Study, pieces: dict[str, PackedVertebra]) -> dict[str, str]:
    """Slice truth of each vertebra, from its fractured voxels."""
    marks = {}
    for number, vertebra in enumerate(labels.VERTEBRAE, start=1):
        voxels = (study.fracture_map[pieces[vertebra].slice_indices] == number).sum(axis=(1, 2))
        marks[vertebra] = "".join(".x"[int(n >= MIN_FRACTURE_VOXELS)] for n in voxels)
    return marks


def _known_slices(
    study: Study, pieces: dict[str, PackedVertebra], patient: _Patient, boxes: list[dict]
) -> dict[str, str]:
    """The same as packing finds it, from labels and boxes; "" where they do not say it."""
    table = pd.DataFrame(boxes, columns=list(labels.BOX_COLUMNS))
    its = (table, framed(study), study.label_map, pieces)
    return packed_truth(*its, uid=study.uid, fractured=patient.labelled).slices


def _write(
    study: Study, pieces: dict[str, PackedVertebra], truth: dict[str, str], folder: Path, config: PackConfig
) -> list[dict]:
    """Write the sequences; returns their rows of the manifest."""
    config = replace(config, window_hu=study.window_hu)
    rows = []
    for vertebra, piece in pieces.items():
        packed.write_sequence(folder, study.uid, vertebra, piece.array)
        its = (study.uid, vertebra, piece, study.spacing_mm, config)
        rows.append(manifest_row(*its, truth[vertebra] or None))
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
