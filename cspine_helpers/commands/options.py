"""Options that several commands have, and what they name: a run, a cohort, a device, a CT."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cspine_helpers.files import paths

if TYPE_CHECKING:
    from argparse import _ActionsContainer

    from cspine_helpers.checkpoints import Run


def named_path(text: str) -> Path:
    """A path; an empty one, as of a shell variable that is not set, would be the folder one stands in."""
    if not text.strip():
        raise ArgumentTypeError("it is empty; name a file or a folder")
    return Path(text)


def named_study(text: str) -> str:
    """A study id, not empty."""
    if not text.strip():
        raise ArgumentTypeError("it is empty; name a study")
    return text


def run_options(parser: ArgumentParser, cohort: str | None = "builtin") -> None:
    """Options that name the cohort and the run of a training or prediction."""
    said = cohort or "the run's"
    parser.add_argument("--cohort", default=cohort, help=f"folder of data/ (default: {said})")
    parser.add_argument("--run", help="folder of checkpoints/ (default: the cohort's name)")
    parser.add_argument(
        "--skip-unusable", action="store_true", help="skip studies that cannot be read, and name them"
    )


def scheme_options(parser: "_ActionsContainer") -> None:
    """Options that say what the labels of masks mean, see `named_scheme`."""
    from cspine_helpers.ct.masks import SCHEMES

    meanings = parser.add_mutually_exclusive_group()
    meanings.add_argument(
        "--scheme",
        default="rsna",
        choices=sorted(SCHEMES),
        help="what the masks' labels mean (default: rsna)",
    )
    meanings.add_argument("--labels", type=named_path, help='the same as JSON: {"41": "C1", "40": "C2", …}')


def named_scheme(options: Namespace) -> str | dict[int, str]:
    """What the labels of masks mean: by a file, else by name."""
    from cspine_helpers.ct.masks import read_scheme

    return read_scheme(options.labels) if options.labels else options.scheme


def refuse(options: Namespace, names: Sequence[str], what: str) -> None:
    """Refuse options that do not belong to what is asked for."""
    if found := [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]:
        raise ValueError(f"{' and '.join(found)} cannot be used with {what}. Leave it out.")


def named_run(options: Namespace) -> Path:
    """The folder of the run that is named, else of the cohort's, else of the built-in one."""
    return paths.run_dir(options.run or options.cohort or "builtin")


def named_cohort(run: "Run", options: Namespace) -> Path:
    """The cohort that is named, else the one that the run was trained on."""
    return paths.cohort_dir(options.cohort or run.record["data"]["cohort"])


def named_device(named: str | None) -> str:
    """The device that is named, else the GPU where there is one."""
    import torch

    return named or ("cuda" if torch.cuda.is_available() else "cpu")


def pack_named_ct(run: "Run", packed: Path, options: Namespace) -> str:
    """Pack the CT that is named as the run's sequences were; returns its study id."""
    from cspine_helpers.packing.crop import packing_of
    from cspine_helpers.packing.study import pack_one

    scheme, config = named_scheme(options), packing_of(run.record)
    return pack_one(options.ct, options.masks, packed, config, scheme=scheme, series=options.series)["uid"]
