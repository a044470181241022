"""A cohort's folder: labels, split and manifest, read together and checked against each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cspine_helpers.labels import expand, read_labels
from cspine_helpers.manifest import read_manifest
from cspine_helpers.paths import sha256_of
from cspine_helpers.splits import SPLITS, read_split, split_hash, studies_of


@dataclass(frozen=True)
class Cohort:
    """What training and explanation read of a cohort.

    Attributes:
        folder: `data/<cohort>`.
        labels: label table.
        split: split table.
        samples: name of each split → its samples (StudyInstanceUID, vertebra, label).
        manifest: of the packed sequences; None where there is none.
    """

    folder: Path
    labels: pd.DataFrame
    split: pd.DataFrame
    samples: dict[str, pd.DataFrame]
    manifest: pd.DataFrame | None

    @property
    def packed(self) -> Path:
        """Folder of the packed sequences."""
        return self.folder / "packed"

    def fingerprint(self) -> dict[str, str | None]:
        """Name and SHA-256 of what a run was trained on, for its record."""
        manifest = self.packed / "manifest.csv"
        return {
            "cohort": self.folder.name,
            "labels_sha256": sha256_of(self.folder / "train.csv"),
            "split_sha256": split_hash(self.split),
            "manifest_sha256": None if self.manifest is None else sha256_of(manifest),
        }

    def check_run(self, record: dict[str, Any]) -> None:
        """Refuse a run of other labels or another split: it may know the patients it is tested on.

        Raises:
            ValueError: says what differs.
        """
        trained_on, here = record["data"], self.fingerprint()
        differ = [name for name in ("labels_sha256", "split_sha256") if trained_on[name] != here[name]]
        if differ:
            raise ValueError(
                f"The run was trained on other data than {self.folder} holds ({', '.join(differ)} differ), "
                "so patients it has learned from may be in validation or test. Bring the cohort and split of "
                "the run back, or train anew with notebook 03."
            )


def read_cohort(folder: str | Path) -> Cohort:
    """Read `train.csv`, `split.csv` and the manifest; samples are expanded split by split.

    Raises:
        FileNotFoundError: labels or split are not there.
        ValueError: a file breaks its schema, or a study is in two splits; names every offender.
    """
    folder = Path(folder)
    labels = read_labels(folder / "train.csv")
    split = read_split(folder / "split.csv", labels)
    has_manifest = (folder / "packed" / "manifest.csv").is_file()
    return Cohort(
        folder=folder,
        labels=labels,
        split=split,
        samples={name: expand(labels, studies_of(split, name)) for name in SPLITS},
        manifest=read_manifest(folder / "packed") if has_manifest else None,
    )
