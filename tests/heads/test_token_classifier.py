"""Classifiers of words: `transformers`' logits, loss and gradients, and labels at first pieces."""

import json

import keras
import numpy as np
import pytest
import torch
import transformers
from helpers.peers import _loud_torch, hf_t5gemma, tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from keras import ops

import keras_t5gemma as kt

CONFIG = tiny_config(balanced=False, num_layers=1, sliding_window=32, vocabulary_size=512)
IDS = np.array([[5, 9, 3, 4, 8, 7], [6, 4, 11, 0, 0, 0]], "int32")
LABELS = np.array([[0, -100, 2, 1, -100, 1], [2, 0, 0, -100, -100, -100]], "int32")
NAMES = ["O", "ANIMAL", "COLOUR"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return kt.T5GemmaTokenizer(str(train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")))


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_logits_loss_and_gradient_are_those_of_transformers_both_ways(stack, tmp_path):
    config = hf_t5gemma(CONFIG, published_window=True).config
    config.num_labels = 3
    peer = _loud_torch(transformers.T5GemmaForTokenClassification(config, is_encoder_decoder=stack == "decoder"), 0)
    peer.save_pretrained(tmp_path / "theirs")
    tagger = kt.T5GemmaTokenClassifier.from_preset(tmp_path / "theirs", preprocessor=None)
    ids = torch.from_numpy(IDS).long()
    result = peer(input_ids=ids, attention_mask=(ids != 0).long(), labels=torch.from_numpy(LABELS).long())
    expected, keep = result.logits.detach().numpy(), IDS != 0
    found = tagger.predict({"token_ids": IDS}, verbose=0)
    assert np.abs(found - expected)[keep].max() < 1e-5 * np.abs(expected[keep]).max()
    kt.export_to_hugging_face(tagger, tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    for field in ("architectures", "is_encoder_decoder", "classifier_dropout_rate"):
        assert ours[field] == theirs[field], field
    again = transformers.T5GemmaForTokenClassification.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[name], value) for name, value in peer.state_dict().items())
    if stack == "decoder":
        return
    result.loss.backward()
    tagger.compile(keras.optimizers.SGD(1.0))
    before = ops.convert_to_numpy(tagger.head.kernel)
    logs = tagger.train_on_batch({"token_ids": IDS}, LABELS, return_dict=True)
    assert logs["loss"] == pytest.approx(result.loss.item(), rel=1e-5)
    gradient = peer.score.out_proj.weight.grad.T.numpy()
    found = before - ops.convert_to_numpy(tagger.head.kernel)
    assert np.abs(found - gradient).max() < 1e-4 * np.abs(gradient).max()


def test_labels_are_at_first_pieces(tokenizer):
    preprocessor = kt.T5GemmaTokenClassifierPreprocessor(tokenizer, 24)
    words = ["Summarise", "xylophones", "blue"]
    x, y = preprocessor([words], [[0, 1, 2]])
    ids = x["token_ids"][0][x["padding_mask"][0] != 0].tolist()
    assert ids == list(tokenizer("Summarise xylophones blue"))
    (starts,) = preprocessor.pieces([words])[1]
    assert [y[0, first] for first in starts] == [0, 1, 2]
    assert (y != -100).sum() == 3 and len(ids) > 3
    assert tokenizer.detokenize(ids[starts[1] : starts[2]]).strip() == "xylophones"
    for x, y, message in (
        ([["a", ""]], None, "empty word"),
        ([["a"]], [[0, 1]], "one label per word"),
        (["a b"], None, "lists of words"),
        ([["blue"] * 30], None, "sequence_length=24"),
    ):
        with pytest.raises(ValueError, match=message):
            preprocessor.call(x, y)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_words_are_classified_after_training_and_after_loading(dtype, tokenizer, tmp_path):
    backbone = loud_backbone(CONFIG, dtype=dtype)
    keras.utils.set_random_seed(0)
    classes = {"fox": "ANIMAL", "dog": "ANIMAL", "blue": "COLOUR", "brown": "COLOUR"}
    words = [*classes, "light", "apples", "why", "knock", "there"]
    generator = np.random.default_rng(0)
    texts = [list(generator.choice(words, 5)) for _ in range(96)]
    labels = [[classes.get(word, "O") for word in text] for text in texts]
    preprocessor = kt.T5GemmaTokenClassifierPreprocessor(tokenizer, 30)
    tagger = kt.T5GemmaTokenClassifier(backbone, 3, preprocessor, labels=NAMES)
    tagger.compile(kt.optimizer(learning_rate=3e-3))
    tagger.fit(texts[:80], labels[:80], epochs=16, batch_size=16, verbose=0)
    assert tagger.classify(texts[80:]) == labels[80:]
    assert tagger.evaluate(texts[80:], labels[80:], verbose=0)[1] == 1
    tagger.save_to_preset(str(tmp_path / "tagger"))
    again = kt.T5GemmaTokenClassifier.from_preset(tmp_path / "tagger", dtype=dtype)
    assert again.classify(texts[80:84]) == labels[80:84]
    with pytest.raises(ValueError, match="'BIRD'"):
        tagger.fit([["fox"]], [["BIRD"]], verbose=0)
