"""Teachers of `Distillation`: the arrays that each gives for a batch, and how a chunk of the loss uses them."""

import dataclasses

import keras
import keras_hub
from keras import ops

from keras_t5gemma.data.pipelines.teacher_view import PADDING_MASK, POSITIONS, TOKEN_IDS
from keras_t5gemma.kernels.choose import implementation
from keras_t5gemma.kernels.gradients import without_gradients
from keras_t5gemma.kernels.matmul import PACKAGE as MATMUL
from keras_t5gemma.kernels.soft_cap import soft_cap

# What stored batches have in the place of the teacher's tokens: see `StoredTeacher`.
TOP_IDS, TOP_LOGITS, LOG_SUMS = "teacher_top_ids", "teacher_top_logits", "teacher_log_sums"

# A share of nothing: its logarithm is a number in float32.
_TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Projection:
    """A Gemma's logits, made of its hidden states a chunk at a time."""

    cap: float | None

    def by_token(self, hidden, table):
        """Logits before the cap [m, V] of hidden states [m, D] and a table [V, D]."""
        return (implementation(MATMUL).float32_product("md,vd->mv", hidden, table),)

    def logits(self, raw):
        """Capped ones."""
        return soft_cap(raw, self.cap)

    def divergence(self, log_p, temperature, raw):
        """See `Logits`."""
        return Logits().divergence(log_p, temperature, self.logits(raw))


@dataclasses.dataclass(frozen=True)
class Logits:
    """Logits as they come."""

    def by_token(self, logits):
        """Logits [m, V]."""
        return (logits,)

    def logits(self, logits):
        """In float32."""
        return ops.cast(logits, "float32")

    def divergence(self, log_p, temperature, logits):
        """How far the student is from the teacher.

        Args:
            log_p: the student's log-probabilities [m, V], at the temperature.
            temperature: what the teacher's logits are divided by.
            logits: the teacher's, [m, V].

        Returns:
            `(divergence, target)`: KL(teacher || student), in nats, [m, 1]; the probabilities [m, V] at which its
            gradient with respect to the student's logits, over the temperature, would be zero.

        Raises:
            ValueError: where the teacher has another vocabulary.
        """
        check_vocabulary(logits.shape[-1], log_p.shape[-1])
        log_q = ops.log_softmax(self.logits(logits) / temperature, axis=-1)
        q = ops.exp(log_q)
        # A logit of minus infinity, which rules a token out, has no share of the divergence.
        return ops.sum(ops.where(q > 0, q * (log_q - log_p), 0.0), axis=-1, keepdims=True), q


@dataclasses.dataclass(frozen=True)
class TopLogits:
    """The largest K logits, the rest of the vocabulary one bucket: exact where K is the vocabulary."""

    def by_token(self, ids, logits, log_sums):
        """What was stored: [m, K], [m, K] and [m]."""
        return ids, logits, log_sums

    def divergence(self, log_p, temperature, ids, logits, log_sums):
        """See `Logits`; logits [m, K] of ids [m, K], and the logarithm [m] of the sum over the whole vocabulary."""
        vocabulary_size, count = log_p.shape[-1], ids.shape[-1]
        log_q = logits / temperature - ops.expand_dims(log_sums, -1)
        q = ops.exp(log_q)
        divergence = ops.sum(q * (log_q - ops.take_along_axis(log_p, ids, axis=-1)), axis=-1, keepdims=True)
        # [m, K, 2]: where each of them is in [m, V].
        rows = ops.broadcast_to(ops.expand_dims(ops.arange(ops.shape(ids)[0], dtype="int32"), -1), ops.shape(ids))
        places = ops.reshape(ops.stack([rows, ids], axis=-1), (-1, 2))
        target = ops.zeros_like(log_p)
        if count < vocabulary_size:
            # The bucket is shared out as the student has it: how it is spread within is not known.
            rest = ops.exp(log_p)
            rest = ops.scatter_update(rest, places, ops.zeros_like(ops.reshape(q, (-1,))))
            q_rest = ops.clip(1 - ops.sum(q, axis=-1, keepdims=True), 0.0, 1.0)
            p_rest = ops.maximum(ops.sum(rest, axis=-1, keepdims=True), _TINY)
            divergence = divergence + q_rest * (ops.log(ops.maximum(q_rest, _TINY)) - ops.log(p_rest))
            target = rest * (q_rest / p_rest)
        return divergence, ops.scatter_update(target, places, ops.reshape(q, (-1,)))


class GemmaTeacher:
    """keras-hub's Gemma, whose logits are made with the student's, a chunk at a time.

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
        """`(by_token, shared)` for a batch: hidden states [B, T, D] at the labels' positions, and the table [V, D]."""
        with without_gradients():
            hidden = self._backbone(_inputs(y), training=False)
            table = ops.cast(self._backbone.token_embedding.embeddings, hidden.dtype)
            return (ops.stop_gradient(_at_positions(hidden, y)),), (ops.stop_gradient(table),)


class CallableTeacher:
    """Anything that gives logits [B, P, V] for token ids and their mask.

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
    def variables(self):
        """A Keras model's."""
        return self._function.variables if isinstance(self._function, keras.Layer) else []

    def arrays(self, y):
        """`(by_token, shared)` for a batch: logits [B, T, V] at the labels' positions."""
        with without_gradients():
            logits = self._function(_inputs(y), **self._options)
            return (ops.stop_gradient(_at_positions(logits, y)),), ()


def live_teacher(model):
    """The teacher that a user means.

    Raises:
        ValueError: where it is none.
    """
    if isinstance(model, (keras_hub.models.GemmaCausalLM, keras_hub.models.GemmaBackbone)):
        backbone = getattr(model, "backbone", model)
        if backbone.token_embedding.quantization_mode is None:
            return GemmaTeacher(model)
        if backbone is model:
            raise ValueError("`teacher` is quantized: pass the `GemmaCausalLM` for its logits, not its backbone.")
    if not callable(model):
        raise ValueError(
            f"`teacher` must be a keras-hub `GemmaCausalLM`, a function of token ids and mask that gives logits, or a "
            f"`StoredTeacher`. Received: {type(model).__name__}."
        )
    return CallableTeacher(model)


def check_vocabulary(found, expected):
    """Refuses a teacher whose logits are of other tokens.

    Raises:
        ValueError: where the sizes differ.
    """
    if found != expected:
        raise ValueError(
            f"`teacher` must have the student's vocabulary, of {expected} tokens: logits are compared one by one. "
            f"Received: a teacher with {found}."
        )


def _inputs(y):
    return {"token_ids": y[TOKEN_IDS], "padding_mask": y[PADDING_MASK]}


def _at_positions(x, y):
    """[B, P, ...] at the positions [B, T]; at those of -1 whatever is first."""
    positions = ops.maximum(ops.cast(y[POSITIONS], "int32"), 0)
    return ops.take_along_axis(x, ops.expand_dims(positions, -1), axis=1)
