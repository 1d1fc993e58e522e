"""Classifiers of texts: `transformers`' logits, losses and gradients, and a rule that must be learned."""

import json
import re
import warnings

import keras
import keras_hub
import numpy as np
import pytest
import torch
import transformers
from helpers.peers import _loud_torch, hf_t5gemma, tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.heads.targets import warn_of_nothing_to_learn

# Windows longer than the rows: `transformers`' encoder sees one key more on each side.
CONFIG = tiny_config(balanced=False, num_layers=1, sliding_window=32, vocabulary_size=512)
IDS = np.array([[5, 9, 3, 4, 8, 7], [6, 4, 11, 0, 0, 0]], "int32")  # one text fills the row, one does not
LABELS = {"single": [2, 0], "multi": [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], "regression": [0.5, -2.0]}
TYPES = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}


def peer_of(problem, with_decoder, **fields):
    """`transformers`' classifier with loud weights."""
    config = hf_t5gemma(CONFIG, published_window=True).config
    config.num_labels = 1 if problem == "regression" else 3
    config.problem_type, config.classifier_dropout_rate = TYPES[problem], 0.25
    for name, value in fields.items():
        setattr(config, name, value)
    return _loud_torch(transformers.T5GemmaForSequenceClassification(config, is_encoder_decoder=with_decoder), 0)


