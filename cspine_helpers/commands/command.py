"""What a command is, and the statuses that one ends with."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass

FAILED, REFUSED, STOPPED = 3, 100, 130
STATUS = """
exit status:
  0    done
  2    wrong arguments, with the usage
  3    pack: some studies failed; the summary and report.csv name them
       predict, explain --images: some files cannot be read; the summary and unreadable.csv name them
  100  refused, with the reason in a sentence
  130  stopped with Ctrl-C"""


@dataclass(frozen=True)
class Command:
    """A command: what it does, an example, what a stop with Ctrl-C leaves, its options, and its work."""

    does: str
    example: str
    stopped: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
