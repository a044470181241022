"""The one command line: `python -m cspine_helpers phantom | link | pack | weights | train | predict | …`.

A command's options and imports are loaded when it is asked for, so that `--help` loads no torch.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any

from cspine_helpers import versions
from cspine_helpers.commands import cohort, explain, pack, predict, report, train
from cspine_helpers.commands.command import REFUSED, STATUS, STOPPED

_DOES = "Synthetic CT, packing, radiographs, training, prediction, model card: each with its own --help."
_COMMANDS = {
    "phantom": cohort.PHANTOM,
    "link": cohort.LINK,
    "pack": pack.PACK,
    "radiographs": cohort.RADIOGRAPHS,
    "train": train.TRAIN,
    "settings": train.SETTINGS,
    "predict": predict.PREDICT,
    "weights": train.WEIGHTS,
    "report": report.REPORT,
    "explain": explain.EXPLAIN,
    "card": report.CARD,
}


class _Parser(ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False, **options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; returns the exit status, see `--help`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _Parser(prog="python -m cspine_helpers", description=_DOES, epilog=STATUS)
    version = versions() if "--version" in arguments else ""  # it looks all libraries up
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    asked = next((each for each in arguments if not each.startswith("-")), None)
    for name, command in _COMMANDS.items():
        epilog = f"example:\n  python -m cspine_helpers {command.example}\n{STATUS}"
        own = commands.add_parser(name, help=command.does, description=command.does, epilog=epilog)
        if name == asked:
            command.add_options(own)
    options = parser.parse_args(arguments)
    command = _COMMANDS[options.command]
    try:
        return command.run(options)
    except KeyboardInterrupt:
        print(f"Stopped. {command.stopped}", file=sys.stderr)
        return STOPPED
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    raise SystemExit(main())
