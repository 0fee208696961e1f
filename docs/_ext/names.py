"""Links from names in code type to the pages of the API.

On pages these are names that begin with `vp.` or `varprox.`; in docstrings public names as well.
"""

import inspect
import re
from dataclasses import dataclass

from docutils import nodes
from sphinx.addnodes import desc_content, pending_xref
from sphinx.transforms import SphinxTransform
from sphinx.util.inspect import stringify_signature

import varprox
from varprox import datasets, networks

CODE = re.compile(r"([\w.]+)(\(.*\))?", re.DOTALL)  # a name, or a call
PLACES = {name: f"{part.__name__}.{name}" for part in (datasets, networks) for name in part.__all__}
PLACES |= {name: f"varprox.{name}" for name in varprox.__all__}


class Links(SphinxTransform):
    """Makes links of literals such as `vp.fit` and `vp.fit(problem, …)`."""

    default_priority = 10  # before references are looked up

    def apply(self, **kwargs):
        for literal in list(self.document.findall(nodes.literal)):
            target = self.target(literal)
            if target is None or isinstance(literal.parent, nodes.reference | pending_xref):
                continue
            link = pending_xref(
                "",
                literal.deepcopy(),
                refdomain="py",
                reftype="obj",
                reftarget=target,
                refexplicit=True,
                refdoc=self.env.docname,
            )
            literal.replace_self(link)

    def target(self, literal):
        """What a literal names, or None."""
        found = CODE.fullmatch(literal.astext())
        if found is None:
            return None
        first, dot, rest = found[1].partition(".")
        if dot:
            return f"varprox.{rest}" if first in ("vp", "varprox") else None
        in_docstring = any(isinstance(node, desc_content) for node in _above(literal))
        return PLACES.get(first) if in_docstring else None


def _above(node):
    while node := node.parent:
        yield node


def own_signature(app, what, name, obj, options, signature, returned):
    """That of `__init__`, which the metaclass of flax hides behind its own."""
    if what == "class" and signature and signature.startswith("(*args"):
        _, *parameters = inspect.signature(obj.__init__).parameters.values()  # without self
        own = inspect.Signature([p.replace(default=_named(p.default)) for p in parameters])
        signature = stringify_signature(own, unqualified_typehints=True)
    return signature, returned


@dataclass(repr=False)
class _Named:
    """A function as a default."""

    name: str

    def __repr__(self):
        return self.name


def _named(default):
    is_function = callable(default) and default is not inspect.Parameter.empty
    return _Named(default.__name__) if is_function else default


def setup(app):
    app.add_transform(Links)
    app.connect("autodoc-process-signature", own_signature)
    return {"parallel_read_safe": True}
