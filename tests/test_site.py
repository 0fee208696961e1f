"""The site: what its pages say of the package holds, without building them."""

import inspect
import math
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from repository import ROOT, snippets

import varprox as vp
from benchmarks.__main__ import experiments

DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("api/*.md")])
TEXTS = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
ROOMS = {"gnvpro": "methods", "quasi_newton": "methods", "choice": "training"}
MODULES = {name: import_module(f"varprox.{room}.{name}") for name, room in ROOMS.items()}


def documented():
    """What the pages of the API show, as `varprox.…`."""
    text = "".join(text for name, text in TEXTS.items() if name.startswith("api/"))
    return re.findall(r"^\.\. auto(?:function|class):: (\S+)$", text, re.MULTILINE)


def public_functions(module):
    """Those that a module without `__all__` defines."""
    members = inspect.getmembers(module, inspect.isfunction)
    return [n for n, fn in members if fn.__module__ == module.__name__ and n[0] != "_"]


def test_every_public_name_stands_on_a_page_of_the_api_once():
    names = [f"varprox.{name}" for name in vp.__all__]
    for part in (vp.datasets, vp.networks):
        names += [f"{part.__name__}.{name}" for name in part.__all__]
    for part in (vp.nnx, vp.equinox, vp.transforms):
        names += [f"{part.__name__}.{name}" for name in public_functions(part)]
    assert sorted(set(names) - set(documented())) == []
    assert len(documented()) == len(set(documented()))


@pytest.mark.parametrize("name", documented())
def test_what_the_api_shows_exists(name):
    module, _, attribute = name.rpartition(".")
    assert inspect.getdoc(getattr(import_module(module), attribute))


def anchors(text):
    """Those of headings, and those set by hand."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    return slugs | set(re.findall(r"^\((\S+)\)=$", text, re.MULTILINE))


@pytest.mark.parametrize("name", TEXTS)
def test_relative_links_and_pictures_are_there(name):
    page, text = DOCS / name, TEXTS[name]
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    links += re.findall(r"^```\{(?:figure|include)\} (\S+)$", text, re.MULTILINE)
    links += [f"{link}.md" for link in re.findall(r"^:link: (\S+)$", text, re.MULTILINE)]
    for link in links:
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.is_file(), link
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), link


def test_links_of_notebooks_lead_to_notebooks():
    scripts = sorted((ROOT / "notebooks").glob("*.py"))
    for script in scripts:
        for link in re.findall(r"\]\((\w+)\.ipynb\)", script.read_text(encoding="utf-8")):
            assert script.with_name(f"{link}.py") in scripts, (script.name, link)


def test_every_page_is_in_a_table_of_contents():
    listed = {"index.md"}
    for name, text in TEXTS.items():
        for block in re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL):
            entries = [line for line in block.splitlines() if line and line[0] != ":"]
            listed |= {(Path(name).parent / f"{entry}.md").as_posix() for entry in entries}
    assert listed == set(TEXTS)


def test_links_to_the_repository_are_those_of_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    source = settings["project"]["urls"]["Source"]
    for name, text in TEXTS.items():
        for url in re.findall(r"https?://[^\s)>\]]+varprox-jax[^\s)>\]]*", text):
            assert url.startswith(source), (name, url)


def test_the_tour_runs(tmp_path, pytestconfig):
    assert len(snippets("tour")) > 5
    script = tmp_path / "tour.py"
    script.write_text("\n".join(snippets("tour")), encoding="utf-8")
    quick = {  # as in conftest.py
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(pytestconfig.cache.mkdir("jax")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "PYTHONPATH": str(ROOT),
    }
    warnings = ("error", "ignore:Error reading persistent", "ignore:Error writing persistent")
    options = [argument for warning in warnings for argument in ("-W", warning)]
    done = subprocess.run(
        [sys.executable, *options, script.name],
        cwd=tmp_path,
        env=os.environ | quick,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_experiment_and_every_result_is_shown():
    text = TEXTS["experiments.md"]
    for experiment in experiments():
        assert re.search(rf"^python -m benchmarks {experiment}\b", text, re.MULTILINE), experiment
    shown = re.findall(r"^```\{results\} (\S+)$", text, re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert {path.name for path in RESULTS.iterdir() if path.is_dir()} <= set(shown)
    assert set(experiments()) <= {name.removesuffix("_quick") for name in shown}


def test_debugging_knows_every_status_and_every_column():
    text = TEXTS["debug.md"]
    for status in vp.Status:
        assert f"| `{status.name}` | {status.message} |" in text
    infos = (MODULES["gnvpro"].Info, MODULES["quasi_newton"].Info)
    infos += (import_module("varprox.methods.slimtrain").Info,)
    columns = {field for info in infos for field in info._fields}
    columns |= {"train_loss", "validation_loss", "work_units", "seconds", "level"}
    for column in columns:
        assert f"| `{column}` |" in text


def test_what_fit_chooses_is_what_the_page_says():
    text = " ".join(TEXTS["choose.md"].split())
    choice = MODULES["choice"]
    whole, most = math.isqrt(choice.WHOLE // 8), math.isqrt(choice.MAX_BYTES // 8)
    assert f"at most {choice.WHOLE // 2**20} MiB: {whole} weights in double precision" in text
    assert f"it may take {choice.MAX_BYTES // 2**30} GiB: {most:,} weights" in text
    assert f"this holds up to {choice.FEW} weights" in text
