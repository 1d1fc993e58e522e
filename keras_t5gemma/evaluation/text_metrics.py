"""Metrics of texts beside references: exact match, F1, ROUGE, BLEU, chrF, accuracy."""

import collections
import re
import string
from collections.abc import Callable, Sequence

from keras_t5gemma.suggestions import check_choice

Metric = Callable[[Sequence[str], Sequence[str]], float]

_ROUGE = ("rouge1", "rouge2", "rougeL")
_SACREBLEU = ("bleu", "chrf")


def text_metrics(metrics: Sequence[str | Metric]) -> dict[str, Metric]:
    """The functions of metrics by name.

    Args:
        metrics: names of metrics, or functions `(predictions, references) -> float`:

            exact_match        share of texts that are equal after SQuAD's normalization: lower case, without
                               punctuation, articles and extra spaces
            f1                 mean F1 of the words of such texts, as in SQuAD
            accuracy           share of texts that are equal, except for spaces around them; for labels
            rouge1/rouge2/rougeL   mean F-measure, of rouge-score, without stemming
            bleu/chrf          of the whole corpus, of sacrebleu with its default settings, from 0 to 100

    Returns:
        Name -> function of predictions and references, of equal number. A function has its `__name__`.

    Raises:
        ValueError: if a metric is unknown, a function has no name, there is no metric, or two have one name.
        ImportError: if rouge-score or sacrebleu is not installed.
    """
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f'`metrics` must be a list of at least one metric, such as ["f1"]. Received: {metrics!r}.')
    functions = {}
    for metric in metrics:
        name = getattr(metric, "__name__", None) if callable(metric) else metric
        if callable(metric) and (name is None or not name.isidentifier()):
            raise ValueError(f"A function in `metrics` needs a name for the logs: use `def`. Received: {metric!r}.")
        if not callable(metric):
            check_choice(metric, "metrics", _BY_NAME, others=", or functions of predictions and references")
        if name in functions:
            raise ValueError(f"`metrics` must have names that differ. Received {name!r} twice.")
        functions[name] = metric if callable(metric) else _BY_NAME[metric](metric)
    return functions


def _mean(function: Callable[[str, str], float]) -> Metric:
    """The mean of a function of a prediction and its reference."""
    return lambda predictions, references: sum(map(function, predictions, references)) / len(references)


def _normalized(text: str) -> str:
    """SQuAD's normalization, as its evaluation script defines it (rajpurkar.github.io/SQuAD-explorer, version 2.0)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(prediction: str, reference: str) -> float:
    """The F1 of the words of two texts: 0 if they share none, 1 if neither has any."""
    predicted, expected = _normalized(prediction).split(), _normalized(reference).split()
    if not predicted or not expected:
        return float(predicted == expected)
    common = (collections.Counter(predicted) & collections.Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected))


def _rouge(name: str) -> Metric:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing(name, "rouge-score") from error
    scorer = RougeScorer([name])
    return _mean(lambda prediction, reference: scorer.score(reference, prediction)[name].fmeasure)


def _sacrebleu(name: str) -> Metric:
    try:
        import sacrebleu
    except ImportError as error:
        raise _missing(name, "sacrebleu") from error
    corpus = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[name]
    return lambda predictions, references: corpus(list(predictions), [list(references)]).score


def _missing(name: str, package: str) -> ImportError:
    return ImportError(
        f"The metric {name!r} needs {package}, of the extra `evaluation`: `pip install 'keras-t5gemma[evaluation]'`."
    )


# Name -> what makes the function from the name.
_BY_NAME: dict[str, Callable[[str], Metric]] = {
    "exact_match": lambda _: _mean(lambda prediction, reference: _normalized(prediction) == _normalized(reference)),
    "f1": lambda _: _mean(_f1),
    "accuracy": lambda _: _mean(lambda prediction, reference: prediction.strip() == reference.strip()),
    **dict.fromkeys(_ROUGE, _rouge),
    **dict.fromkeys(_SACREBLEU, _sacrebleu),
}
# The names that `text_metrics` knows.
NAMES = tuple(_BY_NAME)
