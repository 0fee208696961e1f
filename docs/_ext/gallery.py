"""The notebooks as pages of the site, and `{gallery}`, which shows them as cards.

They come from `notebooks/` beside this folder, and go with their thumbnails to `docs/notebooks`.
A thumbnail is the first picture that the cell with the tag "thumbnail" shows.
"""

import base64
import json
import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

CARD = """\
:::{{grid-item-card}} {title}
:link: notebooks/{name}
:link-type: doc
{picture}
{summary}
:::
"""


def copy(app):
    """Makes `docs/notebooks` hold what `notebooks/` has, and nothing else."""
    target = Path(app.srcdir, "notebooks")
    target.mkdir(exist_ok=True)
    wanted = set()
    for notebook in sorted(Path(app.srcdir).parent.glob("notebooks/*.ipynb")):
        page, thumbnail = target / notebook.name, target / f"{notebook.stem}.png"
        picture = _picture(_cells(notebook))
        wanted |= {page, thumbnail} if picture else {page}
        if page.exists() and page.stat().st_mtime == notebook.stat().st_mtime:
            continue
        shutil.copy2(notebook, page)  # with its date, by which Sphinx knows what has changed
        if picture:
            thumbnail.write_bytes(picture)
    for path in set(target.iterdir()) - wanted:
        path.unlink()


class Gallery(SphinxDirective):
    """A card for each notebook."""

    def run(self) -> list[nodes.Node]:
        pages = sorted(Path(self.env.srcdir, "notebooks").glob("*.ipynb"))
        self.env.note_reread()  # notebooks may come and go
        if not pages:
            return []
        cards = "".join(map(_card, pages))
        entries = "\n".join(f"notebooks/{page.stem}" for page in pages)
        text = f"::::{{grid}} 1 2 2 3\n:gutter: 3\n\n{cards}::::\n\n"
        text += f"```{{toctree}}\n:hidden:\n\n{entries}\n```\n"
        parent = nodes.container()
        lines = StringList(text.splitlines(), source=self.env.docname)
        self.state.nested_parse(lines, self.content_offset, parent)
        return parent.children


def _card(page):
    title, summary = _beginning(_cells(page))
    has_picture = page.with_suffix(".png").exists()
    picture = f":img-top: notebooks/{page.stem}.png\n:img-alt: {title}\n" if has_picture else ""
    return CARD.format(name=page.stem, title=title, summary=summary, picture=picture)


def _cells(notebook):
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def _beginning(cells):
    """The title, and the first sentence below it."""
    heading, _, rest = "".join(cells[0]["source"]).partition("\n")
    paragraph = " ".join(rest.strip().split("\n\n")[0].split())
    return heading.lstrip("# "), re.match(r".*?[.!?](?= |$)|.*", paragraph)[0]


def _picture(cells):
    """The first PNG of the tagged cell, or None."""
    for cell in cells:
        if "thumbnail" in cell["metadata"].get("tags", []):
            for output in cell["outputs"]:
                if "image/png" in output.get("data", {}):
                    return base64.b64decode("".join(output["data"]["image/png"]))
    return None


def setup(app):
    app.connect("builder-inited", copy)
    app.add_directive("gallery", Gallery)
    return {"parallel_read_safe": True}
