"""The zoo: every method and SciPy's on many small problems, in both precisions, as data profiles.

Runs are made in processes of their own, one a core, so that one which hangs or crashes is noted and
the others go on.
"""

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import profiles, zoo_runs
from benchmarks.experiment import text_table, write
from benchmarks.profiles import Scale
from benchmarks.zoo_problems import CASES, Case
from benchmarks.zoo_runs import METHODS, Budget, Job, Record

STARTS, QUICK_STARTS = 3, 1
BUDGET, QUICK_BUDGET = Budget(400, 2.0), Budget(200, 1.0)
QUICK = (
    *("exp3", "exp3-exact", "exp3-times1e-06", "dense-scale1", "dense-scale3", "dense-times1e+06"),
    *("convolved", "convolved-exact", "logistic-scale1", "square-poisson", "square-heat"),
)
HANGS = 300.0  # seconds without an answer, compilation included
GAIN = 1e-6  # of the value: what a converged run may leave
NEARBY = 0.1  # of the weights' norm: the lower point is in reach of the one where the run ended
PRECISIONS = {True: "float64", False: "float32"}


def run(
    *,
    quick: bool,
    seed: int,
    x64: bool | None,
    problems: Sequence[str] | None,
    methods: Sequence[str] | None,
    known: Path | None,
    output: Path,
) -> None:
    """Runs every method on every problem, and writes profiles, statuses and what went wrong."""
    cases = _chosen("problem", problems, {case.name: case for case in CASES})
    names = _chosen("method", methods, {name: name for name in METHODS})
    if quick:
        cases = [case for case in cases if case.name in QUICK] if problems is None else cases
    precisions = (True, False) if x64 is None else (x64,)
    seeds = range(seed, seed + (QUICK_STARTS if quick else STARTS))
    budget = QUICK_BUDGET if quick else BUDGET
    records = hold(cases, names, precisions, seeds, budget)
    best_before = {} if known is None else json.loads(known.read_text())["results"]
    output.mkdir(parents=True, exist_ok=True)
    tables, results = [], {}
    for precision in precisions:
        name = PRECISIONS[precision]
        found = [record for record in records if record.job.x64 is precision]
        text, results[name] = report(name, found, names, best_before.get(name, {}), output)
        tables += text
    settings = {
        "quick": quick,
        "seeds": list(seeds),
        "problems": len(cases),
        "budget": budget._asdict(),
        "nearby": NEARBY,
    }
    write(output, "zoo", tables, settings, results, ())


def _chosen(option, patterns, everything: Mapping[str, Any]) -> list:
    """What one of the patterns matches, all of it if there are none."""
    if not patterns:
        return list(everything.values())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in everything):
            raise SystemExit(
                f"--{option}: expected a pattern of {', '.join(everything)}; got {pattern!r}"
            )
    return [
        value
        for name, value in everything.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


# The processes.


def hold(
    cases: Sequence[Case],
    methods: Sequence[str],
    precisions: Sequence[bool],
    seeds: Sequence[int],
    budget: Budget,
) -> list[Record]:
    """The records of all runs, in the order of precisions, cases, seeds and methods."""
    # Problems of a group share what is compiled, so one process runs them all.
    groups = [
        [
            Job(x64, case.name, s, method, budget)
            for case in group
            for s in seeds
            for method in methods
        ]
        for x64 in precisions
        for _, group in itertools.groupby(
            sorted(cases, key=lambda case: case.group), key=lambda case: case.group
        )
    ]
    groups.sort(key=len, reverse=True)
    waiting, records = iter(groups), []
    lock = threading.Lock()
    flags = _flags()

    def drive(core):
        worker = _Worker(core, flags)
        while True:
            with lock:
                group = next(waiting, None)
            if group is None:
                break
            for job in group:
                records.append(worker.ask(job))
            with lock:
                done = f"{len(records)} of {sum(map(len, groups))}"
                print(f"{PRECISIONS[group[0].x64]} {group[0].case}: {done} runs", flush=True)
        worker.stop()

    threads = [threading.Thread(target=drive, args=(core,)) for core in _cores()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = {case.name: k for k, case in enumerate(cases)}
    return sorted(records, key=lambda r: (not r.job.x64, order[r.job.case], r.job.seed))


def _cores():
    """Those that a process is bound to; an accelerator is used by one process alone."""
    if jax.default_backend() != "cpu" or not hasattr(os, "sched_getaffinity"):
        return [None]
    return sorted(os.sched_getaffinity(0))


def _flags():
    """XLA's flags, with that which halves the time to compile where this JAX knows it: one that
    does not would not start."""
    given = os.environ.get("XLA_FLAGS", "")
    flags = f"{given} --xla_cpu_use_fusion_emitters=false"
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    known = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, check=False
    )
    return flags if known.returncode == 0 else given


class _Worker:
    """A process that runs one job after another, and is replaced where it hangs or dies."""

    def __init__(self, core: int | None, flags: str):
        self.given = core, flags
        self.begin()

    def begin(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, *self.given), daemon=True)
        self.process.start()
        other.close()

    def ask(self, job: Job) -> Record:
        self.pipe.send(job)
        try:
            if self.pipe.poll(HANGS):
                return self.pipe.recv()
            fate = "HANGS"
        except EOFError:
            fate = "CRASHED"
        self.process.kill()
        self.begin()
        return zoo_runs.without_end(job, fate, f"no answer within {HANGS:g} s")

    def stop(self):
        self.pipe.send(None)
        self.process.join()


