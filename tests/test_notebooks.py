"""Notebooks: each is the executed pair of a script, looks like the others, and runs."""

import os
import re
import subprocess
import sys

import jupytext
import nbformat
import pytest
from repository import ROOT

SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))
MOST_BYTES = 800_000
SETTINGS = {
    "VARPROX_QUICK": "1",
    "MPLBACKEND": "agg",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in conftest.py
}
every_notebook = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def test_there_are_nine():
    assert [script.stem[:2] for script in SCRIPTS] == [f"0{k}" for k in range(1, 10)]


@every_notebook
def test_a_notebook_is_its_script_executed(script):
    path = script.with_suffix(".ipynb")
    assert path.stat().st_size < MOST_BYTES
    cells = nbformat.read(path, as_version=4).cells
    written = jupytext.read(script).cells
    assert [(cell.cell_type, cell.source) for cell in cells] == [
        (cell.cell_type, cell.source) for cell in written
    ]
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text


@every_notebook
def test_a_notebook_ends_with_what_to_change_and_to_try(script):
    text = script.read_text(encoding="utf-8")
    assert text.index("What to change") < text.index("What to try next")
    assert len(re.findall(r'tags=\["thumbnail"\]', text)) == 1


def test_notebooks_share_their_style():
    style = re.compile(r"^plt\.rcParams \|=.*?^COLOURS = .*?^}$", re.DOTALL | re.MULTILINE)
    styles = {style.search(script.read_text(encoding="utf-8"))[0] for script in SCRIPTS}
    assert len(styles) == 1


@every_notebook
def test_a_notebook_runs(script, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        env=os.environ | SETTINGS,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
