"""The notebooks run from their first cell to their last, with tiny models in place of the downloads."""

import ast
import os
import re
import unicodedata
from pathlib import Path

import keras
import nbclient
import nbformat
import pytest
from helpers.stand_ins import write_stand_ins

import keras_t5gemma as kt
from keras_t5gemma.checkpoints.tensor_table import parameter_count
from keras_t5gemma.demo.dates import date_pairs, split_dates
from keras_t5gemma.presets import PAIRS, STACKS

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
PRESET, GEMMA2 = "t5gemma_b_b_prefixlm_it", "gemma2_2b_en"
# The dtypes that the notebooks have for a CPU, a T4 and others, each on one backend; and both ways to train.
FORMS = {"jax": ("bfloat16", True), "tensorflow": ("float32", False), "torch": ("float16", False)}
# Where a notebook runs; the quickstart does on all. ALL_NOTEBOOKS=1 in the environment runs the others there too.
BACKENDS = {"classifier": "torch", "preferences": "torch"}  # the least to compile
# Tiny models of random weights have more to learn than any preset. What has changed is what was to be trained.
TRIALS = {
    "quickstart": "PRESET, GEMMA2, DTYPE, TRAIN_ALL = {preset!r}, {gemma2!r}, {dtype!r}, {train_all}\n"
    "HELD_OUT, PAIRS, BATCH, EPOCHS, STEPS, RATE = 4, 32, 8, 10, 20, 0.05",
    "classifier": "PRESET, DTYPE = {preset!r}, {dtype_of_all!r}\n"
    "PER_CLASS, HELD_OUT = 60, 12\nRATES, BATCHES, DROPOUTS, EPOCHS = (0.01, 0.03), (16,), (0.0,), 8",
    "preferences": "PRESET, DTYPE = {preset!r}, {dtype!r}\nPAIRS, HELD_OUT, BATCH, EPOCHS, RATE = 64, 16, 8, 12, 0.05",
}
# After cells that hold these words.
OUTCOMES = {
    "quickstart": {
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
    },
    "classifier": {
        "results, best": """
assert len(results) == 2
assert max(results.values()) > max(0.45, accuracy_before + 0.1), (accuracy_before, results)  # a guess: 0.2
assert accuracy(best) == max(results.values())
""",
        "accuracy_again": "assert abs(accuracy_again - max(results.values())) <= 2 / 60",
    },
    "preferences": {
        "len(reference)": "assert len(reference) == 2 * (PAIRS + HELD_OUT)",
        "loss_before": """
import math
assert abs(loss_before - math.log(2)) < 0.02, loss_before
assert after["loss"] < loss_before - 0.3, after
assert after["rewards/accuracies"] > 0.8, after
""",
        "preferred_after": "assert preferred_after > preferred_before + 0.3, (preferred_before, preferred_after)",
        "preferred_again": "assert abs(preferred_again - preferred_after) <= 1 / HELD_OUT",
    },
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """The tiny models of the quickstart."""
    texts = [path.read_text(encoding="utf-8") for path in ROOT.glob("*.md")]
    keras.utils.set_random_seed(0)
    return write_stand_ins(tmp_path_factory.mktemp("models"), texts, [GEMMA2], [PRESET], loudness=20)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """A tiny model of the other notebooks, whose pieces are the words of their data."""
    names = [unicodedata.name(character, "").lower() for character in map(chr, range(0x2C00))]
    dates = date_pairs(split_dates()[0], 2000, answer=lambda date: f"{date:%A}, {date.isoformat()}")
    texts = [*filter(None, names), *dates["encoder_text"], *dates["decoder_text"]]
    keras.utils.set_random_seed(0)
    return write_stand_ins(tmp_path_factory.mktemp("readers"), texts, [], [PRESET], loudness=20)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_with_tiny_models_runs_to_its_end(name, request):
    backend = keras.config.backend()
    if BACKENDS.get(name, backend) != backend and not os.environ.get("ALL_NOTEBOOKS"):
        pytest.skip(f"it runs on {BACKENDS[name]}")
    folders = request.getfixturevalue("stand_ins" if name == "quickstart" else "readers")
    dtype, train_all = FORMS[backend]
    values = {"preset": folders[PRESET], "gemma2": folders.get(GEMMA2), "dtype": dtype, "train_all": train_all}
    values["dtype_of_all"] = "mixed_float16" if dtype == "float16" else dtype  # of weights that all are trained
    notebook, left = nbformat.read(NOTEBOOKS[name], as_version=4), dict(OUTCOMES[name])
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if "parameters" in cell.metadata.get("tags", ()):
            cells.append(nbformat.v4.new_code_cell(TRIALS[name].format(**values)))
        elif cell.cell_type == "code" and (words := next((words for words in left if words in cell.source), None)):
            cells.append(nbformat.v4.new_code_cell(left.pop(words)))
    assert not left
    notebook.cells = cells
    # From the checkout's root, where the package is importable whether or not it is installed.
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def table_and_sizes(name):
    """`([cells of a row, ...], ((GiB, size), ...))`: the table of devices, and what the notebook chooses by memory."""
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    (table,) = [cell.source for cell in notebook.cells if "| T4 |" in cell.source]
    (cell,) = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    rows = [[part.strip(" `") for part in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", table, re.M)]
    chosen = ast.literal_eval(re.search(r"in (\(\(36,.*\)\)) if least", cell)[1])
    return [[row[0], float(row[1].removesuffix(" GB")), *row[2:]] for row in rows if row[1].endswith(" GB")], chosen


def chosen_for(memory, chosen):
    """The size that a notebook chooses: of a device's memory a tenth may be taken before anything runs."""
    return next(name for least, name in chosen if least <= 0.9 * memory)


# In float16 or bfloat16, with a fifth of the memory to spare, as in docs/training.md.
SIZES = {
    f"{encoder}_{decoder}": parameter_count(kt.T5GemmaConfig(STACKS[encoder], STACKS[decoder])) / 2**30
    for encoder, decoder in PAIRS
}


def test_quickstart_table_of_devices_has_the_largest_sizes_that_fit():
    rows, chosen = table_and_sizes("quickstart")
    assert len(rows) == 4
    for _, memory, _, here, to_ask, for_lora, adapted in rows:
        room = 0.8 * memory
        assert to_ask == [name for name, size in SIZES.items() if 2 * size <= room][-1]
        assert for_lora == [name for name, size in SIZES.items() if (2 + 0.16) * size <= room][-1]
        assert adapted.startswith("all" if 4 * SIZES["2b_2b"] <= room else "LoRA")
        assert here == chosen_for(memory, chosen)
        assert 2.16 * SIZES[here] <= room


def test_preferences_table_of_devices_has_the_largest_sizes_that_fit():
    rows, chosen = table_and_sizes("preferences")
    assert len(rows) == 4
    for _, memory, _, here, largest in rows:
        assert largest == [name for name, size in SIZES.items() if (2 + 0.16) * size <= 0.8 * memory][-1]
        assert here == chosen_for(memory, chosen)
        assert 2.16 * SIZES[here] <= 0.8 * memory


def test_classifier_table_of_devices_has_the_largest_encoders_that_fit():
    encoders = {
        f"{name}_{name}": parameter_count(kt.T5GemmaConfig(stack, stack).encoder_alone()) / 2**30
        for name, stack in STACKS.items()
    }
    rows, chosen = table_and_sizes("classifier")
    assert len(rows) == 4
    for _, memory, dtype, here, largest in rows:
        per_parameter = {"bfloat16": 12, "mixed_float16": 16}[dtype]
        assert largest == [name for name, size in encoders.items() if per_parameter * size <= 0.8 * memory][-1]
        assert here == chosen_for(memory, chosen)
        assert per_parameter * encoders[here] <= 0.8 * memory


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_without_outputs(name):
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
