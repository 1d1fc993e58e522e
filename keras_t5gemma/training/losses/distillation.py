"""Learning from a teacher's logits (Hinton et al., arXiv 1503.02531) without a tensor of all logits."""

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
    """The mean divergence of the student's distribution from the teacher's, over target tokens.

        data = distillation_dataset(pretraining_dataset(...), objective)
        lm.compile(loss=Distillation(GemmaCausalLM.from_preset("gemma2_9b_en")))
        lm.fit(data, steps_per_epoch=1000)

    A token that the teacher predicts costs, with the teacher's probabilities q and the student's p,

        hard_weight * -log p(label) + (1 - hard_weight) * temperature ** 2 * KL(q || p, both at the temperature)

    and a token that the teacher does not predict, such as a sentinel, costs `-log p(label)`: T5Gemma 2's variant for
    UL2 (arXiv 2512.14856). Each batch says which tokens the teacher predicts: see `distillation_dataset`. The logits of
    student and teacher are computed per chunk of tokens, and the gradients with them, as in `VocabularyCrossEntropy`.

    The teacher is not part of the student: it is not trained, counted or saved with it. A model that was saved while it
    was compiled with this loss is loaded without a teacher and needs another `compile`.

    Args:
        teacher: a keras-hub `GemmaCausalLM` (or `GemmaBackbone`); or a function that returns logits [B, P, V], after
            the cap, for `{"token_ids", "padding_mask"}` [B, P], or such a Keras model, e.g. a quantized Gemma; or a
            `StoredTeacher`, whose `batches()` are then the data of `fit`. A function or a model computes all logits of
            a batch at once, and on JAX the arrays that a plain function reads become constants of the program.
        temperature: both logits are divided by it.
        hard_weight: weight of the cross-entropy with the labels, in [0, 1]; 0, as in Gemma 2 and T5Gemma (arXiv
            2408.00118, section 3.2), to learn from the teacher only.
        name: the loss's name.
        **kwargs: further arguments of `keras.losses.Loss`.

    Raises:
        ValueError: if an argument is out of range or `teacher` is not a teacher; in `compile`, if its vocabulary is not
            the student's; in `fit`, if batches lack the teacher's view.
    """

    def __init__(
        self,
        teacher=None,
        temperature: float = 1.0,
        hard_weight: float = 0.0,
        name: str = "distillation",
        **kwargs,
    ):
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

    def check_student(self, vocabulary_size: int, tokenizer) -> None:
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
        teachers, students = _pieces(self.teacher.tokenizer), _pieces(tokenizer)
        if teachers is not None and students is not None and teachers != students:
            pairs = enumerate(zip(teachers, students, strict=False))
            first = next((i for i, (a, b) in pairs if a != b), min(len(teachers), len(students)))
            raise ValueError(
                f"`teacher` must have the student's vocabulary: logits are compared one by one. Received: tokenizers "
                f"of {len(teachers)} (teacher) and {len(students)} tokens that differ from id {first} on."
            )

    def labels_of(self, y: Mapping, vocabulary_size: int | None = None):
        """The labels [B, T] of a batch with a teacher's view.

        Args:
            y: the batch's y.
            vocabulary_size: V, to compare with a teacher that tells its vocabulary only by its logits; None not to run
                the teacher.

        Raises:
            ValueError: if the batch has no view, there is no teacher, or the teacher has another vocabulary.
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
            received = f"a dict with {', '.join(y)}" if isinstance(y, Mapping) else "labels alone"
            raise ValueError(
                f"The batches have no view for the teacher, {', '.join(needed)}. {advice}. Received: {received}."
            )
        if vocabulary_size is not None and self.teacher.vocabulary_size is None:
            (logits,), _ = self.teacher.arrays(y)
            check_vocabulary(logits.shape[-1], vocabulary_size)
        return y[LABELS]

    def token_loss(self, cap: float | None, y: Mapping, labels, shares):
        """Runs the teacher; returns the `TeacherLoss` and its arrays, see `VocabularyCrossEntropy.token_loss`.

        Args:
            cap: soft cap on the student's logits, or None.
            y: a batch's y, with the teacher's view.
            labels: its labels, int32 [B, T].
            shares: [B, T], the share of each token in the mean.
        """
        by_token, shared = self.teacher.arrays(y)
        soft = ops.where(y[POSITIONS] >= 0, shares * (1 - self.hard_weight), 0.0)
        token_loss = TeacherLoss(cap, self.temperature, self.teacher.reads)
        return token_loss, (labels, shares, soft, *by_token), shared

    def get_config(self) -> dict:
        """The constructor's arguments except the teacher."""
        config = super().get_config()
        del config["z_loss"], config["label_smoothing"]
        return {**config, "temperature": self.temperature, "hard_weight": self.hard_weight}


@dataclasses.dataclass(frozen=True)
class TeacherLoss:
    """`CrossEntropy` with a teacher.

    Attributes:
        cap: soft cap on the student's logits, or None.
        temperature: both logits are divided by it.
        teacher: the `reads` of a teacher, which knows what its arrays hold; see `teachers`.
    """

    cap: float | None
    temperature: float
    teacher: object

    def by_token(self, labels, shares, soft, *arrays):
        """The arrays of a chunk, one row per token; computes the teacher's logits if that is done per chunk.

        Args:
            labels: [m].
            shares: [m].
            soft: [m].
            *arrays: the teacher's arrays, [m, ...], and those that every chunk reads whole.
        """
        return labels, shares, soft, *self.teacher.by_token(*arrays)

    def of_logits(self, logits, labels, shares, soft, *arrays, gradients):
        """Loss and accuracy of a chunk of m tokens, and the gradient of the loss, as `CrossEntropy.of_logits`.

        Args:
            logits: the student's, after the cap, [m, V].
            labels: [m].
            shares: [m], the share of each token in the mean.
            soft: [m], the part of `shares` that the teacher decides.
            *arrays: the teacher's arrays, [m, ...].
            gradients: whether to return the gradient.

        Returns:
            `(sums, gradient)`: loss and accuracy, float32 [2]; the gradient with respect to the logits before the cap,
            [m, V], or None.
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
    """A tokenizer's vocabulary in the order of ids, or None if it is unknown."""
    if tokenizer is None or getattr(tokenizer, "proto", None) is None:
        return None
    return list(tokenizer.get_vocabulary())
