"""The command that runs any of the experiments.

An experiment is a module here with a function `add_options(parser)` and another, `run`, that takes
these options.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import jax


def experiments() -> dict[str, str]:
    """The names of the experiments, and what each of them is; none is imported for this."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if any("add_options" in _names(node) for node in module.body):
            found[path.stem] = " ".join(ast.get_docstring(module).split("\n\n")[0].split())
    return found


def _names(node):
    """What a statement of a module defines."""
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment that the command line names."""
    name, *arguments = [*(sys.argv[1:] if arguments is None else arguments)] or [""]
    summaries = experiments()
    if name not in summaries:
        _command(summaries).parse_args([name] if name else [])
        return
    experiment = import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=summaries[name]
    )
    experiment.add_options(parser)
    options = vars(parser.parse_args(arguments))
    options["output"] = options["output"] or Path("results", name)
    if "default_methods" in options:
        default = options.pop("default_methods")
        options["methods"] = tuple(dict.fromkeys(options["methods"] or default))
    if "x64" in options:  # of an experiment in one precision
        jax.config.update("jax_enable_x64", options.pop("x64"))
    experiment.run(**options)


def _command(summaries):
    """The command line before an experiment is known."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare variable projection with other methods. Each experiment writes "
        "table.txt, result.json and figures into a folder.",
    )
    names = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, summary in summaries.items():
        names.add_parser(name, help=summary)
    return parser


if __name__ == "__main__":
    main()
