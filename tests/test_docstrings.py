"""The docstrings of the public names: their form, and their examples, which run as they stand."""

import doctest
import enum
import inspect
import re

import pytest
from flax import nnx

import varprox as vp

HEADERS = re.compile(r"^(Arguments|Attributes|Returns|Raises|Example|Source):\n", re.MULTILINE)
ENTRY = re.compile(r"^ {4}\*{0,2}(\w+):", re.MULTILINE)
FORGIVING = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def functions(module):
    """The names of the public functions that a module defines."""
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    ]


MODULES = [
    (vp, vp.__all__),
    (vp.datasets, vp.datasets.__all__),
    (vp.networks, vp.networks.__all__),
    (vp.nnx, functions(vp.nnx)),
    (vp.equinox, functions(vp.equinox)),
    (vp.transforms, functions(vp.transforms)),
]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in MODULES
    for name in names
}


def parameters(value):
    """What a user passes or, of an enumeration, meets."""
    if inspect.isclass(value) and issubclass(value, enum.Enum):
        return list(value.__members__)
    # Flax's classes are called through a metaclass that takes anything.
    if inspect.isclass(value) and issubclass(value, nnx.Module):
        return list(inspect.signature(value.__init__).parameters)[1:]
    return list(inspect.signature(value).parameters)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_has_its_sections(name):
    value = PUBLIC[name]
    text, *parts = HEADERS.split(inspect.getdoc(value))
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    assert len(sections) == len(parts) // 2
    summary, *_ = text.split("\n\n")
    assert re.fullmatch(r"\S.*\.", summary.strip())

    named = [
        entry
        for title in ("Arguments", "Attributes")
        for entry in ENTRY.findall(sections.get(title, ""))
    ]
    assert named == parameters(value)
    assert ("Returns" in sections) == (not inspect.isclass(value))
    assert "Example" in sections


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_run(name, standard_promotion, rank_promotion):
    """As their readers run them, under JAX's usual promotion."""
    tests = doctest.DocTestFinder().find(PUBLIC[name], name, globs={})
    assert any(test.examples for test in tests)
    runner = doctest.DocTestRunner(verbose=False, optionflags=FORGIVING)
    report = []
    failed = sum(runner.run(test, out=report.append).failed for test in tests)
    assert not failed, "".join(report)
