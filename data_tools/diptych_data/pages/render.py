"""Templates beside this file become pages that need nothing but themselves; whatever comes from data is escaped."""

import jinja2

from diptych.version import __version__


def render(template: str, context: dict[str, object]) -> str:
    """A complete HTML page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diptych_data", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context | {"version": __version__})
