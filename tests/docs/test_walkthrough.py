"""The walkthrough runs from its first cell to its last, and what is stored in it is what it shows."""

import re

import pytest
from conftest import ROOT

PATH = ROOT / "docs" / "walkthrough.ipynb"


def printed(notebook):
    """What each cell prints, without fractions, which differ a little from one processor to another; its images."""
    for cell in notebook.cells:
        outputs = cell.get("outputs", ())
        text = "".join(output.get("text", "") for output in outputs)
        yield re.sub(r"\d+\.\d+", "#", text), sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_walkthrough_shows_what_is_stored_in_it(monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(PATH, 4)
    stored = list(printed(notebook))
    assert PATH.stat().st_size < 1_000_000
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": PATH.parent}}).execute()
    assert list(printed(notebook)) == stored, "run jupyter-execute --inplace docs/walkthrough.ipynb, and look at it"
