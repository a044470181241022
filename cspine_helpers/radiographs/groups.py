"""Who is split and resampled as one: copies of an image, images alike, and series of one patient.

FracAtlas names no patient. The rule for series rests on 3,421 of its images, without the numbers 2298 to
2613, a block of fractured images where labels tell nothing:

- Of fractured images, 68 % have a fractured next number where both show a part of the body in common, 9 %
  where they do not; of all images 11 % are fractured. Of the same part and 20 to 39 numbers apart: 15 %. So a
  patient's images follow each other without a gap, and show the same part.
- Neighbours of one part and one *label* are alike (median earth mover's distance of grey histograms, 32 bins:
  1.4 where fractured, 1.5 where intact). Those of different labels are as far apart (2.2) as images 7 numbers
  apart: a series has one label.
- Thumbnails do not tell: a series is made of different views.
- Two numbers apart it is 22 %, three apart 16 %, as by chance. Where the number between is absent (612 images
  are kept elsewhere), 3 of 29 are too few to tell; as a series of three may have lost its middle, a gap of 2
  counts.

About one neighbour in three is put together by chance. That costs freedom in dividing, and makes intervals,
which resample groups, a little wide; the opposite error would leak patients from training into the test
split.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm.auto import tqdm

from cspine_helpers.files.paths import listing
from cspine_helpers.files.records import check_settings, setting, whole, within
from cspine_helpers.files.tables import require_columns
from cspine_helpers.labels import SPLITS, UID
from cspine_helpers.splits import SplitConfig, stratify, validate_split

THUMBNAIL = 16  # pixels a side
_CHUNK = 2048  # rows of the matrix of correlations at once
_NUMBERED = re.compile(r"(.*?)(\d{1,18})")
GROUP_LESS = (
    "GroupConfig(gap=0) makes no series, a higher similarity joins fewer images, with 1 identical ones only "
    "(on the command line, --gap 0, --similarity 1)"
)
FRACTIONS = (
    0.7,
    0.12,
    0.18,
)  # FracAtlas: 0.18 of its images are as many as the published benchmark's test set


@dataclass(frozen=True)
class GroupConfig:
    """What counts as one patient's, see `group_images`.

    Attributes:
        similarity: correlation of two thumbnails above which images are alike; 1: none are.
        gap: largest difference of two file numbers in a series, with no image between; 0: no series.
    """

    similarity: float = setting(0.995, within("(0, 1]"))
    gap: int = setting(2, whole(0))

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class Groups:
    """What `group_images` found.

    Attributes:
        table: the image table with `patient` filled, without what is left out.
        pairs: images of one group: image, other, why ("identical", "alike", "series"), similarity (of their
            thumbnails; NaN where it is undefined). Of identical or alike images, every pair.
        left_out: images that exist with both labels: image, label, other, other_label, why.
        config: what counted.
    """

    table: pd.DataFrame
    pairs: pd.DataFrame
    left_out: pd.DataFrame
    config: GroupConfig

    def sizes(self) -> pd.DataFrame:
        """How many groups there are of each size: size, groups, images, fractured (images)."""
        by_group = self.table.groupby("patient")["label"].agg(["size", "sum"])
        sizes = by_group.groupby("size").agg(groups=("sum", "size"), fractured=("sum", "sum")).reset_index()
        sizes.insert(2, "images", sizes["size"] * sizes["groups"])
        return sizes

    def report(self) -> dict[str, Any]:
        """For the cohort's record: how many images, groups and pairs of each kind; what is left out."""
        sizes = self.table["patient"].value_counts()
        return {
            "images": len(self.table),
            "groups": len(sizes),
            "largest_group": int(sizes.max()),
            "alone": int((sizes == 1).sum()),
            "pairs": {why: int((self.pairs["why"] == why).sum()) for why in ("identical", "alike", "series")},
            "left_out": sorted(set(self.left_out["image"])),
            "similarity": self.config.similarity,
            "gap": self.config.gap,
        }


