"""Links of docs/ as the site has them; a hook of mkdocs.yml.

A link that leaves docs/ leads to the repository, as in setup.py; where CITATION.cff names none, its
text stays. A link that is called by the name of a page's file is called by its title.
"""

from __future__ import annotations

import pathlib
import posixpath
import re
from typing import Any

REPOSITORY = pathlib.Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[([^]]*)\]\((?!\w+:|#)([^)]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its links changed."""
    citation = (REPOSITORY / "CITATION.cff").read_text()
    address = re.search(r'^repository-code: "?([^"\s]+)', citation, re.MULTILINE)

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        path = posixpath.normpath(posixpath.join("docs", page.file.src_uri, "..", target))
        if path.startswith("docs/"):
            file = target.partition("#")[0]
            return f"[{_title(path) if text == file else text}]({target})"
        return f"[{text}]({address[1].rstrip('/')}/blob/main/{path})" if address else text

    return LINK.sub(link, markdown)


def _title(path: str) -> str:
    page = REPOSITORY / path.partition("#")[0]
    return page.read_text().partition("\n")[0].removeprefix("# ")
