"""Who competes: a method, what tells its variants apart, and how each is made."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import varprox as vp
from benchmarks import baselines
from benchmarks.starts import STARTS
from varprox import Method

METHODS = {  # by the names that options have for them
    "gnvpro": "GNvpro",
    "broydenvpro": "Broydenvpro",
    "lbfgsvpro": "LBFGSvpro",
    "adam": "Adam",
    "lbfgs": "L-BFGS",
    "gn": "GN",
}


class Competitor(NamedTuple):
    """A variant of a method."""

    method: str  # as tables name it
    variant: str
    make: Callable[..., Method]  # of what an experiment trains, such as a problem
    batch_size: int | None = None  # of the batches or samples that it sees, if not all data

    def __str__(self) -> str:
        return " ".join(filter(None, (self.method, self.variant)))


def from_starts(method: str, make: Callable[..., Method], prefix: str = "") -> list[Competitor]:
    """A method that trains θ and W, from every start of W."""
    return [
        Competitor(method, f"{prefix}from {name}", partial(make, start=start))
        for name, start in STARTS.items()
    ]


def full_batch(rank: int) -> dict[str, list[Competitor]]:
    """Those of `METHODS` that take all data in every step; `rank` is that of Krylov spaces."""
    gnvpro = partial(vp.gnvpro, curvature="krylov", rank=rank)
    return {
        "gnvpro": [Competitor("GNvpro", "", gnvpro)],
        "broydenvpro": [Competitor("Broydenvpro", "", vp.broydenvpro)],
        "lbfgsvpro": [Competitor("LBFGSvpro", "", vp.lbfgsvpro)],
        "lbfgs": from_starts("L-BFGS", baselines.lbfgs, "optax "),
        "gn": from_starts("GN", partial(baselines.gn, rank=rank)),
    }
