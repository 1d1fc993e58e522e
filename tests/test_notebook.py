"""The quickstart notebook runs from its first cell to its last, with tiny models in place of the downloads."""

from pathlib import Path

import nbclient
import nbformat
import pytest

import keras_t5gemma as kt
from keras_t5gemma.config import StackConfig
from keras_t5gemma.demo.pretraining import build_gemma2, save_gemma2

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
STACK = StackConfig(1, 16, 24, 2, 1, 8, sliding_window=8)


@pytest.fixture
def parameters(tmp_path):
    """The source of the cell that names the models, naming tiny random ones instead."""
    proto = kt.train_tokenizer([path.read_text(encoding="utf-8") for path in ROOT.glob("*.md")], 500)
    preset, gemma2 = tmp_path / "t5gemma", tmp_path / "gemma2"
    tokenizer = kt.T5GemmaTokenizer(proto=proto)
    backbone = kt.T5GemmaBackbone(STACK, STACK, vocabulary_size=500)
    kt.export_to_hugging_face(backbone, preset, tokenizer=tokenizer, chat=True)
    save_gemma2(build_gemma2(STACK, 500), proto, gemma2)
    return f"PRESET = {str(preset)!r}\nGEMMA2 = {str(gemma2)!r}\n"


def test_quickstart_with_tiny_models_runs_to_its_end(parameters):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    cell.source = parameters
    # From the checkout's root, where the package is importable whether or not it is installed.
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_quickstart_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
