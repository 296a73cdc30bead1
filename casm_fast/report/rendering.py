"""Pages from templates: one HTML file each, its style inside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any


def write(template: str, context: Mapping[str, Any], output: str | Path) -> Path:
    """Write a page, whole or not at all.

    Args:
        template: Path below the package, such as ``"report/page.html.jinja"``. One that extends
            ``"report/base.html.jinja"`` gets head, style, header and footer from it.
        context: Values of the template's names, beside ``css``.
        output: The HTML file; folders are made.

    Returns:
        ``output``.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("casm_fast", "."),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    css = (resources.files("casm_fast.report") / "page.css").read_text(encoding="utf-8")
    html = environment.get_template(template).render(**context, css=Markup(css))
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    unfinished.write_text(html, encoding="utf-8")
    return unfinished.replace(output)