def group_images(
    table: pd.DataFrame, read: Callable[[Path], np.ndarray], *, config: GroupConfig | None = None
) -> Groups:
    """Put images together that must not be in two splits, as one patient.

    Together are: images of one patient, where the table names one; copies of one original; images of
    identical pixels; and where no patient is named, images whose thumbnails are alike, and series: neighbours
    by file number, within one source, that share a part of the body and the label. Whatever is together with
    a third is together. A group is called by the patient that the table names, or by its first image.

    Images with identical or alike pixels that have both labels are left out, all of them: which label is
    right is not known.

    Args:
        table: image table: image, label, part (several joined by `+`), patient (empty, or the image, where it
            is unknown), source, and where the file is: `path`, or `file`; perhaps copy_of, the original that
            varied copies share. An original is no patient: two may be of one image.
        read: what reads a file as displayed, uint8 `(H, W)`, as `images.read_radiograph`.
        config: what counts as one.

    Raises:
        ValueError: the table lacks columns, names an image twice, has other labels than 0 and 1, or images
            cannot be read; offenders are named.

    Example:
        >>> images = pd.DataFrame({"image": ["IMG1", "IMG2"], "path": ["1.png", "2.png"], "label": [1, 1]})
        >>> images = images.assign(part="hand", patient="", source="own")
        >>> group_images(images, lambda path: np.eye(32, dtype=np.uint8)).table["patient"].tolist()
        ['IMG1', 'IMG1']
    """
    config, columns = config or GroupConfig(), table.columns
    table = _checked(table)
    digests, thumbnails = _fingerprints(table, read)

    # 1. All pairs.
    found = [
        *_identical(digests, thumbnails),
        *_alike(table, digests, thumbnails, config.similarity),
        *_series(table, config.gap),
    ]
    one, two = (np.array([pair[n] for pair in found], dtype=int) for n in (0, 1))
    names, labels = table["image"].to_numpy(), table["label"].to_numpy()
    pairs = pd.DataFrame({"image": names[one], "other": names[two]})
    pairs["why"] = pd.Series([pair[2] for pair in found], dtype="str")
    pairs["similarity"] = np.array([pair[3] for pair in found], dtype=float)

    # 2. Both labels.
    torn = (labels[one] != labels[two]) & (pairs["why"] != "series").to_numpy()
    both = pd.DataFrame(
        {
            "image": names[np.append(one[torn], two[torn])],
            "label": labels[np.append(one[torn], two[torn])],
            "other": names[np.append(two[torn], one[torn])],
            "other_label": labels[np.append(two[torn], one[torn])],
            "why": np.tile(pairs["why"].to_numpy()[torn], 2),
        }
    ).sort_values(["image", "other"], ignore_index=True)

    # 3. Groups, through those left out, too.
    ends = [(one, two), *(_first_of(table[column]) for column in ("patient", "copy_of"))]
    edges = np.hstack([np.vstack(each) for each in ends])
    graph = coo_array((np.ones(edges.shape[1]), edges), shape=(len(table), len(table)))
    group = connected_components(graph, directed=False)[1]
    kept = table.assign(group=group)[~table["image"].isin(both["image"])].sort_values("image", kind="stable")
    called = kept["patient"].where(kept["patient"] != "").groupby(kept["group"]).transform("first")
    called = called.fillna(kept.groupby("group")["image"].transform("first")).astype("str")
    kept = kept.assign(patient=called)[columns]
    return Groups(kept.reset_index(drop=True), pairs, both, config)