def predict(classifier, ids=IDS):
    return classifier.predict({"token_ids": ids}, verbose=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return kt.T5GemmaTokenizer(str(train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")))


@pytest.fixture(scope="module")
def backbone():
    return loud_backbone(CONFIG)


@pytest.fixture(scope="module")
def preset(backbone, tokenizer, tmp_path_factory):
    """A plain T5Gemma in Keras's format."""
    folder = tmp_path_factory.mktemp("preset") / "t5gemma"
    kt.T5GemmaSeq2SeqLM(backbone, kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, 16, 16)).save_to_preset(str(folder))
    return folder


@pytest.mark.parametrize(
    ("problem", "stack"),
    [("single", "encoder"), ("multi", "encoder"), ("regression", "encoder"), ("single", "decoder")],
)
def test_logits_loss_and_gradients_are_those_of_transformers(problem, stack, tmp_path):
    peer = peer_of(problem, stack == "decoder")
    peer.save_pretrained(tmp_path / "theirs")
    classifier = kt.T5GemmaTextClassifier.from_preset(tmp_path / "theirs", preprocessor=None)
    assert (classifier.problem, classifier.stack, classifier.dropout_rate) == (problem, stack, 0.25)
    ids = torch.from_numpy(IDS).long()
    labels = torch.tensor(LABELS[problem])
    result = peer(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)
    expected = result.logits.detach().numpy()
    found = predict(classifier)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    result.loss.backward()
    classifier.get_layer("head_dropout").rate = 0.0
    classifier.compile(keras.optimizers.SGD(1.0))
    before = ops.convert_to_numpy(classifier.head.kernel), ops.convert_to_numpy(classifier.backbone.weights[0])
    logs = classifier.train_on_batch({"token_ids": IDS}, np.array(LABELS[problem]), return_dict=True)
    assert logs["loss"] == pytest.approx(result.loss.item(), rel=1e-5)
    gradients = (
        before[0] - ops.convert_to_numpy(classifier.head.kernel),
        before[1] - ops.convert_to_numpy(classifier.backbone.weights[0]),
    )
    parameters = peer.score.out_proj.weight.grad.T, peer.model.encoder.embed_tokens.weight.grad
    for ours, theirs in zip(gradients, [gradient.numpy() for gradient in parameters], strict=True):
        assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_exported_classifier_is_read_by_transformers_and_by_us(stack, backbone, tokenizer, tmp_path):
    labels = ["no", "maybe", "yes"]
    preprocessor = kt.T5GemmaTextClassifierPreprocessor(tokenizer, 16, truncate="left")
    classifier = kt.T5GemmaTextClassifier(backbone, 3, preprocessor, stack=stack, dropout=0.1, labels=labels)
    classifier.head.bias.assign([1.0, -1.0, 0.5])
    kt.export_to_hugging_face(classifier, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
    assert config["label2id"] == {"no": 0, "maybe": 1, "yes": 2}
    assert config["is_encoder_decoder"] is (stack == "decoder")
    assert (config["problem_type"], config["classifier_dropout_rate"]) == ("single_label_classification", 0.1)
    peer, report = transformers.T5GemmaForSequenceClassification.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        expected = peer.eval()(torch.from_numpy(IDS).long(), torch.from_numpy(IDS != 0).long()).logits.numpy()
    assert np.abs(predict(classifier) - expected).max() < 1e-5 * np.abs(expected).max()
    again = kt.T5GemmaTextClassifier.from_preset(tmp_path / "ours")
    np.testing.assert_array_equal(predict(again), predict(classifier))
    assert again.labels == tuple(labels)
    assert (again.preprocessor.sequence_length, again.preprocessor.truncate) == (16, "left")


def test_last_token_of_the_decoder_does_not_depend_on_free_positions(backbone):
    classifier = kt.T5GemmaTextClassifier(backbone, 3, stack="decoder")
    wider = np.pad(IDS, ((0, 0), (0, 3)))
    np.testing.assert_allclose(predict(classifier, wider)[1], predict(classifier)[1], rtol=1e-5, atol=1e-6)
    # Without a free position the text is read one token early, as in transformers.
    assert np.abs(predict(classifier, wider)[0] - predict(classifier)[0]).max() > 1e-3


def test_mean_is_over_tokens_alone_and_is_not_exported(backbone, tmp_path):
    classifier = kt.T5GemmaTextClassifier(backbone, 3, pooling="mean")
    hidden = ops.convert_to_numpy(classifier.backbone({"token_ids": IDS, "padding_mask": (IDS != 0).astype("int32")}))
    means = np.stack([hidden[0].mean(0), hidden[1, :3].mean(0)])
    np.testing.assert_allclose(
        predict(classifier), means @ ops.convert_to_numpy(classifier.head.kernel), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(kt.CheckpointError, match="pooling='mean'"):
        kt.export_to_hugging_face(classifier, tmp_path / "mean")


WORDS = "The quick brown fox lazy dog sky blue light plums pears apples there why".split()


def rule(count, seed):
    """Texts of six words, and whether the word "fox" is among them."""
    generator = np.random.default_rng(seed)
    texts, labels = [], []
    for i in range(count):
        words = list(generator.choice([word for word in WORDS if word != "fox"], 6))
        if i % 2:
            words[generator.integers(6)] = "fox"
        texts.append(" ".join(words))
        labels.append("fox" if i % 2 else "none")
    return texts, labels


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rule_is_learned_to_the_last_held_out_text(dtype, preset, tmp_path):
    keras.utils.set_random_seed(0)
    classifier = kt.T5GemmaTextClassifier.from_preset(
        preset, num_classes=2, labels=["none", "fox"], pooling="mean", dtype=dtype
    )
    assert type(classifier.backbone) is kt.T5GemmaEncoder
    classifier.compile(kt.optimizer(learning_rate=3e-3))
    texts, labels = rule(256, seed=0)
    held_out, expected = rule(64, seed=1)
    history = classifier.fit(texts, labels, epochs=8, validation_data=(held_out, expected), verbose=0)
    assert history.history["val_accuracy"][-1] == 1
    assert classifier.classify(held_out) == expected
    if dtype == "float32":
        classifier.save_to_preset(str(tmp_path / "fox"))
        again = kt.T5GemmaTextClassifier.from_preset(tmp_path / "fox")
        assert again.classify(held_out) == expected
        found = keras_hub.models.TextClassifier.from_preset(str(tmp_path / "fox"))
        assert type(found) is kt.T5GemmaTextClassifier and found.classify(held_out[:4]) == expected[:4]


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.array([2, 2], "int32"), "All 2 labels are class 2:"),
        (np.array([[1, -100], [-100, 1]], "int32"), "All 2 labels are class 1:"),
        (np.array([[0.5], [0.5], [0.5]], "float32"), "All 3 labels are 0.5:"),
        (np.array([[0, 1], [0, 1]], "float32"), r"All 2 labels are \[0.0, 1.0\]:"),
        (np.array([[0, 1], [1, 1]], "float32"), None),
        (np.array([2], "int32"), None),
    ],
)
def test_labels_that_are_all_the_same_are_reported(y, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_nothing_to_learn(y, np.ones(len(y)))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (message is not None)
    assert all(re.match(message, text) for text in messages)


def test_preset_without_a_head_needs_num_classes(preset):
    with pytest.raises(ValueError, match="num_classes"):
        kt.T5GemmaTextClassifier.from_preset(preset)
    found = keras_hub.models.TextClassifier.from_preset(str(preset), num_classes=4)
    assert type(found) is kt.T5GemmaTextClassifier and found.predict(["blue sky"], verbose=0).shape == (1, 4)


def test_classifier_loaded_as_a_generator_is_an_error_that_names_the_class(backbone, tmp_path):
    classifier = kt.T5GemmaTextClassifier(backbone, 3, stack="decoder")
    classifier.save_to_preset(str(tmp_path / "keras"))
    with pytest.warns(UserWarning, match="of 3 classes, is not loaded: `num_classes` was passed"):
        kt.T5GemmaTextClassifier.from_preset(tmp_path / "keras", num_classes=3)
    kt.export_to_hugging_face(classifier, tmp_path / "hf")
    for name in ("keras", "hf"):
        with pytest.raises(kt.CheckpointError, match=r"T5GemmaTextClassifier\.from_preset"):
            kt.T5GemmaSeq2SeqLM.from_preset(tmp_path / name)
        with pytest.raises(ValueError, match="T5GemmaTextClassifier"):
            kt.T5GemmaTokenClassifier.from_preset(tmp_path / name, preprocessor=None)


def test_pairs_are_joined_and_long_texts_are_cut_only_on_request(tokenizer):
    preprocessor = kt.T5GemmaTextClassifierPreprocessor(tokenizer, 16)
    pair, _ = preprocessor((["the sky"], ["blue"]), [0])
    np.testing.assert_array_equal(pair["token_ids"], preprocessor(["the sky\nblue"])["token_ids"])
    assert pair["padding_mask"].sum() == len(tokenizer("the sky\nblue"))
    long = " ".join(WORDS * 3)
    with pytest.raises(ValueError, match="sequence_length=16"):
        preprocessor([long])
    ids = list(tokenizer(long))
    for side, expected in (("left", ids[-16:]), ("right", ids[:16])):
        cut = kt.T5GemmaTextClassifierPreprocessor(tokenizer, 16, truncate=side)
        assert cut([long])["token_ids"][0].tolist() == expected
    with pytest.raises(ValueError, match="empty"):
        preprocessor(["sky", ""])
    with pytest.raises(ValueError, match="pairs"):
        preprocessor.call((["a", "b"], ["c"]))


@pytest.mark.parametrize(
    ("arguments", "y", "message"),
    [
        ({}, [0, 3], r"\[0, 3\).*Received: 3 in row 1"),
        ({}, ["yes", "no"], "labels="),
        ({"labels": ["a", "b", "c"]}, ["a", "d"], "'d'"),
        ({}, [0.5, 1], "integers"),
        ({"problem": "regression"}, [[1, 2, np.nan], [0, 0, 0]], "finite"),
        ({"problem": "multi"}, [[0, 2, 0], [0, 0, 0]], "0 or 1"),
        ({}, [0], "one row per text"),
        ({}, None, "y=None"),
    ],
)
def test_wrong_labels_are_named(arguments, y, message, backbone):
    classifier = kt.T5GemmaTextClassifier(backbone, 3, **arguments)
    with pytest.raises(ValueError, match=message):
        classifier.evaluate({"token_ids": IDS}, y if y is None else np.array(y), verbose=0)


def test_wrong_arguments_are_named(backbone, tmp_path):
    for arguments, message in (
        ({"labels": ["a", "b"]}, "num_classes=3"),
        ({"pooling": "first"}, "pooling"),
        ({"stack": "both"}, "stack"),
        ({"problem": "ranking"}, "problem"),
        ({"dropout": 1}, "dropout"),
        ({"preprocessor": object()}, "must be a T5GemmaTextClassifierPreprocessor, or None"),
    ):
        with pytest.raises(ValueError, match=message):
            kt.T5GemmaTextClassifier(backbone, 3, **arguments)
    encoder = kt.T5GemmaEncoder.from_backbone(backbone)
    with pytest.raises(ValueError, match="has none"):
        kt.T5GemmaTextClassifier(encoder, 3, stack="decoder")
    kt.export_to_hugging_face(encoder, tmp_path / "encoder")
    with pytest.raises(ValueError, match="an encoder alone"):
        kt.T5GemmaTextClassifier.from_preset(tmp_path / "encoder", num_classes=3, stack="decoder", preprocessor=None)
    with pytest.raises(
        kt.CheckpointError, match=r"T5GemmaEncoder\.from_preset`, or .*T5GemmaTextEmbedder\.from_preset"
    ):
        kt.T5GemmaSeq2SeqLM.from_preset(tmp_path / "encoder")
    with pytest.raises(TypeError, match=r"'poling'.*Did you mean 'pooling'\?"):
        kt.T5GemmaTextClassifier(backbone, 3, poling="mean")
    with pytest.raises(ValueError, match="num_classes=1"):
        kt.T5GemmaTextClassifier(backbone, 1)


@pytest.mark.parametrize("loss", ["binary_crossentropy", keras.losses.SparseCategoricalCrossentropy()])
def test_loss_of_probabilities_is_refused(loss, backbone):
    classifier = kt.T5GemmaTextClassifier(backbone, 3)
    with pytest.raises(ValueError, match=r"`loss` must take logits.*takes probabilities"):
        classifier.compile(loss=loss)
    classifier.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))


