"""A directive that lists the settings of every command, from the same texts as `anyorder COMMAND --help`."""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from anyorder.settings import describe
from anyorder.stages.experiment import STAGES


class Commands(SphinxDirective):
    """A section for each stage: what it does, then its settings as the help text prints them."""

    def run(self) -> list[nodes.Node]:
        """The sections."""
        sections: list[nodes.Node] = []
        for name, stage in STAGES.items():
            section = nodes.section(ids=[f"command-{name}"])
            section += nodes.title(text=name)
            section += nodes.paragraph(text=(stage.__doc__ or "").strip().partition("\n\n")[0])
            section += nodes.literal_block(text=describe(stage), language="text")
            sections.append(section)
        return sections


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("anyorder-commands", Commands)
    return {"parallel_read_safe": True}
