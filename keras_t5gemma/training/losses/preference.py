"""Learning from preferences between answers: DPO, IPO, SimPO, CPO, ORPO, KTO and others."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_t5gemma.checks import is_number
from keras_t5gemma.data.pipelines.preferences import DESIRABLE, REFERENCE
from keras_t5gemma.data.pipelines.teacher_view import LABELS
from keras_t5gemma.kernels.gradients import without_gradients
from keras_t5gemma.layers.lora import lora_layers, without_lora
from keras_t5gemma.suggestions import check_choice
from keras_t5gemma.training.losses.answers import AnswerLoss, answer_log_probs
from keras_t5gemma.training.losses.preference_formulas import KINDS, AnswerScores, kto_divergence

_REFERENCES = ("precomputed", "lora_off")
_LIMITS = {"label_smoothing": "in [0, 0.5)", "gamma": "0 or more", "alpha": "0 or more"}


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class PreferenceLoss(AnswerLoss):
    """A loss of preferences between answers, for batches of `preference_dataset`.

        data = kt.preference_dataset(rows, lm.preprocessor, batch_size=8)
        reference = kt.reference_log_probs(lm, kt.preference_dataset(rows, lm.preprocessor, ..., num_epochs=1), "ref")
        lm.compile(loss=kt.PreferenceLoss("dpo", beta=0.1))
        lm.fit(reference.join(data), steps_per_epoch=1000)

    With s, the sum of the log-probabilities of an answer's tokens, its end included; m, their mean; r, s minus the same
    sum of the reference; w, the chosen answer; l, the rejected one; d = beta (r_w - r_l):

    | kind | loss per prompt | options |
    | --- | --- | --- |
    | dpo | -log sigma(d) (arXiv 2305.18290) | label_smoothing |
    | ipo | (mean r_w - mean r_l - 1 / (2 beta))^2, means over tokens (arXiv 2310.12036) | |
    | hinge | max(0, 1 - d) (arXiv 2309.06657) | |
    | robust | (-(1 - e) log sigma(d) + e log sigma(-d)) / (1 - 2 e) (arXiv 2403.00409) | label_smoothing e |
    | apo_zero | 1 - sigma(beta r_w) + sigma(beta r_l) (arXiv 2408.06266) | |
    | simpo | -log sigma(beta (m_w - m_l) - gamma) (arXiv 2405.14734) | gamma, label_smoothing |
    | cpo | -log sigma(beta (s_w - s_l)) - alpha m_w (arXiv 2401.08417) | alpha, label_smoothing |
    | orpo | -m_w - beta log sigma(log odds of m_w - log odds of m_l) (arXiv 2403.07691) | |
    | kto | 1 - sigma(beta (r - z)) or 1 - sigma(beta (z - r)) (arXiv 2402.01306) | the two weights |

    The loss is the mean over prompts. So the cross-entropy m_w of CPO and ORPO is a mean over an answer's tokens and
    then over answers, where TRL has the mean over all tokens of a batch. z of KTO is the mean r of answers to other
    prompts in the batch; with `accumulation_steps`, in a part of the batch.

    `fit` and `evaluate` report, under TRL's names, `rewards/chosen` and `rewards/rejected` (beta r, beta s or beta m),
    `rewards/margins`, `logps/chosen` and `logps/rejected`; `rewards/accuracies`, the share of pairs whose chosen answer
    has the larger reward; and for KTO `kl`, which is z.

    Args:
        kind: a kind of the table.
        beta: how strongly the loss holds the model to the reference, or scales the difference. SimPO's paper has 2.
        label_smoothing: the share of preferences that are assumed to be wrong, below 0.5. "robust" needs it; otherwise
            0 if None.
        gamma: the margin of SimPO; 0.5 if None.
        alpha: the weight of CPO's cross-entropy; 1 if None.
        desirable_weight: the weight of KTO's desirable answers; 1 if None.
        undesirable_weight: that of the other answers; 1 if None.
        reference: "precomputed", if the batches have the log-probabilities of `reference_log_probs`; "lora_off" for the
            model itself without its LoRA, which runs in the same step, without dropout. The former if None, for kinds
            that read a reference: all but SimPO, CPO and ORPO.
        name: the loss's name.
        **kwargs: further arguments of `keras.losses.Loss`.

    Raises:
        ValueError: if an argument is out of range, or is not one of the kind.
    """

    def __init__(
        self,
        kind: str = "dpo",
        beta: float = 0.1,
        *,
        label_smoothing: float | None = None,
        gamma: float | None = None,
        alpha: float | None = None,
        desirable_weight: float | None = None,
        undesirable_weight: float | None = None,
        reference: str | None = None,
        name: str = "preference",
        **kwargs,
    ):
        super().__init__(name=name, **kwargs)
        check_choice(kind, "kind", tuple(KINDS))
        if not (is_number(beta) and beta > 0):
            raise ValueError(f"`beta` must be above 0. Received: beta={beta!r}.")
        self.kind, self.beta, self._kind = kind, beta, KINDS[kind]
        options = {
            "label_smoothing": label_smoothing,
            "gamma": gamma,
            "alpha": alpha,
            "desirable_weight": desirable_weight,
            "undesirable_weight": undesirable_weight,
        }
        self._stated = {option: value for option, value in options.items() if value is not None}
        _check_options(kind, self._stated)
        self.options = {option: self._stated.get(option, default) for option, default in self._kind.options.items()}
        if reference is not None:
            if not self._kind.has_reference:
                raise ValueError(
                    f"`reference` must be left out: kind={kind!r} reads no reference. Received: "
                    f"reference={reference!r}."
                )
            check_choice(reference, "reference", _REFERENCES)
        self.reference = (reference or _REFERENCES[0]) if self._kind.has_reference else None

    @property
    def batches_from(self) -> str:
        """The function that makes the batches."""
        return "preference_dataset"

    def metrics(self) -> list[keras.metrics.Metric]:
        """New metrics, by TRL's names."""
        names = ["rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"]
        names += ["rewards/accuracies", "rewards/margins"] if self._kind.is_paired else ["kl"]
        means = [keras.metrics.Mean(name=name, dtype="float32") for name in names]
        # Unpaired answers have no margins of their own.
        return means if self._kind.is_paired else [*means, _Difference(*means[:2], name="rewards/margins")]

    def check_batch(self, x: Mapping[str, Any], y: Mapping[str, Any]) -> None:
        """Raises a ValueError if a batch is of another kind, or lacks the reference."""
        is_paired = DESIRABLE not in y
        if is_paired != self._kind.is_paired or x["decoder_token_ids"].shape[1] != 2:
            columns = "prompt, chosen and rejected" if self._kind.is_paired else "prompt, completion and label"
            others = "dpo" if is_paired else "kto"
            raise ValueError(
                f"kind={self.kind!r} needs batches of `preference_dataset` from rows of {columns}. Received: batches "
                f"of {'pairs' if is_paired else 'single answers'}, which are for kinds such as {others!r}."
            )
        if self.reference == _REFERENCES[0] and REFERENCE not in y:
            raise ValueError(
                f"kind={self.kind!r} reads the reference's log-probabilities, which the batches lack. Compute them "
                f"once with `reference = kt.reference_log_probs(lm, data, folder)` and pass `reference.join(data)`; "
                f'or, for a model with LoRA, compile with `PreferenceLoss({self.kind!r}, reference="lora_off")`.'
            )
        if self.reference != _REFERENCES[0] and REFERENCE in y:
            raise ValueError(
                f"The batches have a reference's log-probabilities, which the loss would not read. Received: "
                f"kind={self.kind!r}, reference={self.reference!r}. Leave out `reference.join`."
            )

    def of_batch(self, lm, x: Mapping[str, Any], y: Mapping[str, Any], weights, training: bool):
        """The loss of a batch and the values of its metrics; see `AnswerLoss.of_batch`."""
        labels = ops.cast(y[LABELS], "int32")
        log_probs, counts = answer_log_probs(lm, x, labels, training)
        sums, lengths = ops.sum(log_probs, axis=-1), ops.maximum(ops.sum(counts, axis=-1), 1.0)
        reference = self._reference(lm, x, y, labels)
        scores = AnswerScores(sums, lengths, reference)
        if self._kind.is_paired:
            losses, values = self._paired(scores, weights)
        else:
            losses, values = self._unpaired(scores, ops.cast(y[DESIRABLE], "float32"), weights)
        return ops.divide_no_nan(ops.sum(weights * losses), ops.sum(weights)), values

    def _reference(self, lm, x, y, labels):
        """The reference's s, [B, 2], through which no gradient flows; None for a kind without."""
        if self.reference is None:
            return None
        if self.reference == _REFERENCES[0]:
            return ops.cast(y[REFERENCE], "float32")
        if not lora_layers(lm.backbone):
            raise ValueError(
                'reference="lora_off" is the model without its LoRA, and the model has none. Call '
                '`lm.backbone.enable_lora(rank)` before `fit`, or use reference="precomputed".'
            )
        with without_lora(lm.backbone), without_gradients():
            return ops.stop_gradient(ops.sum(answer_log_probs(lm, x, labels, training=False)[0], axis=-1))

    def _paired(self, scores: AnswerScores, weights):
        """`(losses [B], metrics)` of pairs."""
        losses = self._kind.function(scores, self.beta, **self.options)
        rewards = self.beta * getattr(scores, self._kind.reward)
        margins = rewards[:, 0] - rewards[:, 1]
        values = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/accuracies": ops.cast(margins > 0, "float32"),
            "rewards/margins": margins,
            "logps/chosen": scores.sums[:, 0],
            "logps/rejected": scores.sums[:, 1],
        }
        return losses, {name: (value, weights) for name, value in values.items()}

    def _unpaired(self, scores: AnswerScores, desirable, weights):
        """`(losses [B], metrics)` of single answers, whose second column is a mismatched answer."""
        divergence = kto_divergence(scores.ratios[:, 1], weights)
        losses = self._kind.function(scores, self.beta, desirable=desirable, divergence=divergence, **self.options)
        rewards, sums = self.beta * scores.ratios[:, 0], scores.sums[:, 0]
        chosen, rejected = weights * desirable, weights * (1 - desirable)
        return losses, {
            "rewards/chosen": (rewards, chosen),
            "rewards/rejected": (rewards, rejected),
            "logps/chosen": (sums, chosen),
            "logps/rejected": (sums, rejected),
            "kl": (divergence, ops.sum(weights)),
        }

    def get_config(self) -> dict:
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "kind": self.kind,
            "beta": self.beta,
            **self._stated,
            **({} if self.reference is None else {"reference": self.reference}),
        }


