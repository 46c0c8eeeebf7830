"""HTML from the templates in this folder."""

import pathlib

import jinja2

from cxr import records


def write(path, template, filters=(), **values):
    """Render `template` (a file of this folder, everything escaped) with `values` to `path`, and return the path.

    `filters`: dict name → function for the template.
    """
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(filters)
    records.write_atomic(path, environment.get_template(template).render(values))
    return pathlib.Path(path)
