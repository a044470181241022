"""A cohort's CT studies, packed at once: what is done stays done, what fails is reported, the rest continues.

`PackSource` says where CT and masks lie, study by study.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import pandas as pd
from tqdm.auto import tqdm

from cspine_helpers.ct.dicom import series_in
from cspine_helpers.ct.masks import find_mask
from cspine_helpers.ct.nifti import NIFTI
from cspine_helpers.ct.volume import LIBRARIES, optional
from cspine_helpers.files import paths
from cspine_helpers.files.paths import cohort_remedy, listing
from cspine_helpers.files.records import SEAL, content_sha256, parse_json, write_sealed
from cspine_helpers.files.tables import read_columns, write_table
from cspine_helpers.labels import BOX_COLUMNS, UID, VERTEBRAE, exclusions, read_boxes, read_labels
from cspine_helpers.packed import MANIFEST_COLUMNS, PROVENANCE_COLUMNS, write_manifest
from cspine_helpers.packing.crop import PackConfig
from cspine_helpers.packing.slice_truth import PACKED_BOX_COLUMNS, write_packed_boxes
from cspine_helpers.packing.study import (
    StudyFiles,
    pack_study,
    packer_version,
    read_study,
    sentence,
    set_aside,
)

REPORT_COLUMNS = (UID, "status", "sequences", "message")
_FORMULA = r"^[=+\-@\t\r']"  # what makes a cell one, and what says that it is none
SETTINGS = "packing.json"
_UNFINISHED = re.compile(r"\..+(\.\w+)\.\w{8}\1")  # by paths.atomic_path: .1.2.3_1.npy.a1b2c3d4.npy
DIED = "its process was killed, often for want of memory; try it alone, or with fewer workers"


@dataclass(frozen=True)
class PackSource:
    """Where a cohort's CT and masks are, and how they are read.

    Attributes:
        images: folder of studies: a folder with a DICOM series, or a NIfTI file, for each StudyInstanceUID.
        masks: folder of masks: `<uid>.nii[.gz]`, or a folder `<uid>` with one file a vertebra.
        scheme: what the masks' labels mean, see `masks.read_label_map`.
        series: StudyInstanceUID → SeriesInstanceUID, of studies that hold several series.
        exclude: studies that are not packed, such as scans known to be bad.

    Example:
        >>> PackSource.of(Path("data/rsna2022"), scheme="totalsegmentator").masks.name
        'segmentations'
    """

    images: Path
    masks: Path
    scheme: str | Mapping[int, str] = "rsna"
    series: Mapping[str, str] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path, **others: Any) -> Self:
        """As RSNA 2022 lays them out in a cohort's folder: `train_images/` and `segmentations/`.

        Without the studies of its `exclude.txt`, where there is one.
        """
        others = {"exclude": tuple(exclusions(folder))} | others
        return cls(folder / "train_images", folder / "segmentations", **others)

    def studies(self, only: Collection[str] | None = None) -> dict[str, Path]:
        """StudyInstanceUID → its folder or file, in order: of these studies, or of all not excluded.

        Raises:
            FileNotFoundError: there are none.
            ValueError: one is there twice, asked for and not there, or all are excluded.
        """
        there = self._there()
        found = {uid: path for uid, path in there.items() if uid not in self.exclude}
        if there and not found:
            raise ValueError(
                f"All {len(there)} studies in {self.images} are excluded: {listing(there)}. Shorten the list "
                "(exclude.txt in the cohort's folder, or the one of --exclude)."
            )
        if not found:
            raise FileNotFoundError(
                f"No study in {self.images}: it needs a folder with a DICOM series, or a NIfTI file, for "
                f"each StudyInstanceUID. {_remedy(self.images.parent)}"
            )
        if gone := {*(only or ())} - {*found}:
            raise ValueError(f"No CT in {self.images} of {listing(sorted(gone))}. Check the names.")
        return found if only is None else {uid: path for uid, path in found.items() if uid in only}

    def _there(self) -> dict[str, Path]:
        """The same of all in the folder, excluded or not."""
        found: dict[str, Path] = {}
        for path in sorted(self.images.iterdir()) if self.images.is_dir() else ():
            suffix = next((s for s in NIFTI if path.name.endswith(s)), "")
            is_study = path.is_dir() or suffix or path.is_symlink()  # one that leads nowhere will fail
            if not path.name.startswith(".") and is_study:
                uid = path.name.removesuffix(suffix)
                if uid in found:
                    raise ValueError(f"{path.name} and {found[uid].name} are one study. Keep one of them.")
                found[uid] = path
        return found


def pack_cohort(
    folder: Path,
    *,
    source: PackSource | None = None,
    config: PackConfig | None = None,
    sheets: Path | None = None,
    workers: int = -1,
    only: Collection[str] | None = None,
) -> pd.DataFrame:
    """Pack every study: sequences, `manifest.csv`, `boxes.csv`, `report.csv` and `SHA256SUMS` in `packed/`.

    Studies that are packed already (see `study`) are left as they are. On a cluster, the same call inside
    `joblib.parallel_config(backend="dask")` packs on a Dask client's workers, on a shared disk.

    Args:
        folder: `data/<cohort>`; `train.csv` and `train_bounding_boxes.csv` there are used where they are.
        source: CT and masks; default as RSNA 2022 lays them out in the folder.
        config: how vertebrae are cut out.
        sheets: folder for a contact sheet a study, `<StudyInstanceUID>.png`; None draws none.
        workers: processes, -1 for one a core.
        only: studies that are packed; tables keep what they hold of the others. None: all.

    Returns:
        The report, one row a study: status `packed`, `partial` (vertebrae are missing) or `failed`, number of
        sequences, and a message.

    Raises:
        FileNotFoundError: there is no study.
        ImportError: a library that reads CT is not installed.
        ValueError: a study is there twice or asked for and not there, a table of labels or boxes cannot be
            used, or `workers` is none; or `packed/` is a link out of the folder.
        FileExistsError: `packed/` holds sequences that were made elsewhere.
        BlockingIOError: another process packs this cohort.

    Example:
        >>> report = pack_cohort(Path("data/rsna2022"), workers=2)  # doctest: +SKIP
    """
    for library in LIBRARIES:
        optional(library)
    if workers == 0 or workers < -1:
        raise ValueError(f"workers is a number of processes, or -1 for one a core; found {workers}.")
    source, config = source or PackSource.of(folder), config or PackConfig()
    packed = paths.inside(folder / "packed")  # sources that are linked are never written to
    studies, asked = list(_study_files(source, folder)), source.studies(only)
    chosen = [study for study in studies if study.uid in asked]
    with paths.exclusive(folder / ".packing.lock", f"packing {folder.name}"):
        settings = {"config": asdict(config), "scheme": str(source.scheme), "packer": packer_version()}
        jobs = {its.uid: (its, packed, config, sheets and sheets / f"{its.uid}.png") for its in chosen}
        others = begin(packed, sheets, jobs, {study.uid for study in studies} - {*jobs}, settings)
        records = sorted(_records(jobs, folder.name, workers), key=lambda record: record["uid"])
        report = write_tables(records, others, settings, packed)
    labelled, there = {*_labels(folder)}, {*source._there()}
    known = labelled | there
    report.attrs["without_ct"] = sorted(labelled - there - {*source.exclude})
    report.attrs["excluded"] = [uid for uid in source.exclude if uid in known]
    report.attrs["unknown"] = [uid for uid in source.exclude if uid not in known]
    return report


def _study_files(source: PackSource, folder: Path) -> Iterator[StudyFiles]:
    """What each study is packed from; `mask` is the folder of masks, where it is looked for.

    Raises:
        FileNotFoundError: there are no studies, or no folder of masks.
        ValueError: a study is there twice, or a table breaks its schema.
    """
    studies = source.studies()
    if not source.masks.is_dir():
        raise FileNotFoundError(
            f"No folder of masks at {source.masks}. README says how to make masks, or name their folder."
        )
    known, boxes = _labels(folder), folder / "train_bounding_boxes.csv"
    none = pd.DataFrame(columns=list(BOX_COLUMNS))
    boxes_of = dict(iter(read_boxes(boxes).groupby(UID))) if boxes.is_file() else {}
    for uid, path in studies.items():
        series, its = source.series.get(uid), boxes_of.get(uid, none)
        yield StudyFiles(uid, path, source.masks, source.scheme, series, known.get(uid), its)


def _labels(folder: Path) -> dict[str, dict[str, int]]:
    """Study → vertebra → label, where the cohort has a label table."""
    table = folder / "train.csv"
    if not table.is_file():
        return {}
    known = read_labels(table).set_index(UID)[list(VERTEBRAE)]
    return dict(zip(known.index, known.to_dict("records"), strict=True))


def choose_series(studies: Mapping[str, Path], wanted: Collection[str]) -> dict[str, str]:
    """Study → which of the wanted series is in its folder; see `PackSource`.

    Args:
        studies: StudyInstanceUID → folder or file.
        wanted: series as `dicom.read_series` takes them; their files are looked for in all headers.

    Raises:
        ValueError: a series is nowhere, or a study holds several of them; names these.
    """
    chosen: dict[str, str] = {}
    for uid, folder in studies.items():
        try:
            found = series_in(folder) if folder.is_dir() else set()
        except (OSError, ValueError):
            continue  # packing it says why
        its = sorted(one for one in wanted if one.partition("#")[0] in found)
        if len(its) > 1:
            raise ValueError(f"Study {uid} holds {len(its)} of these series: {listing(its)}. Choose one.")
        if its:
            chosen[uid] = its[0]
    if lost := sorted({*wanted} - {*chosen.values()}):
        raise ValueError(f"Series that no study holds ({len(lost)}): {listing(lost)}. Check their UIDs.")
    return chosen


def _remedy(folder: Path) -> str:
    """What to do where a cohort has no CT; one of phantoms that has been made has none on disk."""
    if not (folder / "cohort.json").is_file():
        return cohort_remedy(folder)
    return (
        f"The phantom cohort {folder.name} has no CT on disk. Notebook 00 exports some of it to "
        f"data/{folder.name}_ct and packs them; again by `make pack COHORT={folder.name}_ct`."
    )


def begin(
    packed: Path, sheets: Path | None, uids: Iterable[str], others: Set[str], settings: Mapping[str, Any]
) -> set[str]:
    """Make sure of the folder, and set aside what belongs to no study of it, or to other settings.

    Returns:
        Which of the other studies, that are not packed in this run, stay: none after other settings.

    Raises:
        FileExistsError: the folder holds sequences that this module did not write.
    """
    records = packed / "studies"
    if packed.is_dir() and not records.is_dir() and any(packed.glob("[!.]*")):
        raise FileExistsError(
            f"{packed} holds sequences that were not packed here. Move it aside to pack the CT, or leave it "
            "as it is."
        )
    records.mkdir(parents=True, exist_ok=True)
    for left in (path for where in (packed, records, sheets) if where for path in where.glob(".*")):
        if _UNFINISHED.fullmatch(left.name):  # by a process that was killed
            left.unlink()
    stay = set(others) if (packed / "report.csv").is_file() else set()
    try:
        found = parse_json((packed / SETTINGS).read_bytes(), SETTINGS)
    except (FileNotFoundError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get(SEAL) != content_sha256(
        settings
    ):  # tables of other sequences
        stay = set()
        tables = (f"{name}.csv{end}" for name in ("manifest", "boxes") for end in ("", ".sha256"))
        for name in (*tables, SETTINGS, paths.CHECKSUMS):
            (packed / name).unlink(missing_ok=True)
    for uid in {path.stem.rpartition("_")[0] for path in packed.glob("*.npy")} - {*uids, *stay}:
        set_aside(packed, uid)
    return stay


def _records(jobs: Mapping[str, tuple], cohort: str, workers: int) -> Iterator[dict[str, Any]]:
    """The studies' records as they come.

    Where a process dies, the rest is packed one by one until the study is found, then again in parallel.
    """
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    left = dict(jobs)
    bar = tqdm(total=len(jobs), desc=f"packing {cohort}", unit="study", mininterval=1)
    with bar:
        while left:
            calls = [joblib.delayed(_packed_or_failed)(*job) for job in left.values()]
            try:
                for record in joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(calls):
                    del left[record["uid"]]
                    bar.update()
                    yield record
            except TerminatedWorkerError:
                for uid, job in list(left.items()):
                    record = _alone(*job)
                    del left[uid]
                    bar.update()
                    yield record
                    if record.get("error") == DIED:
                        break


def _alone(*job: Any) -> dict[str, Any]:
    """A study packed in a process of its own, which may die."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_packed_or_failed, *job).result()
        except BrokenProcessPool:
            set_aside(job[1], job[0].uid)
            return _failed(job[0].uid, DIED)