def _serve(pipe, core, flags):
    os.environ["XLA_FLAGS"] = flags  # read when the first array is made
    if core is not None:
        os.sched_setaffinity(0, {core})
    group = None
    while (job := pipe.recv()) is not None:
        if (job.x64, job.group) != group:
            group = job.x64, job.group
            zoo_runs.forget()
            jax.config.update("jax_enable_x64", job.x64)
        pipe.send(zoo_runs.run(job))


# What comes out.


class Problem(NamedTuple):
    """A case from one start, with the runs of all methods there."""

    name: str
    family: str
    scale: Scale
    runs: Mapping[str, Record]


def gather(records: Sequence[Record], known: Mapping) -> list[Problem]:
    """The problems, with their best values among the records and those `known` from elsewhere."""
    families = {case.name: case.family for case in CASES}
    problems = []
    for (case, seed), group in itertools.groupby(records, lambda r: (r.job.case, r.job.seed)):
        runs = {record.job.method: record for record in group}
        name = f"{case}, {seed}"
        ends = [record.end for record in runs.values() if np.isfinite(record.end)]
        starts = [record.start for record in runs.values() if np.isfinite(record.start)]
        floors = [record.floor for record in runs.values() if np.isfinite(record.floor)]
        if not ends:
            raise RuntimeError(f"{name}: expected a method that ends with a number, got none")
        best = min(ends + [row for row in [known.get("best", {}).get(name)] if row is not None])
        scale = Scale(starts[0], best, floors[0])
        problems.append(Problem(name, families[case], scale, runs))
    return problems


def report(
    precision: str,
    records: Sequence[Record],
    methods: Sequence[str],
    known: Mapping,
    output: Path,
) -> tuple[list[str], dict]:
    """Tables, and the same in numbers, of one precision; draws its profiles."""
    problems = gather(records, known)
    tables, panels, results = [], {}, {"profiles": {}}
    for measure, target in profiles.MEASURES.items():
        for tolerance in profiles.TOLERANCES:
            name = f"to {tolerance:g} {measure}"
            costs = {
                method: {
                    axis: [_cost(p, method, axis, target(p.scale, tolerance)) for p in problems]
                    for axis in profiles.LIMITS
                }
                for method in methods
            }
            panels[name] = costs
            tables.append(
                profiles.table(
                    f"{precision}: % of {len(problems)} problems solved {name}, within so much "
                    "work and so many seconds",
                    costs,
                )
            )
            results["profiles"][name] = {
                method: {
                    axis: profiles.shares(of_axes[axis], profiles.LIMITS[axis])
                    for axis in profiles.LIMITS
                }
                for method, of_axes in costs.items()
            }
            tables += _verdicts(precision, name, costs)
    profiles.figure(output / f"profiles_{precision}.png", panels)
    tables += [
        _by_family(precision, problems, methods, measure, target)
        for measure, target in profiles.MEASURES.items()
    ]
    tables += [_fates(precision, problems, methods), *_complaints(precision, problems)]
    results["best"] = {problem.name: problem.scale.best for problem in problems}
    results["runs"] = {
        problem.name: {
            method: [r.end, r.status, *(x[-1] for x in (r.work_units, r.seconds) if len(x))]
            for method, r in problem.runs.items()
        }
        for problem in problems
    }
    return tables, results


