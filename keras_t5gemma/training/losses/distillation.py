"""Learning from a teacher's logits (Hinton et al., arXiv 1503.02531) without a tensor of all of them."""

import dataclasses
from collections.abc import Mapping

import keras
from keras import ops

from keras_t5gemma.data.pipelines.teacher_view import LABELS, POSITIONS
from keras_t5gemma.kernels.cross_entropy.token_loss import Softmax, before_cap
from keras_t5gemma.training.losses.cross_entropy import VocabularyCrossEntropy
from keras_t5gemma.training.losses.stored_teacher import StoredTeacher
from keras_t5gemma.training.losses.teachers import check_vocabulary, live_teacher


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Distillation(VocabularyCrossEntropy):
    """The mean over target tokens of how far the student's distribution is from the teacher's.

        data = distillation_dataset(pretraining_dataset(...), objective)
        lm.compile(loss=Distillation(GemmaCausalLM.from_preset("gemma2_9b_en")))
        lm.fit(data, steps_per_epoch=1000)

    A token that the teacher predicts costs, with the teacher's probabilities q and the student's p,

        hard_weight * -log p(label) + (1 - hard_weight) * temperature ** 2 * KL(q || p, both at the temperature)

    and one that it does not, such as a sentinel, costs `-log p(label)`: T5Gemma 2's variant for UL2 (arXiv 2512.14856).
    What a teacher predicts is in each batch: see `distillation_dataset`. Student's and teacher's logits are made a
    chunk of tokens at a time, and gradients with them, as `VocabularyCrossEntropy` does.

    The teacher is not part of the student: it is not trained, counted or saved with it. A model that was saved while it
    was compiled with this loss comes back without teacher and needs another `compile`.

    Args:
        teacher: a keras-hub `GemmaCausalLM` (or `GemmaBackbone`); a function that gives logits [B, P, V], capped
            already, for `{"token_ids", "padding_mask"}` [B, P], or a Keras model that does, such as a quantized Gemma:
            these do make all logits of a batch, and arrays that a plain function holds become constants of JAX's
            program; or a `StoredTeacher`, whose batches `fit` gets then.
        temperature: what both logits are divided by.
        hard_weight: of the cross-entropy with the labels, in [0, 1]; 0, as in Gemma 2 and T5Gemma (arXiv 2408.00118,
            section 3.2), for the teacher alone.
        name: the loss's name.
        **kwargs: what `keras.losses.Loss` takes besides.

    Raises:
        ValueError: if an argument is out of range or `teacher` is none; in `compile`, where its vocabulary is not
            the student's; in `fit`, where batches lack the teacher's view.
    """

    def __init__(self, teacher=None, temperature=1.0, hard_weight=0.0, name="distillation", **kwargs):
        super().__init__(name=name, **kwargs)
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0. Received: temperature={temperature!r}.")
        if not 0 <= hard_weight <= 1:
            raise ValueError(f"`hard_weight` must be in [0, 1]. Received: hard_weight={hard_weight!r}.")
        if isinstance(teacher, StoredTeacher) and teacher.temperature != temperature:
            raise ValueError(
                f"`temperature` must be {teacher.temperature}, with which the logits in {teacher.folder} were stored. "
                f"Received: temperature={temperature!r}."
            )
        self.temperature = temperature
        self.hard_weight = hard_weight
        self.teacher = teacher
        if teacher is not None:
            self.teacher = teacher if isinstance(teacher, StoredTeacher) else live_teacher(teacher)

    def check_student(self, vocabulary_size, tokenizer):
        """Compares the teacher's vocabulary with a student's, as far as both are known.

        Args:
            vocabulary_size: V.
            tokenizer: the student's, or None.

        Raises:
            ValueError: if they differ.
        """
        if self.teacher is None:
            return
        if self.teacher.vocabulary_size is not None:
            check_vocabulary(self.teacher.vocabulary_size, vocabulary_size)
        pieces = [_pieces(one) for one in (self.teacher.tokenizer, tokenizer)]
        if None not in pieces and pieces[0] != pieces[1]:
            place = next(
                (i for i, (a, b) in enumerate(zip(*pieces, strict=False)) if a != b), min(len(p) for p in pieces)
            )
            raise ValueError(
                f"`teacher` must have the student's vocabulary: logits are compared one by one. Received: tokenizers "
                f"of {len(pieces[0])} (teacher) and {len(pieces[1])} tokens that differ from id {place} on."
            )

    def labels_of(self, y, vocabulary_size=None):
        """The labels [B, T] of a batch with a teacher's view.

        Args:
            y: the batch's.
            vocabulary_size: V, to compare with that of a teacher who has to be asked for it; None not to ask.

        Raises:
            ValueError: if it has no view, there is no teacher, or its vocabulary is another.
        """
        if self.teacher is None:
            raise ValueError(
                "`Distillation` has no teacher: none is saved with a model. Compile again, with "
                "`loss=Distillation(teacher)`."
            )
        needed = (LABELS, POSITIONS, *self.teacher.needs)
        if not isinstance(y, Mapping) or not set(needed) <= set(y):
            advice = (
                "Pass `fit` its `batches()`"
                if isinstance(self.teacher, StoredTeacher)
                else "Wrap the dataset in `distillation_dataset`"
            )
            found = f"a dict with {', '.join(y)}" if isinstance(y, Mapping) else "labels alone"
            raise ValueError(
                f"The batches have no view for the teacher, {', '.join(needed)}. {advice}. Received: {found}."
            )
        if vocabulary_size is not None and self.teacher.vocabulary_size is None:
            (logits,), _ = self.teacher.arrays(y)
            check_vocabulary(logits.shape[-1], vocabulary_size)
        return y[LABELS]

    def token_loss(self, cap, y, labels, shares):
        """See `VocabularyCrossEntropy`; runs the teacher."""
        by_token, shared = self.teacher.arrays(y)
        soft = ops.where(y[POSITIONS] >= 0, shares * (1 - self.hard_weight), 0.0)
        token_loss = TeacherLoss(cap, self.temperature, self.teacher.reads)
        return token_loss, (labels, shares, soft, *by_token), shared

    def get_config(self):
        """The constructor's arguments but the teacher."""
        config = super().get_config()
        del config["z_loss"], config["label_smoothing"]
        return {**config, "temperature": self.temperature, "hard_weight": self.hard_weight}


