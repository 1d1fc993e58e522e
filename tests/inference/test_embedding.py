"""Embeddings: means and last tokens of the encoder's output of each text alone."""

import keras
import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import TEXTS, train_tiny_tokenizer
from keras import ops

from keras_t5gemma.inference.programs.compiled import Program
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer

CONFIG = tiny_config(balanced=False, num_layers=1)
LENGTHS = (3, 40, 20, 3)


def rows():
    generator = np.random.default_rng(0)
    return [generator.integers(3, CONFIG.vocabulary_size, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def lm():
    return T5GemmaSeq2SeqLM(loud_backbone(CONFIG))


def alone(lm, row):
    """The encoder's output [S, D] of one row, without padding."""
    encode = Program(lambda ids: lm.backbone.encoder(ids, ops.ones_like(ids), training=False), lm)
    return ops.convert_to_numpy(encode(np.array([row], "int32")))[0]


@pytest.fixture(scope="module")
def outputs(lm):
    """The encoder's output of each of `rows()` alone."""
    return [alone(lm, row) for row in rows()]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_those_of_each_text_alone_in_the_order_given(lm, outputs, pooling):
    expected = np.stack([output.mean(axis=0) if pooling == "mean" else output[-1] for output in outputs])
    got = lm.embed(rows(), pooling, batch_size=3)
    assert (got.dtype, got.shape) == (np.float32, (len(LENGTHS), CONFIG.encoder.hidden_dim))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    # In another batch, with other padding.
    np.testing.assert_allclose(lm.embed(rows()[0], pooling), expected[0], atol=1e-5)


def test_padded_arrays_give_what_their_rows_give(lm):
    ids, mask = np.full((2, 9), 99), np.zeros((2, 9), int)
    ids[0, :3], mask[0, :3] = rows()[0], 1
    ids[1, -3:], mask[1, -3:] = rows()[3], 1  # padded on the left
    got = lm.embed({"encoder_token_ids": ids, "encoder_padding_mask": mask}, batch_size=3)
    np.testing.assert_allclose(got, lm.embed(rows(), batch_size=3)[[0, 3]], atol=1e-5)


def test_few_shapes_are_encoded_whatever_the_lengths(lm):
    shapes = []

    class Recorded:
        def __call__(self, inputs):
            mask = inputs["encoder_padding_mask"]
            shapes.append(mask.shape)
            assert mask.sum(axis=1).max() > mask.shape[1] // 2 or mask.shape[1] == 16
            return np.zeros((len(mask), CONFIG.encoder.hidden_dim), "float32")

    lm.compile()
    lm.programs.get(("embed", "mean"), Recorded)
    many = [[5] * length for length in range(1, 101)]
    lm.embed(many, batch_size=8)
    assert len(shapes) == 13
    if keras.config.backend() == "torch":  # compiles nothing, and pads to the longest of a batch
        assert sorted(shapes) == [(4, 4), *((8, length) for length in range(12, 101, 8))]
    else:
        assert sorted(set(shapes)) == [(4, 16), (8, 16), (8, 32), (8, 64), (8, 128)]
    lm.compile()


def test_texts_go_through_the_preprocessor_and_its_turns(tmp_path):
    tokenizer = T5GemmaTokenizer(proto=train_tiny_tokenizer(tmp_path / "tokenizer.model"))
    backbone = loud_backbone(tiny_config(balanced=False, num_layers=1, vocabulary_size=512))
    lm = T5GemmaSeq2SeqLM(backbone, T5GemmaSeq2SeqLMPreprocessor(tokenizer, 64, 8, chat=True))
    turns = f"<start_of_turn>user\n{TEXTS[1]}<end_of_turn>\n<start_of_turn>model\n"
    got = lm.embed(TEXTS[1], progress=True)
    np.testing.assert_allclose(got, alone(lm, tokenizer(turns).tolist()).mean(axis=0), atol=1e-5)
    for inputs, named in (([], "empty list"), (["a", ""], r"\[1\] is empty"), ("a " * 99, "encoder_sequence_length")):
        with pytest.raises(ValueError, match=named):
            lm.embed(inputs)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"inputs": []}, "at least one"),
        ({"inputs": "a text"}, "rows of token ids"),
        ({"inputs": [[3, 4], []]}, r"`inputs`\[1\]"),
        ({"inputs": [[3, 999]]}, "128"),
        ({"inputs": {"encoder_token_ids": [[3, 4]], "encoder_padding_mask": [[0, 0]]}}, r"`inputs`\[0\]"),
        ({"pooling": "max"}, "mean, last. Received: 'max'"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_argument_is_named(lm, changed, named):
    with pytest.raises(ValueError, match=named):
        lm.embed(**{"inputs": rows(), **changed})
