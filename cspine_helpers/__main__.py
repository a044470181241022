"""The command line: `python -m cspine_helpers phantom | pack | train | predict | card`."""

import sys
from importlib import import_module

_COMMANDS = {
    "phantom": "phantom.cohort",
    "pack": "packing.cohort",
    "train": "training.run",
    "predict": "inference.prediction",
    "card": "model_card.card",
}


def main(arguments: list[str]) -> int:
    """Hand the arguments to the command they begin with."""
    if not arguments or arguments[0] not in _COMMANDS:
        print(f"Commands: {', '.join(_COMMANDS)}.", file=sys.stderr)
        return 2
    command = import_module(f"cspine_helpers.{_COMMANDS[arguments[0]]}")
    return command.main(arguments[1:]) or 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