@dataclasses.dataclass(frozen=True)
class TeacherLoss:
    """`CrossEntropy` with a teacher.

    Attributes:
        cap: soft cap on the student's logits, or None.
        temperature: what both logits are divided by.
        teacher: what its arrays are; see `teachers`.
    """

    cap: float | None
    temperature: float
    teacher: object

    def by_token(self, labels, shares, soft, *arrays):
        """With the teacher's logits made, where it makes them by chunk."""
        return labels, shares, soft, *self.teacher.by_token(*arrays)

    def of_logits(self, logits, labels, shares, soft, *arrays, gradients):
        """As in `CrossEntropy`.

        Args:
            logits: the student's, capped, [m, V].
            labels: [m].
            shares: [m], of each token in the mean.
            soft: [m], the part of them that goes by the teacher.
            *arrays: the teacher's, [m, ...].
            gradients: whether they are wanted.
        """
        labels, shares, soft = (ops.expand_dims(array, -1) for array in (labels, shares, soft))
        hard = shares - soft
        softmax = Softmax.of(logits)
        log_p = logits - softmax.log_sum
        scaled = log_p if self.temperature == 1 else ops.log_softmax(logits / self.temperature, axis=-1)
        divergence, target = self.teacher.divergence(scaled, self.temperature, *arrays)
        picked = ops.take_along_axis(logits, labels, axis=-1)
        losses = soft * self.temperature**2 * divergence + hard * (softmax.log_sum - picked)
        correct = shares * ops.cast(picked >= softmax.largest, "float32")
        sums = ops.sum(ops.concatenate([losses, correct], axis=-1), axis=0)
        if not gradients:
            return sums, None
        is_label = ops.equal(ops.arange(logits.shape[-1], dtype="int32"), labels)
        if self.temperature == 1:
            gradient = softmax.times(shares) - soft * target
        else:
            gradient = soft * self.temperature * (ops.exp(scaled) - target) + softmax.times(hard)
        gradient = ops.where(is_label, gradient - hard, gradient)
        return sums, before_cap(gradient, logits, self.cap)


def _pieces(tokenizer):
    """A tokenizer's vocabulary in the order of ids, or None where it is not known."""
    if tokenizer is None or getattr(tokenizer, "proto", None) is None:
        return None
    return list(tokenizer.get_vocabulary())
