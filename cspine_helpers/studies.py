"""CT studies of a cohort, packed at once: what is done stays done, what fails is reported, the rest goes on.

python -m cspine_helpers.studies --cohort rsna2022
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import pandas as pd
from tqdm.auto import tqdm

from cspine_helpers import paths
from cspine_helpers.itk import simpleitk
from cspine_helpers.labels import BOX_COLUMNS, UID, VERTEBRAE, read_boxes, read_labels
from cspine_helpers.manifest import MANIFEST_COLUMNS, PROVENANCE_COLUMNS, write_manifest
from cspine_helpers.masks import SCHEMES, find_mask
from cspine_helpers.nifti import NIFTI
from cspine_helpers.packer import StudyFiles, forget, pack_study, packer_version, sentence
from cspine_helpers.packing import PackConfig
from cspine_helpers.records import write_sealed
from cspine_helpers.tables import write_table
from cspine_helpers.truth import PACKED_BOX_COLUMNS, write_packed_boxes

REPORT_COLUMNS = (UID, "status", "sequences", "message")
SETTINGS = "packing.json"
_UNFINISHED = re.compile(r"\..+(\.\w+)\.\w{8}\1")  # by paths.atomic_path: .1.2.3_1.npy.a1b2c3d4.npy
_MAX_STATUS = 99  # exit statuses beyond 125 have meanings of their own


@dataclass(frozen=True)
class PackSource:
    """Where a cohort's CT and masks lie, and how they are read.

    Attributes:
        images: folder of studies: a folder with a DICOM series, or a NIfTI file, for each StudyInstanceUID.
        masks: folder of masks: `<uid>.nii[.gz]`, or a folder `<uid>` with one file a vertebra.
        scheme: what the masks' labels mean, see `masks.read_label_map`.
        series: StudyInstanceUID → SeriesInstanceUID, of studies that hold several series.
    """

    images: Path
    masks: Path
    scheme: str | Mapping[int, str] = "rsna"
    series: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, **others: Any) -> Self:
        """As RSNA 2022 lays them out in a cohort's folder: `train_images/` and `segmentations/`."""
        return cls(folder / "train_images", folder / "segmentations", **others)

    def studies(self) -> dict[str, Path]:
        """StudyInstanceUID → its folder or file, in order.

        Raises:
            FileNotFoundError: there are none.
            ValueError: one is there twice.
        """
        found: dict[str, Path] = {}
        for path in sorted(self.images.iterdir()) if self.images.is_dir() else ():
            suffix = next((s for s in NIFTI if path.name.endswith(s)), "")
            if not path.name.startswith(".") and (path.is_dir() or suffix):
                uid = path.name.removesuffix(suffix)
                if uid in found:
                    raise ValueError(f"{path.name} and {found[uid].name} are one study. Keep one of them.")
                found[uid] = path
        if not found:
            raise FileNotFoundError(
                f"No study in {self.images}: it needs a folder with a DICOM series, or a NIfTI file, for "
                "each StudyInstanceUID. data/README.md says where the files of RSNA 2022 go."
            )
        return found


def pack_cohort(
    folder: Path,
    *,
    source: PackSource | None = None,
    config: PackConfig | None = None,
    sheets: Path | None = None,
    workers: int = -1,
) -> pd.DataFrame:
    """Pack every study: sequences, `manifest.csv`, `boxes.csv`, `report.csv` and `SHA256SUMS` in `packed/`.

    Studies that are packed already, by the rule of `packer`, are left as they are. On a cluster, the same
    call inside `joblib.parallel_config(backend="dask")` packs on a Dask client's workers, on a shared disk.

    Args:
        folder: `data/<cohort>`; `train.csv` and `train_bounding_boxes.csv` there are used where they are.
        source: CT and masks; default as RSNA 2022 lays them out in the folder.
        config: how vertebrae are cut out.
        sheets: folder for a contact sheet a study, `<StudyInstanceUID>.png`; None draws none.
        workers: processes, -1 for one a core.

    Returns:
        The report, one row a study: status `packed`, `partial` (vertebrae are missing) or `failed`, number of
        sequences, and a message.

    Raises:
        FileNotFoundError: there is no study.
        ImportError: SimpleITK is not installed.
        ValueError: a study is there twice, or the tables of labels or boxes cannot be used.
        FileExistsError: `packed/` holds sequences that were made elsewhere.
        BlockingIOError: another process packs this cohort.
    """
    import joblib

    simpleitk()
    _check_ours(folder / "packed")
    source, config, packed = source or PackSource.of(folder), config or PackConfig(), folder / "packed"
    studies = list(_studies(source, folder))
    with paths.exclusive(folder / ".packing.lock", f"packing {folder.name}"):
        _remove_unfinished(packed, packed / "studies", *([sheets] if sheets else ()))
        job = joblib.delayed(_packed_or_failed)
        jobs = (job(study, packed, config, sheets and sheets / f"{study.uid}.png") for study in studies)
        done = joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(jobs)
        bar = tqdm(done, total=len(studies), desc=f"packing {folder.name}", unit="study", mininterval=1)
        records = sorted(bar, key=lambda record: record["uid"])
        settings = {"config": asdict(config), "scheme": source.scheme, "packer": packer_version()}
        return _write_tables(records, settings, packed)


def _check_ours(packed: Path) -> None:
    """Refuse to replace sequences that this module did not write."""
    made_elsewhere = packed.is_dir() and not any((packed / name).exists() for name in (SETTINGS, "studies"))
    if made_elsewhere and any(packed.iterdir()):
        raise FileExistsError(
            f"{packed} holds sequences that were not packed here. Move it aside to pack the CT, or leave it "
            "as it is."
        )


