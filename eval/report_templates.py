"""Templates of the reports' pages (pages/*.j2), filled in with plain values; what users wrote is escaped.

page = fill("look.html.j2", {"command": "python -m eval …"})         Markup, to be put into another page as it is
"""

from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from markupsafe import Markup


def fill(template: str, values: Mapping[str, Any], **filters: Callable[..., str]) -> Markup:
    """`filters` are the page's own, beside those that all pages have; a value that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eval", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, thousands=thousands, short=short, **filters)
    return Markup(environment.get_template(template).render(values))


def percent(value: float, digits: int = 1) -> str:
    """A share, without the sign."""
    return f"{100 * value:.{digits}f}"


def thousands(number: int) -> str:
    return f"{number:,}"


def short(digest: str) -> str:
    return digest[:12]
