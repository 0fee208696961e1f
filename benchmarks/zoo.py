"""The zoo: every method and its peers on many small problems, in both precisions, as data profiles.

How to read the tables is said in `profiles`; problems, runs and processes have modules of their
own.
"""

import itertools
import json
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import options, profiles
from benchmarks.experiment import text_table, write
from benchmarks.profiles import Scale
from benchmarks.zoo_problems import CASES
from benchmarks.zoo_processes import hold
from benchmarks.zoo_runs import METHODS, PEERS, PRECISIONS, ULPS, Budget, Record

STARTS, QUICK_STARTS = 3, 1
WORK, QUICK_WORK = 400.0, 200.0
SECONDS = 5e-3  # a work unit
QUICK = (
    *("exp3", "exp3-exact", "exp3-times1e-06", "dense-scale1", "dense-scale3", "dense-times1e+06"),
    *("convolved", "convolved-exact", "logistic-scale1", "square-poisson", "square-heat"),
)
GAIN = 1e-6  # of the value: what a converged run may leave, rounding apart


def add_options(parser: ArgumentParser) -> None:
    """Those of `run`."""
    options.add_common(parser, double=None)
    options.add_budget(parser)
    parser.add_argument(
        "--method",
        dest="methods",
        action="append",
        metavar="PATTERN",
        help="such as 'GNvpro*'; may be given several times",
    )
    parser.add_argument(
        "--problem",
        dest="problems",
        action="append",
        metavar="PATTERN",
        help="take only those whose names match, such as 'exp3*'; may be given several times",
    )
    parser.add_argument(
        "--known",
        type=Path,
        metavar="FILE",
        help="a result.json of the zoo, whose best values count, too",
    )


