"""The command `python -m benchmarks`, run as a person would run it."""

import json
import re
import subprocess
import sys
from argparse import ArgumentParser
from functools import partial
from importlib import import_module
from inspect import signature

import pytest
from repository import ROOT

from benchmarks.__main__ import experiments, main
from benchmarks.competitors import METHODS
from benchmarks.experiment import spend, text_table


def benchmarks(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_lists_the_experiments():
    done = benchmarks("--help")
    assert done.returncode == 0
    for name in experiments():
        assert f"\n    {name}" in done.stdout


@pytest.mark.parametrize("name", ["indian_pines", "peaks", "ellipse"])
def test_help_of_an_experiment_lists_its_options(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    printed = capsys.readouterr().out
    for option in ("--quick", "--seed", "--method", "--output", "--x64", "--x32"):
        assert option in printed
    assert all(method in printed for method in METHODS)


def test_an_experiment_owns_its_options():
    """Whoever adds one adds a module, and nothing else."""
    for name, summary in experiments().items():
        module = import_module(f"benchmarks.{name}")
        parser = ArgumentParser()
        module.add_options(parser)
        options = {n for n in vars(parser.parse_args([])) if n not in ("x64", "default_methods")}
        run = module.run.func if isinstance(module.run, partial) else module.run
        given = {n for n, p in signature(run).parameters.items() if p.kind is p.KEYWORD_ONLY}
        assert options == given, name
        assert len(summary) < 200


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "required: EXPERIMENT"),
        (["mnist"], "invalid choice: 'mnist'"),
        (["peaks", "--method", "newton"], "--method: invalid choice: 'newton'"),
        (["peaks", "--seed", "-1"], "--seed: expected an integer ≥ 0, got '-1'"),
        (["peaks", "--budget", "none"], "--budget: expected a number ≥ 2, got 'none'"),
        (["peaks", "--x64", "--x32"], "not allowed with argument"),
        (["ellipse", "--normalise", "band"], "unrecognized arguments: --normalise"),
        (["autoencoder", "--epochs", "0"], "--epochs: expected an integer ≥ 1, got '0'"),
        (["autoencoder", "--method", "lbfgs"], "--method: invalid choice: 'lbfgs'"),
        (["cifar10", "--method", "lbfgs"], "--method: invalid choice: 'lbfgs'"),
        (["cifar10", "--budget", "1"], "--budget: expected a number ≥ 2, got '1'"),
        (["race", "--method", "gnvpro"], "--method: invalid choice: 'gnvpro'"),
        (["cdr", "--method", "lbfgs"], "--method: invalid choice: 'lbfgs'"),
        (["dcr", "--width", "1"], "--width: expected an integer ≥ 2, got '1'"),
        (["dcr", "--seeds", "none"], "--seeds: expected an integer ≥ 1, got 'none'"),
        (["peaks", "--seeds", "3"], "unrecognized arguments: --seeds"),
    ],
)
def test_a_bad_command_line_is_refused(arguments, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "folder", sorted((ROOT / "benchmarks" / "results").iterdir()), ids=lambda p: p.name
)
def test_every_result_names_a_commit(folder):
    """The one it was made at; those of before that was written down, the one they came with."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert re.fullmatch(r"[0-9a-f]{7,}", result.get("commit") or result["entered_with"])


def test_a_run_writes_what_it_prints(tmp_path):
    done = benchmarks(
        *("peaks", "--quick", "--budget", 40, "--method", "lbfgs", "--output", tmp_path)
    )
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.txt").read_text(encoding="utf-8")
    assert table in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        *("table.txt", "result.json", "convergence.png", "surface.png")
    }

    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["experiment"] == "peaks"
    assert result["machine"]["dtype"] == "float64"
    assert result["machine"]["cores"] >= 1
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", result["commit"])
    assert str(tmp_path) not in json.dumps(result)
    line = table.splitlines()[-1].split()
    row = result["results"]["L-BFGS"]
    # The table shows what the best run had reached without spending more than its budget.
    objectives = [
        [
            value
            for work, value in zip(
                *(run["history"][c] for c in ("work_units", "objective")), strict=True
            )
            if work <= 40
        ]
        for run in result["runs"]
    ]
    assert row["median"] == [min(values[-1] for values in objectives)]
    assert line[:2] == ["L-BFGS", f"{row['median'][0]:.2e}"]
    assert line[-2:] == [f"{row['compile_seconds']:.1f}", f"{row['seconds']:.1f}"]
    assert {run["variant"] for run in result["runs"]} == {
        *("optax from W(θ)", "optax from random W"),
        *("SciPy from W(θ)", "SciPy from random W"),
    }


def test_spend_ends_the_budgets_at_the_last():
    assert spend((100, 250, 500), None) == (100, 250, 500)
    assert spend((100, 250, 500), 300.0) == (100, 250, 300.0)
    assert spend((100, 250, 500), 50.0) == (50.0,)


def test_text_table_is_aligned():
    table = text_table("Title", ["", "a", "long"], [["x", "1.50", "2"], ["longer", "3", "4"]])
    assert table.splitlines() == [
        "Title",
        "",
        "           a  long",
        "------------------",
        "x       1.50     2",
        "longer     3     4",
    ]
