"""Tables that scripts write into the pages of docs/, between marks."""

from __future__ import annotations

import pathlib

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def markdown_table(head: list, lines: list[list], words: int) -> str:
    """A table whose first `words` columns hold words, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, rule, *lines])


def replace_table(page: str, script: str, name: str, text: str) -> str:
    """The page with `text` between the marks that `script` has there for the table `name`."""
    begin, end = f"<!-- {script}: {name} -->", f"<!-- {script}: end of {name} -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