def run(
    *,
    quick: bool,
    seed: int,
    x64_only: bool | None,
    problems: Sequence[str] | None,
    methods: Sequence[str] | None,
    known: Path | None,
    output: Path,
    budget: float | None,
) -> None:
    """Runs every method on every problem, and writes profiles, statuses and what went wrong."""
    cases = _chosen("problem", problems, {case.name: case for case in CASES})
    names = _chosen("method", methods, {name: name for name in METHODS})
    if quick:
        cases = [case for case in cases if case.name in QUICK] if problems is None else cases
    precisions = (True, False) if x64_only is None else (x64_only,)
    seeds = range(seed, seed + (QUICK_STARTS if quick else STARTS))
    work = budget or (QUICK_WORK if quick else WORK)
    limit = Budget(work, SECONDS * work)
    records = hold(cases, names, precisions, seeds, limit)
    before = {} if known is None else json.loads(known.read_text(encoding="utf-8"))["results"]
    output.mkdir(parents=True, exist_ok=True)
    tables, results = [], {}
    for precision in precisions:
        name = PRECISIONS[precision]
        found = [record for record in records if record.job.x64 is precision]
        problems = gather(found, before.get(name, {}).get("best", {}))
        text, results[name] = report(name, problems, names, output)
        tables += text
    settings = {
        "quick": quick,
        "seeds": list(seeds),
        "problems": len(cases),
        "precisions": [PRECISIONS[precision] for precision in precisions],
        "budget": limit._asdict(),
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
        start = np.nanmin([record.start for record in runs.values()])
        floor = np.nanmin([record.floor for record in runs.values()])
        ends = [record.end for record in runs.values()]
        best = np.nanmin([start, *ends, known.get(name, np.nan)])
        scale = Scale(float(start), float(best), float(floor))
        problems.append(Problem(name, families[case], scale, runs))
    return problems


def report(
    precision: str, problems: Sequence[Problem], methods: Sequence[str], output: Path
) -> tuple[list[str], dict]:
    """Tables, and the same in numbers, of one precision; draws its profiles."""
    tables, families, panels = [], [], {}
    settled = [_settled(problem) for problem in problems]
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
            count = f"{precision}: % of {len(problems)} problems solved {name}"
            tables.append(profiles.table(f"{count}, within so much work or time", costs))
            tables += _verdict(precision, name, costs, settled)
        families.append(_by_family(f"{precision}: problems solved {name}", problems, costs))
    profiles.figure(output / f"profiles_{precision}.png", panels)
    tables += [*families, _fates(precision, problems, methods), *_complaints(precision, problems)]
    results = {
        "profiles": {
            name: {
                method: {
                    axis: profiles.shares(of_axes[axis], limits)
                    for axis, limits in profiles.LIMITS.items()
                }
                for method, of_axes in costs.items()
            }
            for name, costs in panels.items()
        },
        "best": {problem.name: problem.scale.best for problem in problems},
        "runs": {
            problem.name: {
                method: [r.end, r.status, *(x[-1] for x in (r.work_units, r.seconds) if len(x))]
                for method, r in problem.runs.items()
            }
            for problem in problems
        },
    }
    return tables, results


def _cost(problem: Problem, method: str, axis: str, target: float) -> float:
    record = problem.runs[method]
    return profiles.spent(record.values, getattr(record, axis), target)


def _settled(problem: Problem) -> bool:
    """Is the best value one at which a run has converged, and not where a budget ended?"""
    best = profiles.by_value(problem.scale, GAIN)
    return any(r.status == "CONVERGED" and r.end <= best for r in problem.runs.values())


def _verdict(precision, name, costs, settled: Sequence[bool]) -> Iterator[str]:
    """How many problems the default solves, and where its profile lies against the others'."""
    if "default" not in costs:
        return
    of_work = {method: cost["work_units"] for method, cost in costs.items()}
    counts = {method: int(np.isfinite(cost).sum()) for method, cost in of_work.items()}
    most = max(counts, key=counts.__getitem__)
    solved = np.isfinite(of_work["default"])[np.array(settled, bool)]
    lines = [
        f"{precision}, {name}:",
        f"  the default solves {counts['default']} of {len(settled)} problems, where the best of "
        f"all, {most}, solves {counts[most]};",
        f"  and {solved.sum()} of the {len(solved)} at whose best value one of these runs "
        "converged",
    ]
    limits = np.arange(30, 401)
    share = {method: 100 * profiles.shares(cost, limits) for method, cost in of_work.items()}
    peers = [s for method, s in share.items() if method in PEERS]
    forms = [s for method, s in share.items() if method.startswith("GNvpro")]
    for label, others in (("the peers", peers), ("its forms", forms)):
        if others:
            margin = share["default"] - np.max(others, axis=0)
            worst = int(np.argmin(margin))
            lines.append(
                f"  from 30 work units on it lies {margin[worst]:+.1f} points or more above the "
                f"envelope of {label} (at {limits[worst]})"
            )
    yield "\n".join(lines)


def _by_family(title, problems, costs) -> str:
    """How many problems of each family are solved at the end of the budget."""
    solved = {method: np.isfinite(cost["work_units"]) for method, cost in costs.items()}
    solved["anyone"] = np.any(list(solved.values()), axis=0)
    families = np.array([problem.family for problem in problems])
    rows = []
    for family in [*dict.fromkeys(families), "all"]:
        own = (families == family) | (family == "all")
        counts = [str(of_method[own].sum()) for of_method in solved.values()]
        rows.append([str(family), *counts, str(own.sum())])
    return text_table(f"{title}, at the end", ["", *solved, "of"], rows)


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
                str(sum(_above(problem, problem.runs[method]) for problem in problems)),
                str(sum(map(_false, runs))),
                f"{work:.0f}",
                f"{sum(record.seconds[-1] for record in ended):.0f}",
                f"{sum(record.compile_seconds for record in runs):.0f}",
            ]
        )
    columns = ["", *found, "above best", "false", "units a run", "seconds", "s to compile"]
    title = (
        f"{precision}: how the runs ended, and CONVERGED above best: where another run from this "
        f"start\nended lower by {GAIN:g}; false: where a point nearby, on the way that SciPy takes "
        f"from there, is"
    )
    return text_table(title, columns, rows)


def _above(problem: Problem, record: Record) -> bool:
    """Does a run say CONVERGED where another one found a lower point, be it far away?"""
    best = profiles.by_value(problem.scale, GAIN)
    return record.status == "CONVERGED" and record.end > best


def _false(record: Record) -> bool:
    """Does a run say CONVERGED where there is a lower point nearby?"""
    rounding = ULPS * np.finfo(record.job.precision).eps
    return record.gain > max(GAIN, rounding)


def _complaints(precision, problems) -> Iterator[str]:
    """Which runs say CONVERGED and are not, and which ended with no number, and why."""
    lines = []
    for problem in problems:
        for method, record in problem.runs.items():
            if _false(record):
                lines.append(
                    f"{problem.name}: {method} {record.status} at {record.end:.4g}, "
                    f"{record.gain:.1e} of it above a point nearby"
                )
            elif record.message and record.status != "REFUSED":
                lines.append(f"{problem.name}: {method} {record.status}: {record.message}")
    if lines:
        yield "\n".join([f"{precision}: runs to look at", "", *lines])
