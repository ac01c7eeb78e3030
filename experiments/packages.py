"""Draws the packages of timesformer_jax into docs/design.md: their lines, and what each imports.

    python experiments/packages.py [--check]

The order is that of the layers in pyproject.toml, the imports are those of the code. With --check
nothing is written, and the exit status is 1 if the page's packages or imports are not the code's
(the numbers of lines may differ). `make packages` draws, `make lint` checks.
"""

import argparse
import pathlib
import re
import sys
import tomllib

import grimp

REPOSITORY = pathlib.Path(__file__).parents[1]
ROOT = "timesformer_jax"
PAGE = REPOSITORY / "docs" / "design.md"
BEGIN, END = "<!-- packages: begin -->\n", "<!-- packages: end -->\n"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    before, _, rest = PAGE.read_text().partition(BEGIN)
    found, _, after = rest.partition(END)
    block = "```\n" + drawing(layers()) + "```\n"
    if not check:
        PAGE.write_text(before + BEGIN + block + END + after)
    elif _imports(found) != _imports(block):
        print(f"{PAGE.name} draws other packages or imports than the code has: run make packages")
        return 1
    return 0


def layers() -> list[list[str]]:
    """The packages of each layer, from the top, of the contract named "Packages"."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    packages = next(contract for contract in contracts if contract["name"] == "Packages")
    return [layer.split(" | ") for layer in packages["layers"]]


def drawing(layers: list[list[str]]) -> str:
    """One line a package: its lines of code, and what it imports from; layers stand apart."""
    graph = grimp.build_graph(ROOT, cache_dir=None)
    order = [package for layer in layers for package in layer]
    width = max(map(len, order))
    text = f"{'package':{width}}  lines  imports from\n"
    for layer in layers:
        text += "\n"
        for package in layer:
            imported = sorted(_imported(graph, package), key=order.index)
            text += f"{package:{width}} {_lines(package):6}  {' '.join(imported)}".rstrip() + "\n"
    return text


def _imported(graph: grimp.ImportGraph, package: str) -> set[str]:
    """The other packages that a module of this package imports."""
    module = f"{ROOT}.{package}"
    found = set()
    for each in {module, *graph.find_descendants(module)}:
        for imported in graph.find_modules_directly_imported_by(each):
            if imported != ROOT:
                found.add(imported.split(".")[1])
    return found - {package}


def _lines(package: str) -> int:
    path = REPOSITORY / ROOT / package
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    return sum(len(file.read_text().splitlines()) for file in files)


def _imports(block: str) -> list[list[str]]:
    """The words of each line but numbers."""
    return [re.sub(r" \d+ ", " ", line + " ").split() for line in block.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
