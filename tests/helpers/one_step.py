"""A training step of a loud tiny model, to compare with the same step taken in another way."""

import keras
import numpy as np
from keras import ops

from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM


def language_model(*, rematerialize=False, lora=False, dtype="float32", dropout=0.0, num_layers=1, **compiling):
    """A compiled model, whose random draws are the same for the same arguments."""
    keras.utils.set_random_seed(0)
    backbone = loud_backbone(tiny_config(balanced=False, num_layers=num_layers, dropout=dropout), dtype=dtype)
    backbone.rematerialize = rematerialize
    if lora:
        backbone.enable_lora(2)
        for variable in backbone.trainable_variables:
            variable.assign(np.random.default_rng(1).standard_normal(tuple(variable.shape)) * 0.1)
    lm = T5GemmaSeq2SeqLM(backbone)
    lm.compile(**{"optimizer": keras.optimizers.SGD(0.05, momentum=0.9), **compiling})
    return lm


def batch(lm, rows=6):
    """`(x, y, weights)`, every row with another number of target tokens, the first half packed from two examples."""
    x = loud_inputs(lm.backbone.config, batch=rows)
    weights = x["decoder_padding_mask"] * (np.arange(13) < np.arange(2, 2 + 2 * rows, 2)[:, None])
    for side in ("encoder", "decoder"):
        x[f"{side}_padding_mask"][: rows // 2, 7:] *= 2
    return x, x["decoder_token_ids"], weights.astype("float32")


def take_steps(lm, data, count=1):
    """The last step's logs, and the weights after it."""
    for _ in range(count):
        logs = lm.train_on_batch(*data, return_dict=True)
    return {name: float(value) for name, value in logs.items()}, weights_of(lm)


def compiled_step(lm, data):
    """JAX's program of a training step on data `(x, y, weights)`, as `fit` has it compiled."""
    import jax

    lm.optimizer.build(lm.trainable_variables)
    groups = lm.trainable_variables, lm.non_trainable_variables, lm.optimizer.variables, lm.metrics_variables
    state = tuple([variable.value for variable in group] for group in groups)
    return jax.jit(lm.train_step, donate_argnums=0).lower(state, data).compile()


def weights_of(lm):
    return {variable.path: np.array(ops.convert_to_numpy(variable.value)) for variable in lm.backbone.weights}


def assert_same_step(found, expected, tolerance=1e-5):
    (logs, weights), (expected_logs, expected_weights) = found, expected
    assert logs.keys() == expected_logs.keys()
    for name, value in expected_logs.items():
        np.testing.assert_allclose(logs[name], value, rtol=tolerance, err_msg=name)
    for path, value in expected_weights.items():
        np.testing.assert_allclose(weights[path], value, rtol=0, atol=tolerance, err_msg=path)