def test_data_of_every_form_gives_the_same_numbers(preset):
    classifier = kt.T5GemmaTextClassifier.from_preset(preset, num_classes=2, labels=["none", "fox"])
    texts, labels = rule(8, seed=2)
    ids = [("none", "fox").index(label) for label in labels]
    expected = classifier.evaluate(texts, labels, batch_size=4, verbose=0)[0]
    batches = [(texts[i : i + 4], ids[i : i + 4]) for i in (0, 4)]

    class Rows(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return batches[i]

    import datasets

    rows = datasets.Dataset.from_dict({"text": texts, "label": ids})
    for data in (iter(batches), Rows(), torch.utils.data.DataLoader(list(zip(texts, ids, strict=True)), 4), rows):
        assert classifier.evaluate(data, verbose=0)[0] == pytest.approx(expected, rel=1e-5)
    with pytest.warns(UserWarning, match="All 2 labels are class 0"):
        classifier.fit(texts[:1] * 2, ["none"] * 2, verbose=0)
    with pytest.warns(UserWarning, match="All of `sample_weight` is 0"):
        classifier.fit(texts[:2], ids[:2], sample_weight=np.zeros(2), verbose=0)


def test_quantized_classifier_keeps_its_head_and_lora_trains_it(preset, tmp_path):
    classifier = kt.T5GemmaTextClassifier.from_preset(preset, num_classes=2)
    classifier.quantize("int8")
    assert classifier.head.quantization_mode is None and classifier.head.kernel.dtype == "float32"
    classifier.backbone.enable_lora(2)
    head, frozen = ops.convert_to_numpy(classifier.head.kernel), ops.convert_to_numpy(classifier.backbone.weights[0])
    classifier.fit(["a fox", "the sky"], [0, 1], verbose=0)
    assert (ops.convert_to_numpy(classifier.head.kernel) != head).any()
    np.testing.assert_array_equal(ops.convert_to_numpy(classifier.backbone.weights[0]), frozen)
    classifier.save_to_preset(str(tmp_path / "saved"))
    again = kt.T5GemmaTextClassifier.from_preset(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict(["a fox"], verbose=0), classifier.predict(["a fox"], verbose=0))
