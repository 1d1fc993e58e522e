"""A tiny embedder learns a rule from pairs, and then finds the documents of queries that it has never seen.

A document says in other words, and in another order, what its query says: each word of a query has one counterpart.
"""

import itertools

import keras
import numpy as np
import pytest

import keras_t5gemma as kt

COLORS = {
    **{"red": "rouge", "blue": "bleu", "green": "vert", "white": "blanc", "black": "noir"},
    **{"yellow": "jaune", "pink": "rose", "brown": "brun", "grey": "gris", "golden": "doré"},
}
ANIMALS = {
    **{"dog": "chien", "cat": "chat", "horse": "cheval", "fox": "renard", "cow": "vache"},
    **{"bird": "oiseau", "mouse": "souris", "bear": "ours", "wolf": "loup", "duck": "canard"},
}
ALL = [
    (f"{color} {animal}", f"le {ANIMALS[animal]} {COLORS[color]}")
    for color, animal in itertools.product(COLORS, ANIMALS)
]
# Each word is in some training pair, and each held-out pair is a new combination.
HELD_OUT = [pair for i, pair in enumerate(ALL) if (i // 10 + i) % 5 == 0]
TRAINING = [pair for pair in ALL if pair not in HELD_OUT]


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A random T5Gemma in Hugging Face's format, with a vocabulary of these words."""
    folder = tmp_path_factory.mktemp("search") / "t5gemma"
    keras.utils.set_random_seed(0)
    proto = kt.train_tokenizer([text for pair in ALL for text in pair] * 3, 450)
    stack = kt.StackConfig(1, 32, 48, 2, 1, 16)
    backbone = kt.T5GemmaBackbone(stack, stack, vocabulary_size=450)
    tokenizer = kt.T5GemmaTokenizer(proto=proto)
    kt.export_to_hugging_face(kt.T5GemmaSeq2SeqLM(backbone, kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, 32, 8)), folder)
    return folder


def recall(embedder):
    """The share of held-out queries whose document is nearest among all documents, those of training included."""
    documents = embedder.embed([document for _, document in ALL])
    queries = embedder.embed([query for query, _ in HELD_OUT])
    right = [[document for _, document in ALL].index(document) for _, document in HELD_OUT]
    return np.mean((queries @ documents.T).argmax(axis=1) == right)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_held_out_documents_are_found_after_training(preset, dtype):
    keras.utils.set_random_seed(1)
    embedder = kt.T5GemmaTextEmbedder.from_preset(preset, dtype=dtype)
    assert recall(embedder) <= 0.2
    queries, documents = zip(*TRAINING, strict=True)
    parts = 2 if dtype == "bfloat16" else 1
    embedder.compile(
        kt.optimizer(learning_rate=1e-2, warmup_steps=0), kt.InBatchNegatives(0.2), accumulation_steps=parts
    )
    history = embedder.fit({"query": queries, "document": documents}, batch_size=40, epochs=25, verbose=0)
    assert history.history["accuracy"][-1] >= 0.95
    assert recall(embedder) >= 0.9