def _studies(source: PackSource, folder: Path) -> Iterator[StudyFiles]:
    """The cohort's studies with labels and boxes; a mask that is not there is named where it should be."""
    labels, boxes = folder / "train.csv", folder / "train_bounding_boxes.csv"
    known = read_labels(labels).set_index(UID)[list(VERTEBRAE)].T.to_dict() if labels.is_file() else {}
    drawn = read_boxes(boxes) if boxes.is_file() else pd.DataFrame(columns=list(BOX_COLUMNS))
    for uid, path in source.studies().items():
        mask = find_mask(source.masks, uid) or source.masks / f"{uid}.nii.gz"
        series, its = source.series.get(uid), drawn[drawn[UID] == uid]
        yield StudyFiles(uid, path, mask, source.scheme, series, known.get(uid), its)


def _remove_unfinished(*folders: Path) -> None:
    """Remove what a process that was killed had not written to its end."""
    for folder in folders:
        for path in folder.glob(".*"):
            if _UNFINISHED.fullmatch(path.name):
                path.unlink()


def _packed_or_failed(
    study: StudyFiles, packed: Path, config: PackConfig, sheet: Path | None
) -> dict[str, Any]:
    """A study's record; of one that failed, with the reason and without sequences."""
    try:
        paths.check_uids([study.uid])
        if not study.mask.exists():
            name = f"{study.mask.parent.name}/{study.mask.name}"
            raise FileNotFoundError(
                f"no mask at {name}, nor as .nii or a folder. README says how to make masks."
            )
        return pack_study(study, packed, config, sheet=sheet)
    except Exception as error:  # of whatever kind: the other studies go on
        forget(packed, study.uid)
        if sheet is not None:
            sheet.unlink(missing_ok=True)
        foreseen = isinstance(error, ValueError | OSError) and str(error)
        message = foreseen or f"{type(error).__name__}: {error}".removesuffix(": ")
        return {"uid": study.uid, "rows": [], "boxes": [], "files": {}, "error": message}


def _write_tables(
    records: Sequence[Mapping[str, Any]], settings: dict[str, Any], packed: Path
) -> pd.DataFrame:
    """Manifest, packed boxes, settings, report and checksums of the cohort; returns the report."""
    report = pd.DataFrame([_report_row(record) for record in records], columns=list(REPORT_COLUMNS))
    write_table(report, packed / "report.csv")
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


def _report_row(record: Mapping[str, Any]) -> tuple[str, str, int, str]:
    if error := record.get("error"):
        return record["uid"], "failed", 0, error
    problems, notes = record["problems"], record["notes"]
    status = "partial" if problems else "packed"
    told = [sentence(problems), *notes] if problems else notes
    return record["uid"], status, len(record["rows"]), "; ".join(told)


def summary(report: pd.DataFrame) -> str:
    """How many studies were packed, and each one that was not, or not whole, with its reason."""
    counts = report["status"].value_counts()
    lines = [
        f"{len(report)} studies: {counts.get('packed', 0)} packed, {counts.get('partial', 0)} without some "
        f"of their vertebrae, {counts.get('failed', 0)} failed; {report['sequences'].sum()} sequences."
    ]
    odd = report[report["status"] != "packed"]
    lines += [f"- {uid}: {message}" for uid, message in zip(odd[UID], odd["message"], strict=True)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack a cohort from the command line; the exit status counts the studies that failed, to 99 at most."""
    default = PackConfig()
    parser = argparse.ArgumentParser(
        description="Pack a cohort's CT into sequences, under data/<cohort>/packed."
    )
    parser.add_argument("--cohort", required=True, help="folder of data/")
    parser.add_argument(
        "--images", type=Path, help="folder of studies (default: train_images in the cohort's)"
    )
    parser.add_argument("--masks", type=Path, help="folder of masks (default: segmentations in the cohort's)")
    parser.add_argument(
        "--scheme", default="rsna", choices=sorted(SCHEMES), help="what the masks' labels mean"
    )
    parser.add_argument("--slices", type=int, default=default.slices, help="slice positions a vertebra")
    parser.add_argument("--size", type=int, default=default.size, help="pixels, height and width")
    parser.add_argument("--margin-mm", type=float, default=default.margin_mm, help="free around a vertebra")
    parser.add_argument("--neighbour-mm", type=float, default=default.neighbour_mm, help="between channels")
    parser.add_argument(
        "--window-hu", type=float, nargs=2, default=default.window_hu, metavar=("LOW", "HIGH")
    )
    parser.add_argument("--soft-mask", action="store_true", help="keep how much of a pixel is vertebra")
    parser.add_argument("--workers", type=int, default=-1, help="processes (default: one a core)")
    parser.add_argument("--no-sheets", action="store_true", help="draw no contact sheets")
    options = parser.parse_args(arguments)
    names = ("slices", "size", "margin_mm", "neighbour_mm", "soft_mask")
    try:
        folder = paths.cohort_dir(options.cohort)
        found = PackSource.of(folder, scheme=options.scheme)
        source = PackSource(options.images or found.images, options.masks or found.masks, found.scheme)
        config = PackConfig(
            window_hu=tuple(options.window_hu), **{name: getattr(options, name) for name in names}
        )
        sheets = None if options.no_sheets else sheets_dir(options.cohort)
        report = pack_cohort(folder, source=source, config=config, sheets=sheets, workers=options.workers)
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(report))
    return min(int((report["status"] == "failed").sum()), _MAX_STATUS)


def sheets_dir(cohort: str) -> Path:
    """Folder of a cohort's contact sheets, `figures/<cohort>/packing`; they may show patients."""
    return paths.project_root() / "figures" / paths.checked_name(cohort, "cohort") / "packing"


if __name__ == "__main__":
    raise SystemExit(main())
