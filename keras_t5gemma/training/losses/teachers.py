"""Teachers of `Distillation`: the arrays that each provides for a batch, and how a chunk of the loss reads them."""

import dataclasses

import keras
import keras_hub
from keras import ops

from keras_t5gemma.data.pipelines.teacher_view import PADDING_MASK, POSITIONS, TOKEN_IDS
from keras_t5gemma.kernels.choose import implementation
from keras_t5gemma.kernels.gradients import without_gradients
from keras_t5gemma.kernels.matmul import PACKAGE as MATMUL
from keras_t5gemma.kernels.soft_cap import soft_cap

# Names in the y of stored batches, in place of the teacher's tokens: see `StoredTeacher`.
TOP_IDS, TOP_LOGITS, LOG_SUMS = "teacher_top_ids", "teacher_top_logits", "teacher_log_sums"

# A probability that counts as zero; its logarithm is finite in float32.
_TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Projection:
    """A Gemma's logits, computed from its hidden states per chunk of tokens.

    Attributes:
        cap: soft cap on the logits, or None.
    """

    cap: float | None

    def by_token(self, hidden, table):
        """Logits before the cap [m, V] of hidden states [m, D] and a table [V, D]."""
        return (implementation(MATMUL).float32_product("md,vd->mv", hidden, table),)

    def logits(self, raw):
        """Logits [m, V] after the cap."""
        return soft_cap(raw, self.cap)

    def divergence(self, log_p, temperature, raw):
        """`Logits.divergence` of logits before the cap.

        Args:
            log_p: as for `Logits.divergence`.
            temperature: as for `Logits.divergence`.
            raw: the teacher's logits before the cap, [m, V].
        """
        return Logits().divergence(log_p, temperature, self.logits(raw))


@dataclasses.dataclass(frozen=True)
class Logits:
    """The logits of a `CallableTeacher`."""

    def by_token(self, logits):
        """Logits [m, V], unchanged."""
        return (logits,)

    def logits(self, logits):
        """Logits [m, V] in float32."""
        return ops.cast(logits, "float32")

    def divergence(self, log_p, temperature, logits):
        """The divergence of the student from the teacher.

        Args:
            log_p: the student's log-probabilities [m, V], at the temperature.
            temperature: the teacher's logits are divided by it.
            logits: the teacher's, [m, V].

        Returns:
            `(divergence, target)`: KL(teacher || student), in nats, [m, 1]; and the probabilities [m, V] at which its
            gradient with respect to the student's logits, divided by the temperature, would be zero.

        Raises:
            ValueError: if the teacher has another vocabulary.
        """
        check_vocabulary(logits.shape[-1], log_p.shape[-1])
        log_q = ops.log_softmax(self.logits(logits) / temperature, axis=-1)
        q = ops.exp(log_q)
        # A logit of minus infinity, which excludes a token, adds nothing to the divergence.
        return ops.sum(ops.where(q > 0, q * (log_q - log_p), 0.0), axis=-1, keepdims=True), q


@dataclasses.dataclass(frozen=True)
class TopLogits:
    """The largest K logits, with the rest of the vocabulary as one bucket: exact if K is the vocabulary's size."""

    def by_token(self, ids, logits, log_sums):
        """The stored arrays, unchanged.

        Args:
            ids: int [m, K].
            logits: [m, K].
            log_sums: [m].
        """
        return ids, logits, log_sums

    def divergence(self, log_p, temperature, ids, logits, log_sums):
        """`Logits.divergence` of the largest logits.

        Args:
            log_p: as for `Logits.divergence`.
            temperature: as for `Logits.divergence`.
            ids: int [m, K].
            logits: [m, K] of these ids.
            log_sums: [m], the logarithm of the sum over the whole vocabulary, at the temperature.

        Returns:
            As `Logits.divergence`.
        """
        vocabulary_size, count = log_p.shape[-1], ids.shape[-1]
        log_q = logits / temperature - ops.expand_dims(log_sums, -1)
        q = ops.exp(log_q)
        divergence = ops.sum(q * (log_q - ops.take_along_axis(log_p, ids, axis=-1)), axis=-1, keepdims=True)
        # [m K, 2]: the indices of these tokens in [m, V].
        rows = ops.broadcast_to(ops.expand_dims(ops.arange(ops.shape(ids)[0], dtype="int32"), -1), ops.shape(ids))
        indices = ops.reshape(ops.stack([rows, ids], axis=-1), (-1, 2))
        target = ops.zeros_like(log_p)
        if count < vocabulary_size:
            # The distribution within the bucket is unknown: the student's is taken.
            rest = ops.exp(log_p)
            rest = ops.scatter_update(rest, indices, ops.zeros_like(ops.reshape(q, (-1,))))
            q_rest = ops.clip(1 - ops.sum(q, axis=-1, keepdims=True), 0.0, 1.0)
            p_rest = ops.maximum(ops.sum(rest, axis=-1, keepdims=True), _TINY)
            divergence = divergence + q_rest * (ops.log(ops.maximum(q_rest, _TINY)) - ops.log(p_rest))
            target = rest * (q_rest / p_rest)
        return divergence, ops.scatter_update(target, indices, ops.reshape(q, (-1,)))


