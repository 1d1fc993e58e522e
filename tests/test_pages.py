"""Every Python block of README.md and docs/ runs as it is printed, in order, and comes to what `page_outcomes` asserts.

Names of presets are answered by tiny models (`stand_ins`), and a 1,000th of the printed steps is taken (`pages`).
Everything else is what a reader does: an undefined name, an order that fails, a folder written twice are errors.
"""

import keras
import pytest
from helpers import pages
from helpers.launch import finish, start
from helpers.page_outcomes import OUTCOMES
from helpers.stand_ins import serve, write_stand_ins


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    texts = [(pages.ROOT / "README.md").read_text(encoding="utf-8")]
    t5gemma = ("t5gemma_2b_2b_prefixlm_it", "t5gemma_2b_2b_ul2")
    return write_stand_ins(tmp_path_factory.mktemp("models"), texts, t5gemma=t5gemma)


@pytest.fixture
def histories(stand_ins, tmp_path, monkeypatch):
    """The `History` of each `fit`; the current folder is new, and holds the one file that the pages say one has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "unchanged")  # README sets it; put back afterwards
    (tmp_path / "corpus.txt").write_text((pages.ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    serve(stand_ins, monkeypatch.setattr)
    return pages.take_fewer_steps(monkeypatch.setattr)


# Eight devices take a process of their own, as `test_data_parallel` has.
MESH = "DeviceMesh"
# Not on PyTorch, beside which the guides run: tests/exports runs it.
SAVED_MODEL = "kt.export_saved_model"
ON_EIGHT_DEVICES = """
import keras_t5gemma as kt
{}
stack = kt.StackConfig(1, 16, 32, 8, 4, 8)
backbone = kt.T5GemmaBackbone(stack, stack, vocabulary_size=64)
largest = max(backbone.weights, key=lambda weight: weight.value.size)
shard = largest.value.addressable_shards[0].data
assert shard.size * 8 == largest.value.size, (largest.path, largest.shape, shard.shape)
"""


# The guides run once: what they call has tests of its own on every backend.
@pytest.mark.parametrize(
    "page", [page if page == "README.md" else pytest.param(page, marks=pytest.mark.once) for page in pages.pages()]
)
def test_page_runs_as_printed_and_each_block_comes_to_what_it_says(page, histories):
    pages.run(page, OUTCOMES[page](histories), elsewhere=[MESH, "torch.distributed", SAVED_MODEL])


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution is for JAX alone")
def test_mesh_of_the_training_guide_divides_a_model_over_eight_devices(tmp_path):
    (block,) = [text for _, text in pages.blocks("docs/training.md") if MESH in text]
    script = tmp_path / "mesh.py"
    script.write_text(ON_EIGHT_DEVICES.format(block), encoding="utf-8")
    finish(start(script, devices=8))
