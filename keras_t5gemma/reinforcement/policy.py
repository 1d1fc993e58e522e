"""The model that is trained: a task model under the loss of a policy."""

import keras
from keras import ops

from keras_t5gemma.kernels.device import replicas
from keras_t5gemma.reinforcement.policy_loss import PolicyLoss
from keras_t5gemma.reinforcement.rollouts import Rollout
from keras_t5gemma.training.losses.answers import answer_hidden_states
from keras_t5gemma.training.losses.log_probs import target_log_probs
from keras_t5gemma.training.steps.accumulation import Accumulation
from keras_t5gemma.training.steps.model import OwnSteps

# Result of `PolicyLoss` -> name in TRL's logs.
_MEASURES = {
    "kl": "kl",
    "low": "clip_ratio/low_mean",
    "high": "clip_ratio/high_mean",
    "clipped": "clip_ratio/region_mean",
}


class Policy(OwnSteps, keras.Model):
    """A task model's weights, trained by a `PolicyLoss` in this package's steps: compiled, and in parts.

    Batches are cut into as many parts as the task model was compiled for. Dropout is on, as in `fit`.

    Args:
        lm: a compiled `T5GemmaSeq2SeqLM`.
        loss: a `PolicyLoss`.
        optimizer: a `keras.optimizers.Optimizer`.
    """

    # Steps never compute the logits [B, n, T, V], and the means of this class are over tokens and answers.
    trains_without_logits = True
    keeps_own_loss = True

    def __init__(self, lm, loss: PolicyLoss, optimizer: keras.optimizers.Optimizer):
        super().__init__(name="policy")
        self.lm, self.policy_loss = lm, loss
        self.accumulation = Accumulation(lm.accumulation.steps, loss)
        measures = [name for key, name in _MEASURES.items() if key != "kl" or loss.beta]
        self.means = [keras.metrics.Mean(name=name, dtype="float32") for name in ("loss", *measures)]
        # There is nothing to build. Keras would trace the model in each step to build a tokenizer that is not called.
        self.built = lm.preprocessor.tokenizer.built = True
        self.compile(optimizer=optimizer, run_eagerly=lm.run_eagerly, jit_compile=lm.jit_compile, auto_scale_loss=False)

    @property
    def backbone(self):
        """The task model's backbone: what a run's checkpoints describe and save."""
        return self.lm.backbone

    @property
    def preprocessor(self):
        """The task model's preprocessor, whose tokenizer a run's checkpoints save."""
        return self.lm.preprocessor

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The means of a step, in the order of its logs."""
        return list(self.means)

    def update(self, rollout: Rollout, advantages, weights, reference_log_probs=None) -> dict[str, float]:
        """Takes one optimizer step.

        Args:
            rollout: the answers.
            advantages: [B, n].
            weights: float32 [B, n, T], the rollout's, or with zeros for answers to leave out.
            reference_log_probs: float32 [B, n, T], if the loss has a `beta`.

        Returns:
            `{name: value}` of the metrics.
        """
        targets = {
            "labels": rollout.labels,
            "old_log_probs": rollout.log_probs,
            "advantages": advantages.astype("float32"),
        }
        if reference_log_probs is not None:
            targets["reference_log_probs"] = reference_log_probs
        logs = self.train_on_batch(rollout.inputs, targets, weights, return_dict=True)
        return {name: float(value) for name, value in logs.items()}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):  # noqa: ARG002 Keras's
        """The loss of a step, which also updates the means.

        Args:
            x: the inputs of a `Rollout`.
            y: a dict of `labels`, `old_log_probs` and perhaps `reference_log_probs` [B, n, T], and `advantages` [B, n].
            y_pred: None.
            sample_weight: float32 [B, n, T].
            training: whether gradients will be computed.

        Returns:
            A float32 scalar, divided by the number of replicas.
        """
        log_probs = answer_log_probs(self.lm, x, y["labels"], training)

        def rows(array):
            return ops.reshape(array, ops.shape(log_probs))

        reference = y.get("reference_log_probs")
        loss, measures = self.policy_loss(
            log_probs,
            rows(y["old_log_probs"]),
            ops.reshape(y["advantages"], (-1,)),
            rows(sample_weight),
            None if reference is None else rows(reference),
        )
        tokens = measures.pop("tokens")
        measures["clipped"] = measures["low"] + measures["high"]
        by_token = {_MEASURES[key]: ops.divide_no_nan(total, tokens) for key, total in measures.items()}
        for mean in self.means[1:]:
            mean.update_state(by_token[mean.name], sample_weight=tokens)
        is_by_token = self.policy_loss.reduction == "mean_with_sample_weight"
        answers = ops.cast(ops.shape(log_probs)[0], "float32")
        self.means[0].update_state(ops.stop_gradient(loss), sample_weight=tokens if is_by_token else answers)
        return (loss + sum(self.lm.losses)) / replicas()

    def track_own_loss(self, loss) -> None:
        """Does nothing: `compute_loss` has updated the mean, by the weights that only it knows."""


def answer_log_probs(lm, inputs, labels, training: bool):
    """The log-probabilities of the tokens of answers, in one pass that encodes each prompt once.

    The logits [B n, T, V] are computed only if the output projection is quantized.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        inputs: the inputs of a `Rollout`.
        labels: int32 [B, n, T].
        training: whether gradients will be computed, and dropout is on.

    Returns:
        float32 [B n, T], in nats, at temperature 1.
    """
    hidden = answer_hidden_states(lm, inputs, training)
    labels, head = ops.reshape(labels, ops.shape(hidden)[:-1]), lm.head
    if head.is_quantized:
        logits = head(hidden)
        picked = ops.take_along_axis(logits, ops.expand_dims(labels, -1), axis=-1)[..., 0]
        return picked - ops.logsumexp(logits, axis=-1)
    trains_table = bool(head.embedding.trainable_variables)
    return target_log_probs(hidden, head.table(), labels, head.cap, train_table=trains_table)
