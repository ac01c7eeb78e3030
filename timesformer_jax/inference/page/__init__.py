"""Pages that show results: one self-contained HTML file each, which opens offline.

Templates are Jinja2's. A page extends `base.html`, which has the head, the style for light and
dark, and blocks `main` and `script`. `player.html` has the macro `player`, a video with its
controls, which `createPlayer` of `player.js` drives. A page loads nothing: its policy (CSP) allows
only what the file itself holds.
"""

from __future__ import annotations

import base64
import functools
import importlib.resources
import time
from typing import Any

import jinja2
import markupsafe

import timesformer_jax
from timesformer_jax import storage


def render(template: str, **context: Any) -> str:
    """The HTML of a page.

    Args:
      template: a file of this folder. `asset(NAME)` in it is the text of another file, unescaped.
      context: its variables. Text is escaped, so that file names and labels cannot be markup;
        `{{ x|tojson }}` is safe within a script element.

    Raises:
      jinja2.UndefinedError: if the template needs a variable that is not given.
    """
    about = {
        "version": timesformer_jax.__version__,
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
    }
    return _environment().get_template(template).render(about | context)


def write(path: str, html: str) -> None:
    """Writes a page: the whole file, or nothing.

    Raises:
      InputError: if the file cannot be written.
    """
    with storage.disk_errors(path):
        storage.write_atomically(storage.absolute(path), html.encode())


def data_uri(content: bytes, kind: str) -> str:
    """A file as a URI, for `src`.

    Args:
      kind: its media type, such as "video/mp4" or "image/jpeg".
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__name__, ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["asset"] = _asset
    return environment


def _asset(name: str) -> markupsafe.Markup:
    return markupsafe.Markup(importlib.resources.files(__name__).joinpath(name).read_text("utf-8"))
