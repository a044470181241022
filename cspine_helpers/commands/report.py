"""Commands that write a page: of one patient, of a run."""

from argparse import ArgumentParser, Namespace

from cspine_helpers.commands.command import Command
from cspine_helpers.commands.options import named_cohort, named_run
from cspine_helpers.files import paths


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
    run = load_run(named_run(options))
    folder = named_cohort(run, options)
    own = folder if (folder / "train.csv").is_file() else named_cohort(run, Namespace(cohort=None))
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


def _card_options(parser: ArgumentParser) -> None:
    parser.add_argument("--run", default="builtin", help="folder of checkpoints/ (default: builtin)")


def _card(options: Namespace) -> int:
    from cspine_helpers.runs import of_radiographs

    folder = paths.run_dir(options.run)
    if of_radiographs(folder):
        from cspine_helpers.radiographs.card import write_radiograph_card as write
    else:
        from cspine_helpers.model_card.card import write_card as write
    print(write(folder))
    return 0


REPORT = Command(
    "One page for one patient: figures/<cohort>/patient_<UID>.png and .pdf.",
    "report --run builtin --study UID --truth",
    "The page that was there is unchanged.",
    _report_options,
    _report,
)

CARD = Command(
    "Write checkpoints/<run>/MODEL_CARD.md from what that folder holds.",
    "card --run mine",
    "The card that was there is unchanged.",
    _card_options,
    _card,
)
