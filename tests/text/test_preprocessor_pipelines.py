"""The same ids from every kind of data pipeline."""

import keras
import keras_hub
import numpy as np
import pytest

from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor

TEXT = {
    "encoder_text": ["Why is the sky blue?", "  a\u00a0\n", "漢 12"],
    "decoder_text": ["air", "", "b\n"],
}


def flat(batch):
    x, y, weights = batch
    return [np.asarray(array) for array in (*(x[name] for name in sorted(x)), y, weights)]


def assert_same(first, second):
    for one, other in zip(flat(first), flat(second), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


@pytest.fixture(params=[False, True], ids=["plain", "chat"])
def preprocessor(tokenizer, request):
    return T5GemmaSeq2SeqLMPreprocessor(tokenizer, 32, 12, chat=request.param)


def test_tf_data_batches_equal_direct_calls(preprocessor):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(TEXT).batch(3).map(preprocessor)
    assert_same(next(iter(dataset.as_numpy_iterator())), preprocessor(TEXT))
    x, y, _ = dataset.element_spec
    assert x["encoder_token_ids"].shape.as_list() == [None, 32]
    assert y.shape.as_list() == [None, 12]


def test_tf_data_examples_mapped_before_batching_equal_direct_calls(preprocessor):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(TEXT).map(preprocessor).batch(3)
    assert_same(next(iter(dataset.as_numpy_iterator())), preprocessor(TEXT))


def test_tf_data_generation_inputs_equal_direct_calls(preprocessor):
    import tensorflow as tf

    for x in (TEXT, TEXT["encoder_text"]):
        dataset = tf.data.Dataset.from_tensor_slices(x).batch(3).map(preprocessor.generate_preprocess)
        (inputs,) = dataset.as_numpy_iterator()
        expected = preprocessor.generate_preprocess(x)
        assert all(np.array_equal(inputs[name], expected[name]) for name in expected)


def test_tf_data_over_long_text_is_refused_with_the_same_message(preprocessor):
    import tensorflow as tf

    text = {"encoder_text": ["a" * 50], "decoder_text": ["b"]}
    dataset = tf.data.Dataset.from_tensor_slices(text).batch(1).map(preprocessor)
    with pytest.raises(tf.errors.InvalidArgumentError, match="more than encoder_sequence_length=32"):
        next(iter(dataset))


def test_tf_tensors_are_texts_too(preprocessor):
    import tensorflow as tf

    assert_same(preprocessor({name: tf.constant(value) for name, value in TEXT.items()}), preprocessor(TEXT))


def test_grain_batches_equal_direct_calls(preprocessor):
    import grain

    rows = [dict(zip(TEXT, row, strict=True)) for row in zip(*TEXT.values(), strict=True)]
    dataset = grain.MapDataset.source(rows).batch(3).map(preprocessor)
    assert_same(next(iter(dataset)), preprocessor(TEXT))


class NextToken(keras_hub.models.Task):
    """The smallest task with a preprocessor: embeds the decoder's ids and predicts the next one."""

    def __init__(self, preprocessor):
        shapes = {"encoder": preprocessor.encoder_sequence_length, "decoder": preprocessor.decoder_sequence_length}
        inputs = {
            f"{side}_{kind}": keras.Input((length,), dtype="int32", name=f"{side}_{kind}")
            for side, length in shapes.items()
            for kind in ("token_ids", "padding_mask")
        }
        size = preprocessor.tokenizer.vocabulary_size()
        outputs = keras.layers.Embedding(size, size)(inputs["decoder_token_ids"])
        self.backbone = None
        self.preprocessor = preprocessor
        super().__init__(inputs=inputs, outputs=outputs, compile=False)


@pytest.mark.parametrize("pipeline", ["lists", "arrays", "grain", "tf.data"])
def test_fit_trains_on_texts_from_every_pipeline(tokenizer, pipeline):
    model = NextToken(T5GemmaSeq2SeqLMPreprocessor(tokenizer, 32, 12))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(0.1), loss=loss)
    arguments = {"batch_size": 3}
    data = TEXT
    if pipeline == "arrays":
        data = {name: np.array(value) for name, value in TEXT.items()}
    elif pipeline == "grain":
        import grain

        rows = [dict(zip(TEXT, row, strict=True)) for row in zip(*TEXT.values(), strict=True)]
        data, arguments = grain.MapDataset.source(rows).batch(3), {}
    elif pipeline == "tf.data":
        import tensorflow as tf

        data, arguments = tf.data.Dataset.from_tensor_slices(TEXT).batch(3), {}
    losses = model.fit(data, epochs=3, verbose=0, **arguments).history["loss"]
    assert losses[-1] < losses[0]