def _cost(problem: Problem, method: str, axis: str, target: float) -> float:
    record = problem.runs[method]
    return profiles.spent(record.values, getattr(record, axis), target)


def _verdicts(precision, name, costs) -> Iterator[str]:
    """Where the default's profile lies against the others', from 30 work units on."""
    if "default" not in costs:
        return
    limits = np.arange(30, 401)
    share = {m: 100 * profiles.shares(c["work_units"], limits) for m, c in costs.items()}
    peers = [s for method, s in share.items() if "SciPy" in method]
    forms = [s for method, s in share.items() if method.startswith("GNvpro")]
    lines = [f"{precision}, {name}: the default from 30 work units on"]
    for label, others in (("peers", peers), ("its forms", forms)):
        if others:
            margin = share["default"] - np.max(others, axis=0)
            worst = int(np.argmin(margin))
            lines.append(
                f"  against the envelope of {label}: least margin {margin[worst]:+.1f} points, "
                f"at {limits[worst]} units"
            )
    yield "\n".join(lines)


def _solved(problem: Problem, method: str, target: float) -> bool:
    return bool(np.isfinite(_cost(problem, method, "work_units", target)))


def _by_family(precision, problems, methods, measure, target) -> str:
    """How many problems of each family are solved to 1e-6 at the end of the budget."""
    tolerance = profiles.TOLERANCES[-1]
    rows = []
    families = dict.fromkeys(problem.family for problem in problems)
    for family in [*families, "all"]:
        own = [p for p in problems if family in (p.family, "all")]
        counts = [
            sum(_solved(p, method, target(p.scale, tolerance)) for p in own) for method in methods
        ]
        rows.append([family, *map(str, counts), str(len(own))])
    title = f"{precision}: problems solved to {tolerance:g} {measure}, at the end"
    return text_table(title, ["", *methods, "of"], rows)


def _fates(precision, problems, methods) -> str:
    """How the runs ended, and what they spent."""
    fates = {
        method: Counter(problem.runs[method].status for problem in problems) for method in methods
    }
    found = sorted({fate for count in fates.values() for fate in count})
    rows = []
    for method, count in fates.items():
        runs = [problem.runs[method] for problem in problems]
        ended = [record for record in runs if len(record.values)]
        work = sum(record.work_units[-1] for record in ended) / max(len(ended), 1)
        rows.append(
            [
                method,
                *(str(count[fate]) for fate in found),
                str(sum(map(_false, runs))),
                f"{work:.0f}",
                f"{sum(record.seconds[-1] for record in ended):.0f}",
                f"{sum(record.compile_seconds for record in runs):.0f}",
            ]
        )
    columns = ["", *found, "false CONVERGED", "units a run", "seconds", "s to compile"]
    return text_table(f"{precision}: how the runs ended", columns, rows)


def _false(record: Record) -> bool:
    """Does a run say CONVERGED where a peer goes on to a lower point nearby?"""
    return record.gain > GAIN and record.distance < NEARBY


def _complaints(precision, problems) -> Iterator[str]:
    """Which runs say CONVERGED and are not, and which ended with no number, and why."""
    lines = []
    for problem in problems:
        for method, record in problem.runs.items():
            if record.gain > GAIN:
                lines.append(
                    f"{problem.name}: {method} {record.status} at {record.end:.4g}; from there "
                    f"SciPy gains {record.gain:.1e} of it, {record.distance:.1e} away"
                    + ("" if _false(record) else " (not nearby)")
                )
            elif record.message and record.status != "REFUSED":
                lines.append(f"{problem.name}: {method} {record.status}: {record.message}")
    if lines:
        yield "\n".join([f"{precision}: runs to look at", "", *lines])
