"""Commands that make a cohort: of phantoms, of links to files elsewhere, of radiographs."""

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from functools import partial

from cspine_helpers.commands.command import Command
from cspine_helpers.commands.options import named_path
from cspine_helpers.files import paths


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


def _link_options(parser: ArgumentParser) -> None:
    parser.add_argument("--cohort", required=True, help="folder of data/ that is made")
    parser.add_argument("sources", nargs="+", type=named_path, metavar="FOLDER", help="where its files lie")


def _link(options: Namespace) -> int:
    folder = paths.link_cohort(options.cohort, *options.sources)
    print(f"{folder}: {paths.listing(sorted(path.name for path in folder.iterdir()), quoted=False)}")
    return 0


def _radiographs_options(parser: ArgumentParser) -> None:
    from cspine_helpers.radiographs.groups import FRACTIONS, GroupConfig
    from cspine_helpers.radiographs.packing import ImagePackConfig

    alike, frame = GroupConfig(), ImagePackConfig()
    parser.add_argument("--cohort", required=True, help="folder of data/ that is made")
    sources = parser.add_argument_group("sources, one or several that mean the same by label 1")
    sources.add_argument(
        "--fracatlas", type=named_path, metavar="FOLDER", help="FracAtlas: the one with dataset.csv"
    )
    sources.add_argument(
        "--yolo", type=named_path, metavar="FOLDER", help="a set in YOLO format: the one with data.yaml"
    )
    sources.add_argument(
        "--labels", type=named_path, help='its classes as JSON: {"forearm fracture": 1, "humerus": 0, …}'
    )
    sources.add_argument(
        "--mura", type=named_path, metavar="FOLDER", help="MURA v1.1: the one with train and valid"
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
    from cspine_helpers.radiographs.consolidation import consolidate
    from cspine_helpers.radiographs.groups import GroupConfig, split_images
    from cspine_helpers.radiographs.image_table import read_sources
    from cspine_helpers.radiographs.packing import ImagePackConfig, pack_images
    from cspine_helpers.radiographs.sources.fracatlas import read_fracatlas
    from cspine_helpers.radiographs.sources.mura import read_mura
    from cspine_helpers.radiographs.sources.yolo import read_yolo
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
    how = {"group": group, "published": published, "copy": options.copy, "check": divide}
    table = consolidate(sources, folder, **how, **skip)
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


PHANTOM = Command(
    "Make a cohort of synthetic cervical-spine CT under data/.",
    "phantom --cohort mine --studies 60 --seed 5\n"
    "  python -m cspine_helpers phantom --cohort weak --studies 360 --seed 2022 --truth rsna",
    "Nothing was changed; the same command begins again.",
    _phantom_options,
    _phantom,
)

LINK = Command(
    "Make data/<cohort> a folder of links to files that lie elsewhere and may be read-only.",
    "link --cohort rsna2022 /archive/rsna-2022 /archive/rsna-2022-packed",
    "The same command continues.",
    _link_options,
    _link,
)

RADIOGRAPHS = Command(
    "Make a cohort of radiographs: one image table, groups of one patient, a split, packed images.",
    "radiographs --cohort fracatlas --fracatlas ~/FracAtlas --skip-unusable\n"
    "  python -m cspine_helpers radiographs --cohort limbs --yolo ~/BoneFracture --labels labels.json\n"
    "  python -m cspine_helpers radiographs --cohort mura --mura ~/MURA-v1.1 --published valid=test",
    "Images that are packed are kept; the same command continues.",
    _radiographs_options,
    _radiographs,
)
