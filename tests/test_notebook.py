"""The quickstart notebook runs from its first cell to its last, with tiny models in place of the downloads."""

import ast
import re
from pathlib import Path

import keras
import nbclient
import nbformat
import pytest
from helpers.stand_ins import write_stand_ins

import keras_t5gemma as kt
from keras_t5gemma.checkpoints.tensor_table import parameter_count
from keras_t5gemma.presets import PAIRS, STACKS

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
PRESET, GEMMA2 = "t5gemma_b_b_prefixlm_it", "gemma2_2b_en"
# The dtypes that the notebook has for a CPU, a T4 and others, each on one backend; and both ways to train.
FORMS = {"jax": ("bfloat16", True), "tensorflow": ("float32", False), "torch": ("float16", False)}
# Tiny models of random weights have more to learn than any preset. What has changed is what was to be trained.
TRIAL = """
PRESET, GEMMA2, DTYPE, TRAIN_ALL = {!r}, {!r}, {!r}, {}
HELD_OUT, PAIRS, BATCH, EPOCHS, STEPS, RATE = 4, 32, 8, 10, 20, 0.05
"""
# After cells that hold these words.
OUTCOMES = {
    "right_after": """
losses = history.history["loss"]
assert losses[-1] < losses[0] - 0.1, losses
import keras
factors = [weight for weight in lm.trainable_variables if "lora_kernel_b" in weight.path]
assert len(factors) == len(lm.trainable_variables) // 2 > 10
assert all(keras.ops.convert_to_numpy(weight).any() for weight in factors)
first = keras.ops.convert_to_numpy(factors[0])
""",
    "loss_after": "assert loss_after < loss_before - 0.1, (loss_before, loss_after)",
    "loss_again": "assert abs(loss_again - loss_after) < 0.02, (loss_after, loss_again)",
    "right_again": """
assert right_again == right_after
assert (keras.ops.convert_to_numpy(next(w for w in lm.weights if w.path == factors[0].path)) == first).all()
""",
}


@pytest.fixture
def trial(tmp_path):
    """The source of a cell that names tiny models and little work."""
    keras.utils.set_random_seed(0)
    folders = write_stand_ins(
        tmp_path, [path.read_text(encoding="utf-8") for path in ROOT.glob("*.md")], [GEMMA2], [PRESET], loudness=20
    )
    return TRIAL.format(folders[PRESET], folders[GEMMA2], *FORMS[keras.config.backend()])


def test_quickstart_with_tiny_models_runs_to_its_end(trial):
    notebook, left = nbformat.read(NOTEBOOK, as_version=4), dict(OUTCOMES)
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if "parameters" in cell.metadata.get("tags", ()):
            cells.append(nbformat.v4.new_code_cell(trial))
        elif cell.cell_type == "code" and (words := next((words for words in left if words in cell.source), None)):
            cells.append(nbformat.v4.new_code_cell(left.pop(words)))
    assert not left
    notebook.cells = cells
    # From the checkout's root, where the package is importable whether or not it is installed.
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_table_of_devices_has_the_largest_sizes_that_fit():
    """In float16 or bfloat16, with a fifth of the memory to spare, as in docs/training.md."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (table,) = [cell.source for cell in notebook.cells if "| T4 |" in cell.source]
    (cell,) = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    rows = re.findall(r"^\|[^|]+\| (\d+) GB \|[^|]+\| `(\w+)` \| `(\w+)` \| `(\w+)` \| (\w+)", table, re.MULTILINE)
    assert len(rows) == 4
    sizes = {
        f"{encoder}_{decoder}": parameter_count(kt.T5GemmaConfig(STACKS[encoder], STACKS[decoder])) / 2**30
        for encoder, decoder in PAIRS
    }
    chosen = ast.literal_eval(re.search(r"in (\(\(36,.*\)\)) if least", cell)[1])
    for memory, here, to_ask, for_lora, adapted in rows:
        room = 0.8 * float(memory)
        assert to_ask == [name for name, size in sizes.items() if 2 * size <= room][-1]
        assert for_lora == [name for name, size in sizes.items() if (2 + 0.16) * size <= room][-1]
        assert adapted == ("all" if 4 * sizes["2b_2b"] <= room else "LoRA")
        # Of a device's memory a tenth may be taken before anything runs.
        assert here == next(name for least, name in chosen if least <= 0.9 * float(memory))
        assert 2.16 * sizes[here] <= room


def test_quickstart_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