class GemmaTeacher:
    """keras-hub's Gemma, whose logits are computed along with the student's, per chunk of tokens.

    Args:
        model: a `keras_hub.models.GemmaCausalLM` or its `GemmaBackbone`, not quantized.
    """

    def __init__(self, model):
        self._backbone = getattr(model, "backbone", model)
        self.tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
        self.vocabulary_size = self._backbone.vocabulary_size
        self.variables = self._backbone.variables
        self.reads = Projection(self._backbone.final_logit_soft_cap)
        self.needs = (TOKEN_IDS, PADDING_MASK)

    def arrays(self, y):
        """`(by_token, shared)` of a batch: hidden states [B, T, D] at the labels' positions, and the table [V, D]."""
        with without_gradients():
            hidden = self._backbone(_inputs(y), training=False)
            table = ops.cast(self._backbone.token_embedding.embeddings, hidden.dtype)
            return (ops.stop_gradient(_at_positions(hidden, y)),), (ops.stop_gradient(table),)


class CallableTeacher:
    """A function or Keras model that returns logits [B, P, V] for token ids and their mask.

    Args:
        function: a Keras model or a function.
    """

    vocabulary_size = None
    tokenizer = None
    reads = Logits()
    needs = (TOKEN_IDS, PADDING_MASK)

    def __init__(self, function):
        self._function = function
        self._options = {"training": False} if isinstance(function, keras.Layer) else {}

    @property
    def variables(self) -> list:
        """The variables of a Keras model; an empty list for a function."""
        return self._function.variables if isinstance(self._function, keras.Layer) else []

    def arrays(self, y):
        """`(by_token, shared)` of a batch: logits [B, T, V] at the labels' positions."""
        with without_gradients():
            logits = self._function(_inputs(y), **self._options)
            return (ops.stop_gradient(_at_positions(logits, y)),), ()


def live_teacher(model) -> GemmaTeacher | CallableTeacher:
    """The teacher for the `teacher` argument of `Distillation`, unless that is a `StoredTeacher`.

    Raises:
        ValueError: if `model` cannot be a teacher.
    """
    if isinstance(model, (keras_hub.models.GemmaCausalLM, keras_hub.models.GemmaBackbone)):
        backbone = getattr(model, "backbone", model)
        if backbone.token_embedding.quantization_mode is None:
            return GemmaTeacher(model)
        if backbone is model:
            raise ValueError("`teacher` is quantized: pass the `GemmaCausalLM` for its logits, not its backbone.")
    if not callable(model):
        raise ValueError(
            f"`teacher` must be a keras-hub `GemmaCausalLM`, a function of token ids and mask that returns logits, or "
            f"a `StoredTeacher`. Received: {type(model).__name__}."
        )
    return CallableTeacher(model)


def check_vocabulary(size: int, expected: int) -> None:
    """Checks that teacher and student have vocabularies of the same size.

    Raises:
        ValueError: if the sizes differ.
    """
    if size != expected:
        raise ValueError(
            f"`teacher` must have the student's vocabulary, of {expected} tokens: logits are compared one by one. "
            f"Received: a teacher with {size}."
        )


def _inputs(y: dict) -> dict:
    """The inputs of a keras-hub Gemma from a batch's y."""
    return {"token_ids": y[TOKEN_IDS], "padding_mask": y[PADDING_MASK]}


def _at_positions(x, y):
    """[B, T, ...], `x` [B, P, ...] at the labels' positions [B, T]; position -1 reads the first, which is not used."""
    positions = ops.maximum(ops.cast(y[POSITIONS], "int32"), 0)
    return ops.take_along_axis(x, ops.expand_dims(positions, -1), axis=1)
