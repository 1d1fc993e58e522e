"""Long inputs: a model whose attention goes by blocks is the model whose attention does not."""

import keras
import pytest
from helpers.one_step import assert_same_step, batch, language_model, take_steps, weights_of

from keras_t5gemma.kernels.attention import masks
from keras_t5gemma.kernels.attention.dispatch import PACKAGE
from keras_t5gemma.kernels.choose import implementation

ON_TENSORFLOW = keras.config.backend() == "tensorflow"


@pytest.fixture(scope="module")
def plain():
    """A step whose lengths are known and whose attention is plain."""
    lm = language_model()
    return take_steps(lm, batch(lm))


@pytest.mark.parametrize("jit_compile", [False, True] if ON_TENSORFLOW else ["auto"])
def test_step_on_a_pipeline_of_unknown_shapes_is_that_of_known_ones(plain, monkeypatch, jit_compile):
    tf = pytest.importorskip("tensorflow")
    monkeypatch.setattr(masks, "BLOCK_BYTES_ON_CPU", 1)
    monkeypatch.setattr(masks, "SHORTEST_BLOCK", 3)
    lm = language_model(jit_compile=jit_compile)
    data = batch(lm)
    specs = tf.nest.map_structure(lambda x: tf.TensorSpec((None, None), x.dtype), data)
    history = lm.fit(tf.data.Dataset.from_generator(lambda: iter([data]), output_signature=specs), verbose=0).history
    assert_same_step(({name: values[0] for name, values in history.items()}, weights_of(lm)), plain)


def test_rematerialized_training_step_in_blocks_is_the_plain_one(plain, monkeypatch):
    """Computed again within what is computed again; `test_attention_blocks` has the gradients of attention alone."""
    module = implementation(PACKAGE)
    calls, in_blocks = [], module.in_blocks

    def counted(*args, **options):
        calls.append(args)
        return in_blocks(*args, **options)

    monkeypatch.setattr(masks, "BLOCK_BYTES_ON_CPU", 1)
    monkeypatch.setattr(masks, "SHORTEST_BLOCK", 3)
    monkeypatch.setattr(module, "in_blocks", counted)
    lm = language_model(rematerialize=True)
    assert_same_step(take_steps(lm, batch(lm)), plain)
    assert len(calls) >= 3  # the encoder's, the decoder's, and cross-attention
