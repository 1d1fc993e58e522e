"""Metrics of generated texts: those of rouge-score, sacrebleu and SQuAD."""

import re
import sys

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from keras_t5gemma.evaluation.text_metrics import text_metrics

PREDICTIONS = ["The cat sat on a mat!", "blue", "Paris is the capital", ""]
REFERENCES = ["A cat sat on the mat", "red", "The capital is Paris, France", "nothing"]


def value(metric, predictions=PREDICTIONS, references=REFERENCES):
    return text_metrics([metric])[metric](predictions, references)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_mean_of_rouge_scores_f_measures(name):
    scorer = RougeScorer([name])
    pairs = zip(PREDICTIONS, REFERENCES, strict=True)
    expected = [scorer.score(reference, prediction)[name].fmeasure for prediction, reference in pairs]
    assert value(name) == pytest.approx(sum(expected) / 4)
    assert 0 < value(name) < 1


def test_bleu_and_chrf_are_sacrebleus():
    assert value("bleu") == sacrebleu.BLEU().corpus_score(PREDICTIONS, [REFERENCES]).score
    assert value("chrf") == sacrebleu.CHRF().corpus_score(PREDICTIONS, [REFERENCES]).score
    assert value("chrf", REFERENCES) == 100


def test_exact_match_and_f1_are_squads():
    # "cat sat on mat" twice; "paris is capital" shares 3 words with "capital is paris france": 2 * 3 / (3 + 4).
    assert value("exact_match") == 1 / 4
    assert value("f1") == pytest.approx((1 + 0 + 6 / 7 + 0) / 4)
    assert value("f1", ["the", "a a b"], ["an", "b b"]) == pytest.approx((1 + 2 / 3) / 2)


def test_accuracy_is_of_equal_texts_up_to_spaces_around_them():
    assert value("accuracy", [" yes", "No", "no\n", "a cat"], ["yes", "no", "no", "cat"]) == 2 / 4


def test_function_is_a_metric_of_its_name():
    def longer(predictions, references):
        return sum(len(p) > len(r) for p, r in zip(predictions, references, strict=True))

    assert text_metrics([longer, "f1"])["longer"](PREDICTIONS, REFERENCES) == 2


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["rougel"], "Did you mean 'rougeL'?"),
        ([], "at least one metric"),
        ("f1", "must be a list"),
        ([lambda p, r: 0.0], "use `def`"),
        (["f1", "f1"], "Received 'f1' twice"),
    ],
)
def test_invalid_metrics_are_refused(metrics, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        text_metrics(metrics)


@pytest.mark.parametrize(("metric", "package"), [("rouge1", "rouge_score.rouge_scorer"), ("chrf", "sacrebleu")])
def test_package_that_is_missing_is_named_with_the_extra(metric, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=re.escape("pip install 'keras-t5gemma[evaluation]'")):
        text_metrics([metric])
