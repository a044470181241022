"""The command that predicts: a cohort's table, one study, a folder of radiographs."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from cspine_helpers.commands.command import FAILED, Command
from cspine_helpers.commands.options import (
    named_cohort,
    named_device,
    named_path,
    named_run,
    pack_named_ct,
    refuse,
    run_options,
    scheme_options,
)
from cspine_helpers.files import paths

if TYPE_CHECKING:
    from pandas import DataFrame


def _predict_options(parser: ArgumentParser) -> None:
    run_options(parser, cohort=None)
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
        type=named_path,
        metavar="FOLDER",
        help="answer every PNG, JPEG, TIFF, DICOM in there: tables and pictures in --out (default: "
        "checkpoints/<run>/images/<name of FOLDER>)",
    )
    images.add_argument(
        "--inverted",
        action="store_true",
        help="with --images: bone is dark in these PNG or JPEG files; DICOM and TIFF say so themselves",
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
    which.add_argument(
        "--ct", type=named_path, help="a CT that is packed for it, a DICOM folder or a NIfTI file"
    )
    one.add_argument("--masks", type=named_path, help="with --ct: its mask, a NIfTI file or a folder of them")
    scheme_options(one)
    one.add_argument("--series", metavar="UID", help="with --ct: which series, where it holds several")
    given = parser.add_argument_group("one study, or --images")
    given.add_argument(
        "--threshold", type=float, help="call vertebrae or images from here on (default: the frozen one)"
    )
    given.add_argument(
        "--out", type=named_path, metavar="PATH", help="write the JSON, or the folder, there instead"
    )


def _predict(options: Namespace) -> int:
    from cspine_helpers.runs import of_radiographs

    if options.images:
        return _predict_images(options)
    if options.inverted:
        raise ValueError("--inverted is for --images, a folder of radiographs. Name it, or leave this out.")
    if of_radiographs(paths.run_dir(options.ensemble[0]) if options.ensemble else named_run(options)):
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

    folder = named_run(options)
    path = folder / PREDICTIONS
    is_there = options.calibrated and is_whole(path) and not options.replace
    table = read_predictions(path) if is_there else _predicted(options, folder, path)
    print(f"{path}: {len(table)} sequences of {table[UID].nunique()} studies.")
    if options.calibrated:
        print(f"{write_calibrated(folder)}: calibrated probabilities beside those of {path.name}.")
    return 0


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
        each |= {"tta": bool(options.tta), "device": named_device(options.device)}
        if in_folds:
            return predict_folds(folder, cohort, **each)
        return predict_ensemble(runs, cohort, folder, **each)
    cohort = read_cohort(named_cohort(run, options))
    cohort.check_run(run.record)
    run.to(named_device(options.device))
    return predict_cohort(run, cohort, path, **each)


def _predict_radiographs(options: Namespace) -> int:
    """The table and the masks of a cohort of radiographs."""
    from cspine_helpers.inference.prediction import PREDICTIONS, is_whole, write_calibrated
    from cspine_helpers.predictions import read_predictions
    from cspine_helpers.radiographs.blend import BLEND, read_blend
    from cspine_helpers.radiographs.prediction import predict_radiographs
    from cspine_helpers.runs import member_folders, read_record

    names = ("study", "ct", "masks", "labels", "series", "out", "skip_unusable")
    refuse(options, names, "a run of radiographs")
    if options.threshold is not None:
        raise ValueError("--threshold is for --images; a table has probabilities, which notebook 04 calls.")
    if options.ensemble and not options.run:
        raise ValueError("--ensemble needs --run, the folder of checkpoints/ that its predictions go to.")
    folder = named_run(options)
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
            device=named_device(options.device),
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
    run = load_run(named_run(options))
    run.to(named_device(options.device))
    with TemporaryDirectory(prefix="cspine-") as folder:
        packed, uid = Path(folder), options.study
        if options.ct:
            uid = pack_named_ct(run, packed, options)
        else:
            packed = named_cohort(run, options) / "packed"
        answer = predict_study(run, packed, uid, threshold=options.threshold)
        if problems := read_study(packed, uid).get("problems"):
            answer = replace(answer, warnings=(*answer.warnings, f"not packed: {sentence(problems)}"))
    print(answer.summary())
    print(write_study(answer, options.out or study_path(run.folder, uid)))
    return 0


def _predict_images(options: Namespace) -> int:
    """Answer a folder of radiographs."""
    from cspine_helpers.radiographs.folder import predict_folder

    names = ("cohort", "study", "ct", "masks", "labels", "series", "calibrated", "ensemble", "blend")
    refuse(options, (*names, "skip_unusable"), "--images")
    run = named_run(options)
    answer = predict_folder(
        run,
        options.images,
        options.out or run / "images" / options.images.resolve().name,
        tta=options.tta,
        threshold=options.threshold,
        device=named_device(options.device),
        inverted=options.inverted,
        replace=options.replace,
    )
    print(answer.summary())
    return FAILED if len(answer.unreadable) else 0


PREDICT = Command(
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
)
