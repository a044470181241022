"""A cohort's folder: labels, split and manifest, read together and checked against each other."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pandas as pd

from cspine_helpers.files.paths import sha256_of
from cspine_helpers.files.records import parse_json
from cspine_helpers.labels import SPLITS, UID, VERTEBRAE, exclusions, expand, read_labels, without
from cspine_helpers.packed import check_sequences, read_manifest, unusable_sequences
from cspine_helpers.splits import (
    OUT_OF_FOLD,
    fold_split,
    read_split,
    split_hash,
    split_settings,
    studies_of,
    validate_split,
)

LeftOut = dict[str, dict[str, list[str]]]


@dataclass(frozen=True)
class Cohort:
    """What training, prediction and explanation read of a cohort.

    Attributes:
        folder: `data/<cohort>`.
        labels: label table.
        split: split table.
        samples: name of each split → its samples (StudyInstanceUID, vertebra, label).
        manifest: of the packed sequences; None where there is none.
        fold: of a fold's cohort, its number, how many there are, and the SHA-256 of their table.
    """

    folder: Path
    labels: pd.DataFrame
    split: pd.DataFrame
    samples: dict[str, pd.DataFrame]
    manifest: pd.DataFrame | None
    fold: dict[str, Any] | None = None

    @property
    def packed(self) -> Path:
        """Folder of the packed sequences."""
        return self.folder / "packed"

    def fingerprint(self) -> dict[str, Any]:
        """Name and SHA-256 of what a run was trained on, for its record."""
        manifest = self.packed / "manifest.csv"
        return {
            "cohort": self.folder.name,
            "labels_sha256": sha256_of(self.folder / "train.csv"),
            "split_sha256": split_hash(self.split),
            "manifest_sha256": None if self.manifest is None else sha256_of(manifest),
            **({} if self.fold is None else {"fold": self.fold}),
        }

    def facts(self) -> dict[str, Any]:
        """What a record says of the cohort beside its hashes; None where nobody noted it.

        Returns:
            `counts`: split → studies, patients, sequences and, at each level, how many are fractured;
            `split`: settings of `split_patients`; `packing`: of `packed/packing.json`; `phantom`: of a cohort
            of phantoms, its seed and its packing, by `cohort.json`.
        """
        found = {"packing": self.packed / "packing.json", "phantom": self.folder / "cohort.json"}
        return {
            "counts": {name: self._counts(samples) for name, samples in self.samples.items()},
            "split": split_settings(self.folder / "split.csv"),
            **{
                name: parse_json(path.read_bytes(), str(path)) if path.is_file() else None
                for name, path in found.items()
            },
        }

    def _counts(self, samples: pd.DataFrame) -> dict[str, Any]:
        owner = "patient" if "patient" in self.split else UID
        patients = samples[UID].map(self.split.set_index(UID, drop=False)[owner])
        fractured = samples[samples["label"] == 1]
        by_vertebra = fractured["vertebra"].value_counts().reindex(list(VERTEBRAE), fill_value=0)
        return {
            "studies": samples[UID].nunique(),
            "patients": patients.nunique(),
            "sequences": len(samples),
            "fractured": {
                "patient": patients[fractured.index].nunique(),
                "vertebra": len(fractured),
                **by_vertebra.to_dict(),
            },
        }

    def of_fold(self, folds: pd.DataFrame, fold: int) -> Self:
        """The same cohort, split as one fold's model is trained, see `splits.fold_split`.

        Raises:
            ValueError: there is no such fold, or the folds do not fit the split.

        Example:
            >>> from cspine_helpers.splits import k_folds
            >>> folds = k_folds(cohort.labels, folds=3, split=cohort.split)
            >>> list(cohort.of_fold(folds, 0).samples)
            ['train', 'validation', 'test', 'out_of_fold']
        """
        split = fold_split(self.split, folds, fold)
        return replace(
            self,
            split=split,
            samples=_samples(self.labels, split, (*SPLITS, OUT_OF_FOLD)),
            fold={
                "number": fold,
                "folds": int(folds["fold"].nunique()),
                "folds_sha256": split_hash(folds),
            },
        )

    def usable(
        self, *, slices: int, size: int, splits: Iterable[str] = SPLITS, skip_unusable: bool = False
    ) -> tuple[Self, LeftOut]:
        """The cohort, once each packed sequence of these splits can be used.

        Args:
            slices: T of every sequence.
            size: H and W of every sequence, pixels.
            splits: that are looked at; the others stay as they are.
            skip_unusable: do without the studies with a sequence that cannot be used; else they are an error.

        Returns:
            The cohort without what was left out, and that: split → study → reasons.

        Raises:
            ValueError: sequences are missing or cannot be used, and `skip_unusable` is not set; names ten.
        """
        if not skip_unusable:
            samples = pd.concat([self.samples[name] for name in splits])
            check_sequences(self.packed, samples, slices=slices, size=size)
            return self, {}
        kept, left_out = dict(self.samples), LeftOut()
        for name in splits:
            samples = kept[name]
            bad: dict[str, list[str]] = {}
            found = unusable_sequences(self.packed, samples, slices=slices, size=size)
            for (uid, vertebra), reason in found.items():
                bad.setdefault(uid, []).append(f"{vertebra}: {reason}")
            left_out |= {name: bad} if bad else {}
            kept[name] = samples[~samples[UID].isin(bad)].reset_index(drop=True)
        return replace(self, samples=kept), left_out

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
                "so patients it has learned from may be in validation or test. Restore the cohort and split "
                "of the run, or train again with notebook 03."
            )


def read_cohort(folder: str | Path) -> Cohort:
    """Read `train.csv`, `split.csv` and the manifest; samples are expanded split by split.

    Studies of the folder's `exclude.txt`, where there is one, are in none of them.

    Raises:
        FileNotFoundError: labels or split are not there.
        ValueError: a file breaks its schema, or a study is in two splits; names the first ten offenders.

    Example:
        >>> cohort = read_cohort(cohort_folder)
        >>> list(cohort.samples)
        ['train', 'validation', 'test']
    """
    folder = Path(folder)
    left_out = exclusions(folder)
    labels = without(read_labels(folder / "train.csv"), left_out)
    split = read_split(folder / "split.csv")
    split = split[~split[UID].isin(left_out)].reset_index(drop=True)
    validate_split(split, table=labels)
    has_manifest = (folder / "packed" / "manifest.csv").is_file()
    return Cohort(
        folder=folder,
        labels=labels,
        split=split,
        samples=_samples(labels, split, SPLITS),
        manifest=read_manifest(folder / "packed") if has_manifest else None,
    )


def _samples(labels: pd.DataFrame, split: pd.DataFrame, names: Iterable[str]) -> dict[str, pd.DataFrame]:
    return {name: expand(labels, studies_of(split, name)) for name in names}
