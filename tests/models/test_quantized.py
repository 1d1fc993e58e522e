"""Quantized weights: the memory they promise, logits near the unquantized ones, the same by either way there."""

import gc
import math
import warnings

import keras
import numpy as np
import pytest
from helpers.one_step import language_model
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from keras import ops

from keras_t5gemma.kernels.embedding import quantized
from keras_t5gemma.kernels.embedding.lookup import look_up
from keras_t5gemma.layers import embedding as embedding_layer
from keras_t5gemma.layers import projection
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

Int8 = keras.quantizers.Int8QuantizationConfig
Int4 = keras.quantizers.Int4QuantizationConfig
AbsMax = keras.quantizers.AbsMaxQuantizer
CONFIG = tiny_config(balanced=False, num_layers=1)
BYTES = {"int8": 1, "int4": 0.5}  # a weight
# Of the logits' correlation; per-channel rounding to 255 and to 15 levels, at these loud weights.
CORRELATION = {"int8": 0.998, "int4": 0.8}


def matrices(backbone):
    """`{path: variable}` of what is quantized."""
    return {v.path: v for v in backbone.weights if v.path.endswith(("/kernel", "/embeddings"))}


def nbytes(variables):
    return sum(math.prod(v.shape) * np.dtype(keras.backend.standardize_dtype(v.dtype)).itemsize for v in variables)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_model_takes_its_memory_stays_near_and_decodes_and_loads_the_same(mode, tmp_path):
    lm = T5GemmaSeq2SeqLM(loud_backbone(CONFIG))
    lm.backbone.save_to_preset(str(tmp_path / "preset"))
    inputs = loud_inputs(CONFIG, batch=1)
    prompt = {name: x[0] for name, x in inputs.items() if name.startswith("encoder")}
    options = {"max_length": 8, "stop_token_ids": None}
    lm.generate(prompt, **options)  # a program of the weights as they are now, which must not be used again
    logits = ops.convert_to_numpy(lm(inputs))
    weights = sum(math.prod(v.shape) for v in matrices(lm.backbone).values())

    lm.quantize(mode)
    kept = matrices(lm.backbone)
    assert nbytes(kept.values()) == BYTES[mode] * weights
    scales = [v for v in lm.backbone.weights if v.path.endswith("_scale")]
    assert len(scales) == len(kept)
    quantized = ops.convert_to_numpy(lm(inputs))
    assert np.corrcoef(logits.ravel(), quantized.ravel())[0, 1] > CORRELATION[mode]
    assert (quantized != logits).any()
    ids = lm.generate(prompt, **options)["decoder_token_ids"]
    outputs = lm({**inputs, "decoder_token_ids": ids[None], "decoder_padding_mask": np.ones((1, 8), "int32")})
    np.testing.assert_array_equal(ops.convert_to_numpy(outputs)[0, :-1].argmax(axis=-1), ids[1:])

    loaded = T5GemmaBackbone.from_preset(str(tmp_path / "preset"), dtype=f"{mode}_from_float32")
    for path, variable in matrices(loaded).items():
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), ops.convert_to_numpy(kept[path]), err_msg=path)
    half = T5GemmaBackbone.from_preset(str(tmp_path / "preset"), dtype=f"{mode}_from_bfloat16")
    assert nbytes(matrices(half).values()) == BYTES[mode] * weights
    assert half.compute_dtype == "bfloat16"


