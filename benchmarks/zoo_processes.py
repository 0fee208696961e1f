"""The zoo's processes: one a core, which runs one job after another.

A run that hangs or crashes is noted, its process replaced, and the others go on.
"""

import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Sequence

import jax

from benchmarks import zoo_runs
from benchmarks.zoo_problems import Case
from benchmarks.zoo_runs import Budget, Job, Record

HANGS = 300.0  # seconds without an answer, compilation included


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
                print(f"{group[0].precision} {group[0].case}: {done} runs", flush=True)
        worker.stop()

    threads = [threading.Thread(target=drive, args=(core,)) for core in _cores()[: len(groups)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = {case.name: k for k, case in enumerate(cases)}
    return sorted(records, key=lambda r: (not r.job.x64, order[r.job.case], r.job.seed))


def _cores():
    """Those that a process is bound to; an accelerator is used by one process alone, for which this
    one leaves it some memory."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
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
