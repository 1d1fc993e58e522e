"""The log-probabilities of target tokens, differentiable, without the logits [R, T, V].

Losses of whole answers need them: a preference or a reward weighs an answer by the sum of its tokens, so the gradient
of a token is known only when all tokens have been read. `VocabularyCrossEntropy`, which knows its weights beforehand,
computes gradients in the forward pass. Here the backward pass projects the hidden states once more.
"""

from keras import ops

from keras_t5gemma.kernels import cross_entropy
from keras_t5gemma.kernels.choose import implementation
from keras_t5gemma.kernels.cross_entropy.chunks import TokenChunks, default_chunk_bytes
from keras_t5gemma.kernels.cross_entropy.token_loss import CrossEntropy
from keras_t5gemma.kernels.device import devices_of_a_batch
from keras_t5gemma.kernels.matmul import PACKAGE as MATMUL
from keras_t5gemma.kernels.soft_cap import soft_cap


def target_log_probs(
    hidden, table, labels, cap: float | None = None, *, train_table: bool = True, chunk_bytes: int | None = None
):
    """The log-probability of each target token, in nats.

    Args:
        hidden: [R, T, D], the input of the projection, in the compute dtype.
        table: [V, D], the projection.
        labels: int [R, T], each in the vocabulary; mask what is padding in the result.
        cap: soft cap on the logits, or None.
        train_table: whether the table's gradient is needed; without it a third of the backward pass is saved.
        chunk_bytes: bytes of float32 logits per chunk and device; `default_chunk_bytes` if None. It changes time and
            memory, not the result.

    Returns:
        float32 [R, T].
    """
    size = (chunk_bytes or default_chunk_bytes(hidden)) * devices_of_a_batch()[1]
    chunks = TokenChunks(hidden.shape, table.shape[0], size)
    label_chunks = chunks.cut(ops.cast(labels, "int32"))
    kernels = implementation(cross_entropy.PACKAGE)

    @ops.custom_gradient
    def log_probs_of(hidden, table):
        x, shape = chunks.cut(hidden), ops.shape(hidden)
        log_probs = chunks.join(_forward(x, table, label_chunks, chunks.count, cap), shape[:-1])

        def gradients(*args, upstream=None):
            # The gradient of a sum of log-probabilities is that of a cross-entropy with these weights.
            shares = chunks.cut(-ops.cast(args[-1] if upstream is None else upstream, "float32"))
            targets, loss = ((label_chunks, shares), ()), CrossEntropy(cap, z_loss=0.0, label_smoothing=0.0)
            _, x_gradient, *table_gradient = kernels.sums_and_gradients(loss, targets, x, table, train_table)
            return (
                ops.cast(chunks.join(x_gradient, shape), hidden.dtype),
                ops.cast(table_gradient[0], table.dtype) if train_table else ops.zeros_like(table),
            )

        return log_probs, gradients

    return log_probs_of(hidden, kernels.tensor_of(table))


def _forward(x, table, labels, count, cap):
    """Log-probabilities float32 [C, m] of labels [C, m], from hidden states [C, m, D]."""
    compute, product = ops.cast(table, x.dtype), implementation(MATMUL).float32_product

    def body(i, results):
        logits = soft_cap(product("md,vd->mv", x[i], compute), cap)
        picked = ops.take_along_axis(logits, ops.expand_dims(labels[i], 1), axis=1)[:, 0]
        row = picked - ops.logsumexp(logits, axis=1)
        return ops.slice_update(results, [i, 0], ops.expand_dims(row, 0))

    return ops.fori_loop(0, count, body, ops.zeros_like(labels, "float32"))