def _packed_or_failed(
    study: StudyFiles, packed: Path, config: PackConfig, sheet: Path | None
) -> dict[str, Any]:
    """A study's record; of one that failed, with the reason and without sequences."""
    try:
        paths.check_uids([study.uid])
    except ValueError as error:  # no file can have been called so, nor set aside
        return _failed(study.uid, str(error))
    try:
        study = replace(study, mask=find_mask(study.mask, study.uid))
        return pack_study(study, packed, config, sheet=sheet)
    except Exception as error:  # of whatever kind: the other studies go on
        set_aside(packed, study.uid)
        if sheet is not None:
            sheet.unlink(missing_ok=True)
        foreseen = isinstance(error, ValueError | OSError) and str(error)
        return _failed(study.uid, foreseen or f"{type(error).__name__}: {error}".removesuffix(": "))


def _failed(uid: str, why: str) -> dict[str, Any]:
    return {"uid": uid, "rows": [], "boxes": [], "files": {}, "error": why}


def write_tables(
    records: Sequence[Mapping[str, Any]], others: Set[str], settings: dict[str, Any], packed: Path
) -> pd.DataFrame:
    """Manifest, packed boxes, settings, report and checksums; returns the report on these records.

    Of other studies stay the rows of the report, and what their own records say is packed.
    """
    report = whole = pd.DataFrame([_report_row(record) for record in records], columns=list(REPORT_COLUMNS))
    if others:
        before = read_report(packed)
        before = before[before[UID].isin({paths.printable(uid) for uid in others})]
        done = {uid: read_study(packed, uid) for uid in before[UID][before["status"] != "failed"]}
        before = before[before[UID].map(lambda uid: bool(done.get(uid, True)))]
        records = sorted([*records, *filter(None, done.values())], key=lambda record: record["uid"])
        whole = pd.concat([report, before], ignore_index=True).sort_values(UID)
    write_report(whole, packed)
    rows = pd.DataFrame(
        [row for record in records for row in record["rows"]],
        columns=[*MANIFEST_COLUMNS, *PROVENANCE_COLUMNS],
    )
    boxes = pd.DataFrame(
        [box for record in records for box in record["boxes"]], columns=list(PACKED_BOX_COLUMNS)
    )
    write_manifest(rows, packed)
    write_packed_boxes(boxes, packed / "boxes.csv")
    write_sealed(packed / SETTINGS, settings)
    known = {name: sha256 for record in records for name, sha256 in record["files"].items()}
    paths.write_checksums(packed, known=known)
    return report


