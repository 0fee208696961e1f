"""Why GNvpro does not stall where its published form does: five remedies, one by one."""

from functools import partial

import varprox as vp
from benchmarks.competitors import Competitor
from benchmarks.contest import train
from benchmarks.experiment import Run, Task

TITLE = (
    "GNvpro's five remedies: objective [validation accuracy in %] after so many work units;\n"
    "each line adds one to the line above"
)


def compare(task: Task, work: float) -> list[Run]:
    """One run of `work` units for each line of the table."""
    plain = {"rank": 50, "flat": 0.0, "hand_over": False, "memory": 0}
    options = {
        "as published": plain | {"w_curvature": False},
        "+ curvature of the W-penalty": plain,
        "+ stop when flat": plain | {"flat": 0.03},
        "+ hand-over to Newton": {"rank": 50, "memory": 0},
        "+ recycled Krylov spaces": {"rank": 50},
        "+ whitening": {"rank": 50, "whiten": True},
    }
    gnvpro = partial(vp.gnvpro, curvature="krylov")
    return [
        train(task, Competitor(name, "", partial(gnvpro, **chosen)), work)
        for name, chosen in options.items()
    ]
