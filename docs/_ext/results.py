"""`{results} NAME`: what an experiment has measured, read from `benchmarks/results/NAME`.

The tables are those of `table.txt`, letter by letter; where and when they were measured says
`result.json`. `:tables: 2 3` shows these and folds the others away, or leaves them out if `:only:`.
"""

import json
from datetime import datetime
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective


class Results(SphinxDirective):
    """The tables of an experiment, and a sentence on where they come from."""

    required_arguments = 1
    option_spec = {"tables": directives.positive_int_list, "only": directives.flag}

    def run(self) -> list[nodes.Node]:
        folder = Path(self.env.srcdir).parent / "benchmarks" / "results" / self.arguments[0]
        if not folder.exists():
            self.env.note_reread()
            return [nodes.paragraph("", "", nodes.emphasis("", "Not measured yet."))]
        for name in ("table.txt", "result.json"):
            self.env.note_dependency(str(folder / name))
        tables = (folder / "table.txt").read_text(encoding="utf-8").strip("\n").split("\n\n\n")
        blocks = [nodes.literal_block(table, table, language="none") for table in tables]
        numbers = self.options.get("tables", range(1, len(blocks) + 1))
        shown = [blocks[number - 1] for number in numbers]
        others = [block for block in blocks if block not in shown]
        if others and "only" not in self.options:
            count = "The other table" if len(others) == 1 else f"The other {len(others)} tables"
            shown.append(nodes.raw("", f"<details><summary>{count}</summary>", format="html"))
            shown += [*others, nodes.raw("", "</details>", format="html")]
        source = provenance(json.loads((folder / "result.json").read_text(encoding="utf-8")))
        return [*shown, nodes.paragraph("", "", nodes.emphasis(source, source))]


def provenance(result: dict) -> str:
    """Where and when it was measured, in a sentence."""
    machine = result["machine"]
    date = datetime.fromisoformat(result["date"])
    if "commit" in result:
        code = f"commit {result['commit']}"
    else:  # results of before they named it
        code = f"version {machine['varprox']} (entered with commit {result['entered_with']})"
    precisions = " and ".join(result["settings"].get("precisions", [machine["dtype"]]))
    device = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    processor = f"{machine['processor']} ({cores})"
    return (
        f"Measured on {date.day} {date:%B %Y} with varprox {code}: {device}{processor}, "
        f"{precisions}, Python {machine['python']}, JAX {machine['jax']}."
    )


def setup(app):
    app.add_directive("results", Results)
    return {"parallel_read_safe": True}