def write_report(report: pd.DataFrame, packed: Path) -> None:
    """Put `report.csv` in place; a cell that a spreadsheet would take for a formula begins with `'`."""
    cells = report.astype(str).replace(_FORMULA, r"'\g<0>", regex=True)
    write_table(cells, packed / "report.csv")


def read_report(packed: Path) -> pd.DataFrame:
    """The report as `pack_cohort` returned it, `REPORT_COLUMNS`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no whole table.
    """
    text = [column for column in REPORT_COLUMNS if column != "sequences"]
    source = "Pack the cohort (make pack)."
    table = read_columns(packed / "report.csv", REPORT_COLUMNS, what="report", source=source, text=text)
    table[text] = table[text].fillna("").replace("^'", "", regex=True)
    return table


def _report_row(record: Mapping[str, Any]) -> tuple[str, str, int, str]:
    if error := record.get("error"):
        shown = "\n".join(map(paths.printable, error.splitlines()))
        return paths.printable(record["uid"]), "failed", 0, shown
    problems, notes = record["problems"], record["notes"]
    status = "partial" if problems else "packed"
    said = [sentence(problems), *notes] if problems else notes
    return record["uid"], status, len(record["rows"]), "; ".join(said)


def summary(report: pd.DataFrame) -> str:
    """How many studies were packed, and each one that was not, or not whole, with its reason.

    Example:
        >>> print(summary(pd.DataFrame([("1.2", "failed", 0, "no mask")], columns=REPORT_COLUMNS)))
        1 studies: 0 packed, 0 without some of their vertebrae, 1 failed; 0 sequences.
        - 1.2: no mask
    """
    counts = report["status"].value_counts()
    lines = [
        f"{len(report)} studies: {counts.get('packed', 0)} packed, {counts.get('partial', 0)} without some "
        f"of their vertebrae, {counts.get('failed', 0)} failed; {report['sequences'].sum()} sequences."
    ]
    odd = report[report["status"] != "packed"]
    if missing := report.attrs.get("without_ct"):
        lines.append(f"Studies of train.csv without CT here: {len(missing)}, the first of them {missing[0]}.")
    if excluded := report.attrs.get("excluded"):
        lines.append(f"Excluded, as asked: {listing(excluded)}.")
    if unknown := report.attrs.get("unknown"):
        lines.append(f"To be excluded, but not there: {listing(unknown)}. Check the list.")
    lines += [f"- {uid}: {message}" for uid, message in zip(odd[UID], odd["message"], strict=True)]
    return "\n".join(lines)


def sheets_dir(cohort: str) -> Path:
    """Folder of a cohort's contact sheets, `figures/<cohort>/packing`; they may show patients.

    Example:
        >>> sheets_dir("rsna2022").parts[-2:]  # doctest: +SKIP
        ('rsna2022', 'packing')
    """
    return paths.project_root() / "figures" / paths.checked_name(cohort, "cohort") / "packing"
