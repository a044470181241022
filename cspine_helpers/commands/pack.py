"""The command that packs a cohort's CT, or old files of one slice each."""

from argparse import SUPPRESS, ArgumentParser, Namespace
from dataclasses import replace

from cspine_helpers.commands.command import FAILED, Command
from cspine_helpers.commands.options import named_path, named_scheme, scheme_options
from cspine_helpers.files import paths


def _pack_options(parser: ArgumentParser) -> None:
    from cspine_helpers.packing.crop import PackConfig

    default = PackConfig()
    low, high = default.window_hu
    parser.add_argument("--cohort", required=True, help="folder of data/")
    parser.add_argument(
        "--slices-from",
        type=named_path,
        metavar="FOLDER",
        help="pack files <study>_<c>_<t>.npy, not CT",
    )
    parser.add_argument(
        "--images", type=named_path, help="folder of studies (default: the cohort's train_images)"
    )
    parser.add_argument(
        "--masks", type=named_path, help="folder of masks (default: the cohort's segmentations)"
    )
    scheme_options(parser)
    parser.add_argument(
        "--series", nargs="+", default=[], metavar="UID", help="which series, for studies that hold several"
    )
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--only", type=int, metavar="N", help="pack the first N studies; names their sheets")
    some.add_argument("--study", action="append", metavar="ID", help="pack this study; may be repeated")
    parser.add_argument(
        "--exclude", type=named_path, help="studies to exclude (default: the cohort's exclude.txt)"
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
    from cspine_helpers.labels import UID, read_exclusions
    from cspine_helpers.packing.cohort import PackSource, choose_series, pack_cohort, sheets_dir, summary
    from cspine_helpers.packing.crop import PackConfig

    if options.slices_from:
        return _pack_slices(options)

    # 1. What is packed, and how.
    folder = paths.cohort_dir(options.cohort)
    source = PackSource.of(folder, scheme=named_scheme(options))
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
    return FAILED if (report["status"] == "failed").any() else 0


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
    return FAILED if (report["status"] == "failed").any() else 0


PACK = Command(
    "Pack a cohort's CT into sequences, under data/<cohort>/packed.",
    "pack --cohort rsna2022 --only 1",
    "Studies that are packed are kept; the same command continues.",
    _pack_options,
    _pack,
)
