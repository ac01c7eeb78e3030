"""The notebooks of examples/: they run from an empty folder, and a reader sees what they show."""

import re

import nbformat
import pytest
from conftest import REPOSITORY, environment
from run_notebooks import NOTEBOOKS, executed

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))

# What an output says, as a pattern.
SAID = {
    "cost_of_schemes": r"divided +206 +121\.6 +195\.8\n",
    "finetune_on_a_folder": r"\[yellow \d+\.\d%, ",
    "predict_and_explain": r"\[green \d+\.\d%, ",
}


def outputs(notebook):
    """The outputs of all cells as text, and the number of pictures."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    data = [output.get("data", {}) for output in found]
    text = [output.get("text", "") for output in found] + [x.get("text/plain", "") for x in data]
    return "\n".join(text), sum("image/png" in x for x in data)


@pytest.mark.processes
@pytest.mark.training
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_runs_in_an_empty_folder(path, tmp_path):
    text, pictures = outputs(executed(path, tmp_path, environment()))
    assert re.search(SAID[path.stem], text), text
    assert pictures == outputs(nbformat.read(path, as_version=4))[1]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_is_kept_as_it_ran_with_its_pictures(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    text, pictures = outputs(notebook)
    assert pictures
    assert re.search(SAID[path.stem], text)
    assert path.stat().st_size < 300_000
    assert str(REPOSITORY) not in path.read_text()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_opens_in_colab_and_installs_from_where_the_source_is_published(path):
    """OWNER stands there until CITATION.cff says where that is (docs/releasing.md)."""
    citation = (REPOSITORY / "CITATION.cff").read_text()
    published = re.search(r'^repository-code: "?https://github.com/([^"\s]+)', citation, re.M)
    name = published[1] if published else "OWNER/timesformer_jax"
    first, install = nbformat.read(path, as_version=4).cells[:2]
    badge = f"https://colab.research.google.com/github/{name}/blob/main/examples/notebooks/"
    assert f"]({badge}{path.name})" in first.source
    assert f" @ git+https://github.com/{name}" in install.source
    for target in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