def test_int4_with_its_size_of_blocks_in_the_dtype_loads_as_quantized_so(tmp_path):
    backbone = loud_backbone(CONFIG)
    backbone.save_to_preset(str(tmp_path / "preset"))
    loaded = T5GemmaBackbone.from_preset(str(tmp_path / "preset"), dtype="int4/8_from_float32")
    config = keras.quantizers.Int4QuantizationConfig(block_size=8)
    backbone.quantize(
        config=config, filters=lambda layer: isinstance(layer, keras.layers.Embedding | keras.layers.Dense)
    )
    stack = CONFIG.decoder
    scale = loaded.decoder.blocks[0].feed_forward.down_dense.kernel_scale
    assert tuple(scale.shape) == (math.ceil(stack.intermediate_dim / 8), stack.hidden_dim)
    variables = {v.path: v for v in backbone.weights}
    for variable in loaded.weights:
        expected = ops.convert_to_numpy(variables[variable.path])
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), expected, err_msg=variable.path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [None, Int8(), Int8(AbsMax(axis=-1)), Int4(block_size=4), Int4(block_size=-1)])
def test_table_quantized_some_rows_at_a_time_is_as_keras_makes_it(config, dtype, monkeypatch):
    monkeypatch.setattr(embedding_layer, "_QUANTIZED_AT_ONCE", 16)
    layers = [
        cls(60, 8, dtype=dtype, name="table") for cls in (embedding_layer.Embedding, keras.layers.ReversibleEmbedding)
    ]
    table = np.random.default_rng(0).normal(size=(60, 8))
    for layer in layers:
        layer.build()
        layer.embeddings.assign(table)
        layer.quantize("int8" if config is None else config.mode, config=config)
    ours, theirs = layers
    assert ours.dtype_policy == theirs.dtype_policy
    assert [v.path for v in ours.weights] == [v.path for v in theirs.weights]
    for got, expected in zip(ours.weights, theirs.weights, strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(*(ops.convert_to_numpy(ops.cast(v, "float32")) for v in (got, expected)))
    x = ops.convert_to_tensor(np.random.default_rng(1).normal(size=(2, 3, 8)), dtype)
    outputs = [ops.convert_to_numpy(ops.cast(layer(x, reverse=True), "float32")) for layer in layers]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("rows", [7, 20, 100])
@pytest.mark.parametrize("config", [Int8(), Int4(block_size=4), Int4(block_size=3), Int4(block_size=-1)])
def test_table_in_blocks_of_any_size_and_looked_up_by_rows_is_the_dequantized_one(config, rows, monkeypatch):
    monkeypatch.setitem(quantized._BLOCK_ROWS, keras.config.backend(), rows)
    embedding = keras.layers.ReversibleEmbedding(60, 7)
    embedding.build()
    embedding.quantize(config=config)
    table = ops.convert_to_numpy(embedding(ops.arange(60)))
    ids = np.array([[3, 59, 0], [3, 17, 4]])
    looked_up = look_up(embedding, ops.convert_to_tensor(ids))
    np.testing.assert_allclose(ops.convert_to_numpy(looked_up), table[ids], atol=1e-6)
    x = np.random.default_rng(0).normal(size=(2, 3, 7)).astype("float32")
    assert quantized.has_block_product(embedding, ops.convert_to_tensor(x))
    logits = ops.convert_to_numpy(projection.VocabularyProjection(embedding)(ops.convert_to_tensor(x)))
    np.testing.assert_allclose(logits, x @ table.T, atol=1e-6)


def test_quantizing_many_layers_collects_the_garbage_of_the_whole_program_once(monkeypatch):
    collected, collect = [], gc.collect
    gc.unfreeze()

    def counted(*args):
        collected.append(gc.get_freeze_count())
        return collect(*args)

    monkeypatch.setattr(gc, "collect", counted)
    backbone = loud_backbone(tiny_config(num_layers=2))
    backbone.quantize("int8")
    assert len(collected) > 20  # by Keras, for each layer
    assert collected.count(0) == 1
    assert gc.get_freeze_count() == 0
    gc.freeze()
    backbone = loud_backbone(tiny_config(num_layers=2))
    backbone.quantize("int8")
    assert gc.get_freeze_count() > 0  # a program's own choice stays


@pytest.mark.parametrize("lora", [False, True])
def test_training_of_quantized_weights_without_lora_warns_that_only_other_layers_change(lora):
    lm = language_model()
    lm.quantize("int8")
    if lora:
        lm.backbone.enable_lora(2)
    numbers = sum(np.prod(variable.shape) for variable in lm.trainable_variables)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lm.make_train_function()
    told = [warning for warning in caught if "enable_lora" in str(warning.message)]
    assert [warning.filename for warning in told] == ([] if lora else [__file__])
    assert lora or f"changes {numbers:,} numbers" in str(told[0].message)