def _first_of(names: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Rows that have a name, and for each the first row of the same."""
    named = np.flatnonzero(names != "")
    numbers = pd.Series(named)
    return named, numbers.groupby(names.to_numpy()[named]).transform("first").to_numpy(dtype=int)


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    where = "path" if "path" in table.columns else "file"
    require_columns(table, ("image", "label", "part", "patient", "source", where), what="The image table")
    if table.empty:
        raise ValueError("The image table has no rows, so there is nothing to group. Read a source first.")
    if len(again := table["image"][table["image"].duplicated()].drop_duplicates()):
        raise ValueError(
            f"Images are named once; these are not ({len(again)}): {listing(again)}. Rename them."
        )
    if len(wrong := table["image"][~table["label"].isin([0, 1])]):
        raise ValueError(
            f"Labels are 0 or 1; these images have another ({len(wrong)}): {listing(wrong)}. Correct them."
        )
    if "copy_of" not in table.columns:
        table = table.assign(copy_of="")
    words = ("part", "patient", "copy_of")
    plain = {name: table[name].astype("object").fillna("").astype("str") for name in words}
    table = table.assign(**plain).reset_index(drop=True)
    return table.assign(patient=table["patient"].where(table["patient"] != table["image"], ""))


def _fingerprints(table: pd.DataFrame, read: Callable[[Path], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """SHA-256 of each image's displayed pixels (N,), and its thumbnail (N, 256) with mean 0 and length 1.

    A thumbnail of one grey value has no correlation with any other: it stays 0.
    """
    digests, thumbnails, unread = [], np.zeros((len(table), THUMBNAIL**2), dtype=np.float32), []
    files = table["path" if "path" in table.columns else "file"]
    bar = tqdm(
        zip(table["image"], files, strict=True), "comparing images", len(table), unit="image", mininterval=1
    )
    for n, (name, path) in enumerate(bar):
        try:
            pixels = np.ascontiguousarray(read(Path(path)))
        except (ValueError, OSError) as error:
            unread.append(f"{name} ({error})")
            continue
        digests.append(hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest())
        small = cv2.resize(pixels, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).ravel().astype(float)
        small -= small.mean()
        if length := np.linalg.norm(small):
            thumbnails[n] = small / length
    if unread:
        raise ValueError(
            f"Images cannot be read ({len(unread)}): {listing(unread, quoted=False)}. Replace them, or leave "
            "them out."
        )
    return np.array(digests), thumbnails


Pair = tuple[int, int, str, float]  # rows of two images, why, correlation of their thumbnails


def _identical(digests: np.ndarray, thumbnails: np.ndarray) -> Iterator[Pair]:
    for rows in pd.Series(digests).groupby(digests).indices.values():
        for one, two in combinations(rows, 2):
            yield int(one), int(two), "identical", float(thumbnails[one] @ thumbnails[two]) or np.nan


def _alike(
    table: pd.DataFrame, digests: np.ndarray, thumbnails: np.ndarray, similarity: float
) -> Iterator[Pair]:
    """Pairs of which one or both are of no named patient: where patients are named, their names count."""
    named = (table["patient"] != "").to_numpy()
    for start in range(0, len(thumbnails) if similarity < 1 else 0, _CHUNK):
        correlation = thumbnails[start : start + _CHUNK] @ thumbnails[start:].T
        for one, two in np.argwhere(correlation > similarity):
            both = named[start + one] and named[start + two]
            if one < two and not both and digests[start + one] != digests[start + two]:
                yield int(start + one), int(start + two), "alike", float(correlation[one, two])


def _series(table: pd.DataFrame, gap: int) -> Iterator[Pair]:
    """Neighbours by file number that are taken for one patient's."""
    numbered = _numbered(table[(table["patient"] == "") & (table["copy_of"] == "")])
    for _, its in numbered.sort_values("number").groupby(["source", "prefix"], sort=False):
        rows, numbers = its.index.tolist(), its["number"].tolist()
        parts, labels = [set(words.split("+")) - {""} for words in its["part"]], its["label"].tolist()
        for n, m in pairwise(range(len(rows))):
            if parts[n] & parts[m] and labels[n] == labels[m] and numbers[m] - numbers[n] <= gap:
                yield rows[n], rows[m], "series", np.nan


def _numbered(table: pd.DataFrame) -> pd.DataFrame:
    """Rows whose image's name ends in a number, with `prefix` (what stands before) and `number`."""
    parts = table["image"].astype(str).str.extract(f"^{_NUMBERED.pattern}$")
    numbered = table.assign(prefix=parts[0], number=parts[1])[parts[1].notna()]
    return numbered.assign(number=numbered["number"].astype("int64"))


def split_images(
    table: pd.DataFrame,
    *,
    config: SplitConfig | None = None,
    published: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Each image's split, whole patients (groups) only: StudyInstanceUID, split, patient; sorted by image.

    Balanced are, as nearly as whole groups allow: images, fractured images, groups, groups with a fracture,
    fractured and intact images of each part, with hardware, and of several views at once. The order of rows
    does not matter; the same images, groups and seed give the same split.

    Args:
        table: image table as of `group_images`: image, patient, label, part, hardware, multiscan.
        config: shares and seed; without it 70, 12 and 18 % and seed 0.
        published: splits of the source that stay as they are, and what they are here: `{"valid": "test"}` for
            MURA. All other images are divided among the other splits.

    Raises:
        ValueError: the table lacks columns or an image its patient, a split would stay empty, or a patient
            has images in a published split and others outside it.

    Example:
        >>> images = pd.DataFrame({"image": [f"IMG{n:02}" for n in range(50)]}).assign(label=[0, 1] * 25)
        >>> images = images.assign(patient=images["image"].str[:4], part="hand", hardware=0, multiscan=0)
        >>> split_images(images).groupby("split").size().to_dict()
        {'test': 10, 'train': 30, 'validation': 10}
    """
    config = config or SplitConfig(fractions=FRACTIONS)
    needed = ("image", "patient", "label", "part", "hardware", "multiscan", *(["split"] if published else []))
    require_columns(table, needed, what="The image table")
    table = table.sort_values("image", kind="stable").reset_index(drop=True)
    text = {name: table[name].astype("object").fillna("").astype("str") for name in ("part", "patient")}
    table = table.assign(**text)
    if len(bare := table["image"][table["patient"] == ""]):
        raise ValueError(
            f"Images without a patient ({len(bare)}): {listing(bare)}. Group them with "
            "group_images(table, read)."
        )
    place = _kept(table, published) if published else pd.Series(pd.NA, index=table.index, dtype="object")
    free = [name for name in SPLITS if name not in set(place.dropna())]
    shares = np.array([share for name, share in zip(SPLITS, config.fractions, strict=True) if name in free])
    divided = table[place.isna()]
    if not divided.empty:
        group, _ = pd.factorize(divided["patient"])
        random = np.random.default_rng(config.seed)
        place[place.isna()] = np.array(free)[
            stratify(_counted(divided, group), shares / shares.sum(), random)[group]
        ]
    if empty := [name for name in SPLITS if name not in set(place)]:
        raise ValueError(
            f"{table['patient'].nunique()} patients (groups) are too few: nothing is left for "
            f"{listing(empty)}. Add images."
        )
    split = pd.DataFrame({UID: table["image"], "split": place, "patient": table["patient"]})
    return validate_split(split)


def _kept(table: pd.DataFrame, published: Mapping[str, str]) -> pd.Series:
    """The split of each image that a published one decides, else missing."""
    if len(torn := outside_published(table, published)):
        named = [f"{row.image} with {row.other} of {row.split}" for row in torn.itertuples()]
        raise ValueError(
            f"Images are outside a published split that has their patient ({len(torn)}): "
            f"{listing(named, quoted=False)}. Leave them out, name their split, too, or group less: "
            f"{GROUP_LESS}."
        )
    return table["split"].map(dict(published)).astype("object")


def outside_published(
    table: pd.DataFrame, published: Mapping[str, str], pairs: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Images outside a published split that stays, of a patient (group) who has images in it.

    Where a patient is in several that stay, the one for the test split counts, else that for validation: what
    is in another is outside.

    Args:
        table: image table as of `group_images`: image, patient, split.
        published: as in `split_images`.
        pairs: `Groups.pairs`, to name the image that it was put together with.

    Returns:
        A row an image: image, patient, other (the image within, the first where no pair tells), split (of
        that), why (as in the pairs; "of one patient" where none tells).

    Raises:
        ValueError: no image is in a published split, or it shall become no split.

    Example:
        >>> images = pd.DataFrame({"image": ["a", "b"], "patient": "p", "split": ["train", "valid"]})
        >>> outside_published(images, {"valid": "test"})[["image", "other"]].to_numpy().tolist()
        [['a', 'b']]
    """
    there = set(table["split"].dropna()) - {""}
    if wrong := [name for name in published if name not in there]:
        raise ValueError(
            f"No image is in the published split {listing(wrong)}; found {listing(sorted(there))}."
        )
    if wrong := [name for name in published.values() if name not in SPLITS]:
        raise ValueError(f"Splits are called {listing(SPLITS)}; found {listing(wrong)}.")
    table = table.sort_values("image", kind="stable").reset_index(drop=True)
    ranks = {name: SPLITS.index(place) for name, place in published.items()}
    rank = table["split"].map(ranks).fillna(-1)
    best = rank.groupby(table["patient"]).transform("max")
    within, outside = table[(rank == best) & (best >= 0)], table[rank < best]
    first = within.drop_duplicates("patient").set_index("patient")["image"]
    found = outside[["image", "patient"]].assign(other=outside["patient"].map(first), why="of one patient")
    if pairs is not None:
        both = pd.concat([pairs, pairs.rename(columns={"image": "other", "other": "image"})])
        both = both[both["image"].isin(outside["image"]) & both["other"].isin(within["image"])]
        both = both.drop_duplicates("image").set_index("image")
        told = found["image"].isin(both.index)
        for column in ("other", "why"):
            found[column] = found[column].where(~told, found["image"].map(both[column]))
    found["split"] = found["other"].map(table.set_index("image")["split"])
    return found[["image", "patient", "other", "split", "why"]].reset_index(drop=True)


def _counted(table: pd.DataFrame, group: np.ndarray) -> np.ndarray:
    """What each group `(G,)` adds to what is balanced, `(G, F)`."""
    broken = table["label"].to_numpy() == 1
    words = [set(words.split("+")) for words in table["part"]]
    shown = [np.array([word in its for its in words]) for word in sorted(set().union(*words))]
    marked = [pd.to_numeric(table[name]).to_numpy() == 1 for name in ("hardware", "multiscan")]
    kinds = [here & label for here in (*shown, *marked) for label in (broken, ~broken)]
    counted = np.column_stack([np.ones(len(table), dtype=bool), broken, *kinds]).astype(int)
    by_group = np.zeros((group.max() + 1, counted.shape[1]), dtype=int)
    np.add.at(by_group, group, counted)
    return np.column_stack([np.ones(len(by_group), dtype=int), by_group[:, 1] > 0, by_group])


def leakage(
    table: pd.DataFrame, split: pd.DataFrame | Mapping[str, str], pairs: pd.DataFrame
) -> pd.DataFrame:
    """What any two splits share, one row for two: zero everywhere where the split is by group.

    Columns: `split` (the larger) and `other`; `groups` that are in both; `identical`: sets of identical
    pixels that are in both; `alike`: pairs across them whose thumbnails are alike, identical ones among them;
    and, of the `fractured` images of `other`, how many have a fractured image of the number before or after
    in `split` (`fractured_neighbours`; some by chance: two patients, too, have neighbouring numbers).

    Args:
        table: image table with `patient` filled: image, label, patient.
        split: image → split, of any names: a published one (`table.set_index("image")["split"]`), or a split
            table.
        pairs: `Groups.pairs`.

    Raises:
        ValueError: the split has fewer than two parts.

    Example:
        >>> images = pd.DataFrame({"image": ["a", "b", "c"], "label": [1, 0, 1], "patient": ["a", "b", "a"]})
        >>> pairs = pd.DataFrame({"image": ["a"], "other": ["c"], "why": ["identical"]})
        >>> found = leakage(images, {"a": "train", "b": "train", "c": "val"}, pairs)
        >>> found[["split", "other", "groups", "identical"]].to_dict("records")
        [{'split': 'train', 'other': 'val', 'groups': 1, 'identical': 1}]
    """
    if isinstance(split, pd.DataFrame):
        split = dict(zip(split[UID], split["split"], strict=True))
    place = pd.Series(dict(split)).dropna()
    sizes = place.value_counts()
    if len(sizes) < 2:
        raise ValueError(f"Leakage is between two splits; found {listing(sizes.index) or 'none'}.")
    patient, label = (table.set_index("image")[name] for name in ("patient", "label"))
    patient = patient.where(patient != "")
    same = pairs[pairs["why"] != "series"]
    identical = same[same["why"] == "identical"]
    digest = _sets(identical)
    ends = pd.DataFrame({"one": same["image"].map(place), "two": same["other"].map(place)})
    following = _following(table)
    rows = []
    for larger, smaller in combinations(sorted(sizes.index, key=lambda name: (-sizes[name], name)), 2):
        here, there = (place.index[place == name] for name in (larger, smaller))
        across = ends.isin([larger, smaller]).all(axis=1) & (ends["one"] != ends["two"])
        broken = there[label.reindex(there) == 1]
        near = following[following["image"].isin(broken) & following["other"].isin(here)]
        rows.append(
            {
                "split": larger,
                "other": smaller,
                "groups": len(set(patient.reindex(here).dropna()) & set(patient.reindex(there).dropna())),
                "identical": len(set(digest.reindex(here).dropna()) & set(digest.reindex(there).dropna())),
                "alike": int(across.sum()),
                "fractured_neighbours": near["image"].nunique(),
                "fractured": len(broken),
            }
        )
    return pd.DataFrame(rows)


def _sets(pairs: pd.DataFrame) -> pd.Series:
    """Image → the first image of its set of identical ones."""
    first = pairs.groupby("other")["image"].min()
    return pd.concat([first, pd.Series(first.unique(), index=first.unique())]).groupby(level=0).min()


def _following(table: pd.DataFrame) -> pd.DataFrame:
    """Fractured images whose next or previous number is fractured: image, other."""
    keys = ["source", "prefix"] if "source" in table.columns else ["prefix"]
    broken = _numbered(table[table["label"] == 1])[["image", "number", *keys]]
    after = broken.assign(number=broken["number"] - 1).rename(columns={"image": "other"})
    pairs = broken.merge(after, on=[*keys, "number"])[["image", "other"]]
    return pd.concat([pairs, pairs.rename(columns={"image": "other", "other": "image"})], ignore_index=True)
