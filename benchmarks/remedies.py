"""Why GNvpro does not stall where its published form does: four remedies, one by one."""

from functools import partial

import varprox as vp
from benchmarks.contest import train
from benchmarks.experiment import Run, Task

TITLE = (
    "GNvpro's four remedies: objective [validation accuracy in %] after so many work units;\n"
    "each line adds one to the line above"
)


def compare(task: Task, work: float) -> list[Run]:
    """One run of `work` units for each line of the table."""
    gnvpro = partial(vp.gnvpro, task.problem, rank=50)
    methods = {
        "as published": gnvpro(flat=0.0, hand_over=False, memory=0, w_curvature=False),
        "+ curvature of the W-penalty": gnvpro(flat=0.0, hand_over=False, memory=0),
        "+ stop when flat": gnvpro(hand_over=False, memory=0),
        "+ hand-over to Newton": gnvpro(memory=0),
        "+ recycled Krylov spaces": gnvpro(),
    }
    return [train(task, name, "", method, work) for name, method in methods.items()]
