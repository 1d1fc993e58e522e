"""The folder of a reference: computed once, continued, and refused where it does not fit."""

import keras
import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.preferred import answer_inputs
from helpers.tiny import loud_backbone

import keras_t5gemma as kt
from keras_t5gemma.training.losses import reference as module
from keras_t5gemma.training.losses.reference import ReferenceLogProbs, reference_log_probs

X, LABELS = answer_inputs(128, prompts=8)


def batch(rows):
    """A batch of the rows of the arrays above."""
    return {name: value[rows] for name, value in X.items()}, {"labels": LABELS[rows]}, np.ones(len(rows), "float32")


def batches(*numbers):
    return [batch([2 * number, 2 * number + 1]) for number in numbers]


@pytest.fixture(scope="module")
def lm():
    return kt.T5GemmaSeq2SeqLM(loud_backbone(tiny_config(balanced=False, num_layers=1, dropout=0.5)))


@pytest.fixture(scope="module")
def stored(lm, tmp_path_factory):
    return reference_log_probs(lm, batches(0, 1, 2, 3), tmp_path_factory.mktemp("reference"))


def joined(stored, data):
    import grain

    return list(stored.join(grain.MapDataset.source(data)))


def test_numbers_are_those_of_score_without_dropout(lm, stored):
    assert len(stored) == 16
    x, y, _ = joined(stored, [batch([5, 0, 3])])[0]  # in another order and size than they were computed in
    targets = [[[int(label) for label in answer if label >= 0] for answer in row] for row in y["labels"]]
    scores = lm.score(
        {name: x[name] for name in ("encoder_token_ids", "encoder_padding_mask")}
        | {"decoder_token_ids": np.full((3, 1), 2), "decoder_padding_mask": np.ones((3, 1), "int32")},
        targets,
    )
    np.testing.assert_allclose(y["reference_log_probs"], scores["log_likelihood"], rtol=1e-4)
    assert y["reference_log_probs"].dtype == "float32"


def test_padding_is_not_part_of_an_answer(stored):
    x, y, weights = batch([1, 2])
    wide = {name: np.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, 2)]) for name, value in x.items()}
    labels = np.pad(y["labels"], [(0, 0), (0, 0), (0, 2)], constant_values=-100)
    data = (x, y, weights), (wide, {"labels": labels}, weights)
    one, other = (joined(stored, [batch])[0][1] for batch in data)
    np.testing.assert_array_equal(one["reference_log_probs"], other["reference_log_probs"])


def test_run_that_was_stopped_computes_only_what_is_missing(lm, stored, tmp_path, monkeypatch):
    def stopped():
        yield from batches(0, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference_log_probs(lm, stopped(), tmp_path)
    assert len(ReferenceLogProbs(tmp_path)) == 8
    computed, predict = [], keras.Model.predict_on_batch

    def spied(self, x):
        computed.append(len(x["labels"]))
        return predict(self, x)

    monkeypatch.setattr(module._AnswerReader, "predict_on_batch", spied)
    again = reference_log_probs(lm, batches(0, 1, 2, 3), tmp_path)
    assert len(computed) == 3  # the first batch, to compare the models, and the two that were missing
    assert again.values == pytest.approx(stored.values, rel=1e-6)


def test_other_model_is_refused(stored):
    other = kt.T5GemmaSeq2SeqLM(loud_backbone(tiny_config(balanced=False, num_layers=1), seed=1))
    with pytest.raises(ValueError, match="holds the log-probabilities of another model"):
        reference_log_probs(other, batches(0), stored.folder)


def test_answer_that_is_missing_is_named(lm, tmp_path):
    stored = reference_log_probs(lm, batches(0), tmp_path)
    with pytest.raises(ValueError, match="lacks 2 of the 4 answers of a batch, the first of them answer 0 of row 1"):
        joined(stored, [batch([0, 5])])


def test_damaged_file_is_named(lm, tmp_path):
    reference_log_probs(lm, batches(0), tmp_path)
    (path,) = tmp_path.glob("reference_v1_*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(kt.CheckpointError, match=f"{path.name} is damaged"):
        ReferenceLogProbs(tmp_path)


def test_data_that_never_end_and_other_data_are_refused(lm, tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    options = {"batch_size": 1, "encoder_length": 4, "decoder_length": 4}
    endless = kt.preference_dataset(rows, lambda text: [ord(letter) for letter in text], **options)
    with pytest.raises(ValueError, match="`dataset` never ends"):
        reference_log_probs(lm, endless, tmp_path)
    with pytest.raises(ValueError, match="batches of a `preference_dataset`"):
        reference_log_probs(lm, [({}, LABELS, None)], tmp_path)
    with pytest.raises(ValueError, match="folder of `reference_log_probs`"):
        ReferenceLogProbs(tmp_path / "missing")
