"""The command that runs any of the experiments."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import jax

METHODS = ("gnvpro", "broydenvpro", "lbfgsvpro", "adam", "lbfgs", "gn")
RACERS = (
    "GNvpro dense",
    "GNvpro kernel",
    "GNvpro krylov",
    "GNvpro krylov, whitened",
    "Broydenvpro",
    "LBFGSvpro",
    "Broyden",
    "BFGS",
    "L-BFGS (SciPy)",
    "L-BFGS (optax)",
    "Adam",
    "Adam, cosine",
    "LM (optimistix)",
    "trf (SciPy)",
)
EXPERIMENTS = {
    "indian_pines": "segment a hyperspectral image (real data, 200 bands, 16 classes)",
    "peaks": "fit a function of two variables, medians over five seeds",
    "ellipse": "classify points inside and outside an ellipse from twenty starts",
    "autoencoder": "slimTrain and Adam on an autoencoder of MNIST, with many images and with few",
    "cifar10": "classify photographs with a convolutional network, GNvpro seeing samples of them",
    "cdr": "learn a convection–diffusion–reaction equation from 400 samples",
    "dcr": "learn the potentials over a body in the ground",
    "race": "time and work to given objectives, on six problems and against more rivals",
    "reliability": "runs that are killed, long, or many at once; coverage of standard errors",
    "zoo": "data profiles over many small problems of every kind, in both precisions",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment that the command line names."""
    options = vars(parser().parse_args(arguments))
    name = options.pop("experiment")
    if name != "zoo":  # whose runs are in processes of their own
        jax.config.update("jax_enable_x64", options.pop("x64"))  # before arrays are made
    if "methods" in options and name != "zoo":
        options["methods"] = tuple(dict.fromkeys(options["methods"] or DEFAULTS.get(name, METHODS)))
    options["output"] = options["output"] or Path("results", name)
    import_module(f"benchmarks.{name}").run(**options)


OF_SURROGATES = ("gnvpro", "broydenvpro", "lbfgsvpro", "gn", "slimtrain", "adam")
# Tuning Adam from each of twenty starts would take longer than all the rest.
DEFAULTS = {
    "peaks": (*METHODS, "slimtrain"),
    "ellipse": tuple(method for method in METHODS if method != "adam"),
    "race": RACERS,
    "cdr": (*OF_SURROGATES, "broyden"),
    "dcr": OF_SURROGATES,  # where W alone has 15,000 entries
    "autoencoder": ("slimtrain", "adam", "selections"),
    "cifar10": ("gnvpro", "lbfgsvpro", "adam", "gn"),
    "reliability": ("krylov", "dense", "broydenvpro", "lbfgsvpro", "slimtrain"),
}


SEEDS = {"autoencoder": 3, "cdr": 5, "dcr": 5}
CHOICES = {
    name: DEFAULTS[name]
    for name in ("peaks", "race", "cdr", "dcr", "autoencoder", "cifar10", "reliability")
}


def parser() -> argparse.ArgumentParser:
    """The command line: one sub-command an experiment."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare variable projection with other methods. Each experiment writes "
        "table.txt, result.json and figures into a folder.",
    )
    experiments = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, summary in EXPERIMENTS.items():
        _add_options(name, experiments.add_parser(name, help=summary, description=summary))
    return parser


def _add_options(name, experiment):
    experiment.add_argument("--quick", action="store_true", help="a shorter version of the same")
    experiment.add_argument("--seed", type=_integer(0), default=0, help="0 by default")
    if name == "autoencoder":
        experiment.add_argument(
            "--epochs",
            type=_integer(1),
            default=50,
            help="over all 50,000 images; 50 by default",
        )
        experiment.add_argument(
            "--size",
            dest="sizes",
            action="append",
            type=_integer(1),
            help="train on so many images for 50 epochs, too; may be given several times, by "
            "default 128, 256, …, 16384",
        )
    if name in ("cdr", "dcr"):
        experiment.add_argument(
            "--width",
            dest="widths",
            action="append",
            type=_integer(2),
            help="of the networks; may be given several times, by default 8 and 16",
        )
    if name in SEEDS:
        count = SEEDS[name]
        experiment.add_argument(
            "--seeds", type=_integer(1), default=count, help=f"how many; {count} by default"
        )
    experiment.add_argument(
        "--method",
        dest="methods",
        action="append",
        **_choices(name),
    )
    if name == "zoo":
        experiment.add_argument(
            "--problem",
            dest="problems",
            action="append",
            metavar="PATTERN",
            help="take only those whose names match, such as 'exp3*'; may be given several times",
        )
        experiment.add_argument(
            "--known",
            type=Path,
            metavar="FILE",
            help="a result.json of the zoo, whose best values count, too",
        )
    experiment.add_argument(
        "--output", type=Path, metavar="FOLDER", help=f"results/{name} by default"
    )
    precision = experiment.add_mutually_exclusive_group()
    in_double = {"autoencoder": False, "cifar10": False, "zoo": None}.get(name, True)
    only = " only; both by default" * (in_double is None)
    precision.add_argument(
        "--x64",
        action="store_true",
        default=in_double,
        help="double precision" + only + " (the default)" * (in_double is True),
    )
    precision.add_argument(
        "--x32",
        dest="x64",
        action="store_false",
        default=in_double,
        help="single precision" + only + " (the default)" * (in_double is False),
    )
    if name in ("indian_pines", "peaks", "zoo", "cifar10"):
        experiment.add_argument(
            "--budget",
            type=_budget,
            metavar="UNITS",
            help="work units that each run ends at; one is a forward or a backward pass over the "
            "training data",
        )
    if name == "indian_pines":
        experiment.add_argument(
            "--normalise",
            choices=("band", "spectrum"),
            default="band",
            help="what to standardise: each band over the training pixels (the default), or each "
            "pixel's spectrum",
        )


def _choices(name):
    """What `--method` takes: names, or patterns of them where there are many."""
    if name == "zoo":
        return {"metavar": "PATTERN", "help": "such as 'GNvpro*'; may be given several times"}
    return {
        "choices": CHOICES.get(name, METHODS),
        "help": "run this one only; may be given several times",
    }


def _integer(least):
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


if __name__ == "__main__":
    main()
