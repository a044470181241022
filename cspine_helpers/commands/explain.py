"""The command that maps where a logit comes from: over a CT, or in radiographs."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from cspine_helpers.commands.command import FAILED, Command
from cspine_helpers.commands.options import (
    named_cohort,
    named_device,
    named_path,
    named_run,
    named_study,
    pack_named_ct,
    refuse,
    scheme_options,
)
from cspine_helpers.files import paths


def _explain_options(parser: ArgumentParser) -> None:
    from cspine_helpers.radiographs.maps import RADIOGRAPH_METHODS

    parser.add_argument("--run", default="builtin", help="folder of checkpoints/ (default: builtin)")
    parser.add_argument("--cohort", help="folder of data/ (default: the one the run was trained on)")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--study",
        type=named_study,
        metavar="UID",
        help="a study of the cohort that is packed, and whose CT is there",
    )
    which.add_argument(
        "--ct", type=named_path, help="a CT that is packed for it, a DICOM folder or a NIfTI file"
    )
    which.add_argument(
        "--images",
        type=named_path,
        metavar="FOLDER",
        help="every radiograph in there, by a run of radiographs",
    )
    parser.add_argument(
        "--masks", type=named_path, help="with --ct: its mask, a NIfTI file or a folder of them"
    )
    scheme_options(parser)
    parser.add_argument("--series", metavar="UID", help="which series, where the study's CT holds several")
    parser.add_argument(
        "--method",
        choices=RADIOGRAPH_METHODS,
        help="how maps are computed; mask: what a run of radiographs marks itself (default: of CT layer_cam, "
        "which points at the fracture and passes the sanity checks, as notebook 09 measures them; with "
        "--images mask, the best there, where the run has one, else gradient_input)",
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
        type=named_path,
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
    refuse(options, ("replace",), "a study, whose files are replaced one by one")
    if options.study:
        refuse(options, ("masks", "labels"), "--study, which is packed already")
        paths.check_uids([options.study])
    else:
        refuse(options, ("cohort",), "--ct, which is of no cohort")
    if options.ct and not options.masks:
        raise ValueError("--ct needs --masks, the file or folder that says where its vertebrae are.")
    method = options.method or "layer_cam"
    _check_method(method, options.layer)
    if method == "mask":
        raise ValueError("--method mask is for --images: a run of CT marks nothing itself. Choose another.")
    _check_out(options.out)
    run = load_run(named_run(options))
    run.to(named_device(options.device))
    with TemporaryDirectory(prefix="cspine-") as folder:
        if options.ct:
            packed = Path(folder)
            uid = pack_named_ct(run, packed, options)
            volume = read_ct(options.ct, series=options.series)
            pieces: Mapping[str, Piece] = crops_in(volume, read_study(packed, uid))
        else:
            cohort, uid = named_cohort(run, options), options.study
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


def _explain_images(options: Namespace) -> int:
    """Map a folder of radiographs."""
    from cspine_helpers.radiographs.folder import UNREADABLE, explain_folder
    from cspine_helpers.radiographs.model import WITH_MASK
    from cspine_helpers.radiographs.task import load_radiograph_run

    names = ("cohort", "masks", "labels", "series", "vertebrae", "with_ct")
    refuse(options, names, "--images")
    _check_out(options.out)
    run = load_radiograph_run(named_run(options))
    method = options.method or ("mask" if run.config.architecture in WITH_MASK else "gradient_input")
    _check_method(method, options.layer)
    run.to(named_device(options.device))
    out = options.out or run.folder / "maps" / options.images.resolve().name
    each = {"method": method, "layer": options.layer, "replace": options.replace}
    table, unreadable = explain_folder(run, options.images, out, **each)
    print(f"{len(table):,} radiographs mapped by {method}: {out}")
    if len(unreadable):
        print(f"Not readable ({len(unreadable):,}), see {UNREADABLE}: {paths.listing(unreadable['file'])}")
    return FAILED if len(unreadable) else 0


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


EXPLAIN = Command(
    "Map where a fracture logit comes from: of a CT's vertebrae as NIfTI over the CT, or in radiographs.",
    "explain --run builtin --study UID --with-ct\n"
    "  python -m cspine_helpers explain --run mine --ct scan/ --masks mask.nii.gz --method hires_cam\n"
    "  python -m cspine_helpers explain --run fracatlas --images xrays/ --method layer_cam",
    "Files that were there are unchanged; the same command begins again.",
    _explain_options,
    _explain,
)