class _Difference(keras.metrics.Metric):
    """The difference of the results of two metrics, which are updated elsewhere."""

    def __init__(self, first: keras.metrics.Metric, second: keras.metrics.Metric, name: str):
        super().__init__(name=name, dtype="float32")
        self.first, self.second = first, second

    def update_state(self, *args, **kwargs):
        """Does nothing: the two metrics are updated on their own."""

    def result(self):
        """The difference."""
        return self.first.result() - self.second.result()


def _check_options(kind: str, stated: Mapping[str, float]) -> None:
    """Raises a ValueError if an option is not one of the kind, is missing or out of range."""
    known = KINDS[kind].options
    for name, value in stated.items():
        if name not in known:
            kinds = ", ".join(other for other, entry in KINDS.items() if name in entry.options)
            raise ValueError(
                f"`{name}` is an option of {kinds}. Leave it out. Received: kind={kind!r}, {name}={value!r}."
            )
        most = 0.5 if name == "label_smoothing" else float("inf")
        if not (is_number(value) and 0 <= value < most):
            raise ValueError(f"`{name}` must be {_LIMITS.get(name, '0 or more')}. Received: {name}={value!r}.")
    missing = [name for name, default in known.items() if default is None and not stated.get(name)]
    if missing:
        raise ValueError(
            f"kind={kind!r} needs `{missing[0]}` above 0, the share of wrong preferences; without it, it is "
            f'kind="dpo". Received: {missing[0]}={stated.get(missing[0])!r}.'
        )
