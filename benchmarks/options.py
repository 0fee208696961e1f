"""The options of experiments, of which each takes those that it needs."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def add_common(parser: argparse.ArgumentParser, *, double: bool | None = True) -> None:
    """`--quick`, `--seed`, `--output`, and the precision: double by default, or single, or both,
    of which `x64_only` is None, if `double` is None."""
    parser.add_argument("--quick", action="store_true", help="a shorter version of the same")
    parser.add_argument("--seed", type=integer(0), default=0, help="0 by default")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="results/EXPERIMENT by default",
    )
    precision = parser.add_mutually_exclusive_group()
    name, only = ("x64", "") if double is not None else ("x64_only", " only; both by default")
    precision.add_argument(
        "--x64",
        dest=name,
        action="store_true",
        default=double,
        help="double precision" + only + " (the default)" * (double is True),
    )
    precision.add_argument(
        "--x32",
        dest=name,
        action="store_false",
        default=double,
        help="single precision" + only + " (the default)" * (double is False),
    )


def add_methods(
    parser: argparse.ArgumentParser, names: Sequence[str], default: Sequence[str] | None = None
) -> None:
    """`--method`, which may be given several times; without it all of `default`, or of `names`."""
    parser.add_argument(
        "--method",
        dest="methods",
        action="append",
        choices=names,
        help="run this one only; may be given several times",
    )
    parser.set_defaults(default_methods=tuple(names if default is None else default))


def add_budget(parser: argparse.ArgumentParser) -> None:
    """`--budget`, in work units."""
    parser.add_argument(
        "--budget",
        type=_budget,
        metavar="UNITS",
        help="work units that each run ends at; one is a forward or a backward pass over the "
        "training data",
    )


def add_seeds(parser: argparse.ArgumentParser, count: int) -> None:
    """`--seeds`, how many."""
    parser.add_argument(
        "--seeds", type=integer(1), default=count, help=f"how many; {count} by default"
    )


def integer(least: int) -> Callable[[str], int]:
    """What reads an integer that is not less."""

    def read(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer ≥ {least}, got {text!r}")
        return int(text)

    return read


def _budget(text):
    try:
        budget = float(text)
    except ValueError:
        budget = 0.0
    if not 2 <= budget < float("inf"):  # 2 is what the start of L-BFGS costs
        raise argparse.ArgumentTypeError(f"expected a number ≥ 2, got {text!r}")
    return budget
