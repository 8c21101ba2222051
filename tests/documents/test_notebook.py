"""The notebook of the examples runs from top to bottom, in one namespace, without a server of notebooks."""

import json

import matplotlib
import pytest
import torch
from documents.code_blocks import ROOT

NOTEBOOK = ROOT / "examples" / "replay_in_a_notebook.ipynb"


@pytest.fixture(scope="module")
def names():
    """What the cells leave behind."""
    matplotlib.use("Agg")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="ascii"))["cells"] if cell["cell_type"] == "code"]
    left: dict = {}
    for number, cell in enumerate(cells, 1):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), left)
    yield left
    left["plt"].close("all")


def test_it_records_and_draws(names):
    assert names["routes"].shape == (4, 32, 4, 4)
    assert names["selected"].sum(1).eq(4).all()  # K marks a token
    (image,) = names["axes"].get_images()
    assert torch.equal(torch.tensor(image.get_array().data), names["selected"].T)


def test_it_learns_through_the_record(names):
    assert len(names["losses"]) == 5
    assert names["losses"][-1] < names["losses"][0]
    assert names["changed"][-1] > 0.0  # live routing differs, so that replay has something to do
    assert not torch.equal(names["replayed"], names["live"])


def test_nothing_stays_attached(names):
    model = names["model"]
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    with torch.no_grad():
        live = model(names["out"].sequences, labels=names["labels"]).loss
    assert torch.equal(live, names["live"])


def test_it_is_small_and_holds_no_output():
    assert NOTEBOOK.stat().st_size < 150_000
    cells = json.loads(NOTEBOOK.read_text(encoding="ascii"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
