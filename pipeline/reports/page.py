"""What every report page is made of: its figures as JSON, its template, all in one file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pipeline.reports import figures


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure of the page; None where the run has nothing to draw."""

    title: str
    caption: str = ""
    figure: go.Figure | None
    wide: bool = False

    @property
    def height(self) -> int:
        """Height of the figure, in pixels."""
        assert self.figure is not None
        return int(self.figure.layout.height or figures.TEMPLATE.layout.height)

    def json(self) -> Markup:
        """The figure as JSON that is safe within a script element."""
        assert self.figure is not None
        # A name that holds "</script>" must not end the element; "<" is not needed in JSON.
        text = self.figure.to_json().replace("<", "\\u003c").replace(">", "\\u003e")
        return Markup(text.replace("&", "\\u0026"))


def render_page(template: str, package: str = "pipeline.reports", **values: Any) -> str:
    """Return a page that holds all it needs: scripts, styles and data.

    Args:
        template: its name in the folder `templates` of `package` or of this package.
        package: the package that has the template.
        **values: what the template names.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(name) for name in (package, "pipeline.reports")]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.trim_blocks = environment.lstrip_blocks = True
    return environment.get_template(template).render(
        colours=figures.COLOURS, plotly_js=Markup(get_plotlyjs()), **values
    )
