"""Tiny models that draw answers, and rewards for them."""

import keras
import numpy as np

import keras_t5gemma as kt
from helpers.tiny import loud_weights
from helpers.tiny_tokenizer import TEXTS

STACK = kt.StackConfig(1, 16, 32, 2, 1, 8, sliding_window=8)
VOCABULARY = 512
LONGEST = 12, 6  # tokens of a prompt, and of an answer with its <bos>
EOS, LOUDER = 1, -3
# Rows with a column.
ROWS = [{"prompt": text[:12], "wish": text[3]} for text in TEXTS]


def tiny_lm(proto, *, lora=False, dtype=None, louder=LOUDER, **compiled):
    """A model with loud weights, the same each time. Its answers have all lengths; with `louder=0` hardly any ends."""
    keras.utils.set_random_seed(0)
    backbone = kt.T5GemmaBackbone(STACK, STACK, vocabulary_size=VOCABULARY, dtype=dtype)
    for weight, values in zip(backbone.weights, loud_weights(backbone, 0), strict=True):
        if weight.path == "decoder/token_embedding/embeddings":
            values[EOS] *= louder  # some answers end on their own
        weight.assign(values)
    if lora:
        backbone.enable_lora(2)
    lm = kt.T5GemmaSeq2SeqLM(backbone, kt.T5GemmaSeq2SeqLMPreprocessor(kt.T5GemmaTokenizer(proto=proto), *LONGEST))
    lm.compile(**{"optimizer": keras.optimizers.SGD(0.1), **compiled})
    return lm


def wished(completions, wish):
    """How often the wished letter occurs, and a little for each other."""
    return [text.count(letter) + 0.1 * len(text) for text, letter in zip(completions, wish, strict=True)]


def weights_of(lm):
    """A copy of the trainable weights, as float32."""
    return [np.array(keras.ops.convert_to_numpy(keras.ops.cast(x, "float32"))) for x in lm.trainable_variables]
