"""Why GNvpro does not stall where its published form does: three remedies, one by one."""

import varprox as vp
from benchmarks.contest import train
from benchmarks.experiment import Run, Task
from varprox import Method, Problem

TITLE = (
    "GNvpro's three remedies: objective [validation accuracy in %] after so many work units;\n"
    "each line adds one to the line above"
)


def as_published(problem: Problem) -> Method:
    """Rank 50 always, Gauss–Newton always, the curvature without that of the penalty on W."""
    return vp.gnvpro(problem, rank=50, flat=0.0, hand_over=False, w_curvature=False)


def compare(task: Task, work: float) -> list[Run]:
    """One run of `work` units for each line of the table."""
    problem = task.problem
    methods = {
        "as published": as_published(problem),
        "+ curvature of the W-penalty": vp.gnvpro(problem, rank=50, flat=0.0, hand_over=False),
        "+ stop when flat": vp.gnvpro(problem, rank=50, hand_over=False),
        "+ hand-over to Newton": vp.gnvpro(problem, rank=50),
    }
    return [train(task, name, "", method, work) for name, method in methods.items()]
