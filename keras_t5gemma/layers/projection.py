"""From the decoder's hidden states to logits over the vocabulary."""

import math

import keras
from keras import ops

from keras_t5gemma.kernels.attention.reference import soft_cap_of_own
from keras_t5gemma.kernels.device import on_cpu
from keras_t5gemma.kernels.embedding.quantized import goes_by_blocks, project
from keras_t5gemma.kernels.float16 import finite
from keras_t5gemma.kernels.matmul.xla import has_quick_kernel, table_product
from keras_t5gemma.layers.copies import part_of_a_model

# Rows up to which `_product` puts the table first, by backend: twice as fast and more on PyTorch, half as fast again
# on JAX.
_FEW_ROWS = {"jax": 16, "torch": 3}


class VocabularyProjection(keras.layers.Layer):
    """The output projection: the decoder's embedding table, transposed where tied, and the final soft cap.

    Args:
        embedding: the decoder's built `keras.layers.ReversibleEmbedding`.
        cap: `c` in `c * tanh(x / c)`, or None.
    """

    def __init__(self, embedding, cap=None, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.embedding = embedding
        self.cap = cap
        self.built = True

    def call(self, x):
        """Maps [B, T, D] to float32 logits [B, T, V]."""
        return soft_cap_of_own(ops.cast(finite(self._project(x)), "float32"), self.cap)

    def get_config(self):
        """Refused: a copy made by itself would not be tied to its embedding any more."""
        raise part_of_a_model(self)

    @property
    def is_quantized(self):
        """Whether there is no `table()` of floating-point numbers."""
        return self.embedding.quantization_mode is not None

    def table(self):
        """The projection as one differentiable [V, D], LoRA included."""
        embedding = self.embedding
        return embedding.embeddings if embedding.tie_weights else ops.transpose(embedding.reverse_embeddings)

    def _project(self, x):
        embedding = self.embedding
        if goes_by_blocks(embedding, x):
            return project(_product, x, embedding)
        if self.is_quantized or not embedding.tie_weights:
            return embedding(x, reverse=True)
        # The table as it is stored: through `reverse=True` XLA:CPU transposes it anew for every token decoded.
        return _product(x, ops.cast(embedding.embeddings, x.dtype))

    def compute_output_shape(self, input_shape):
        """[B, T, V]."""
        return (*input_shape[:-1], self.embedding.input_dim)


def _product(x, table):
    """[B, T, V] of x [B, T, D] and a table [V, D]."""
    backend, rows = keras.config.backend(), _rows_that_count(x)
    if has_quick_kernel(x):
        logits = table_product(ops.reshape(x, (-1, x.shape[2])), table)
        return ops.reshape(ops.cast(logits, x.dtype), (*ops.shape(x)[:2], -1))
    if rows <= _FEW_ROWS.get(backend, 0):
        return _table_first(x, table)
    if backend != "torch":
        return ops.einsum("btd,vd->btv", x, table)
    from keras_t5gemma.kernels.matmul import onednn as onednn_torch

    if rows < math.inf and onednn_torch.serves(x, table):
        return onednn_torch.rows_times_table(x, table)
    # PyTorch's `einsum` of bfloat16 takes thirty times as long on CPUs.
    return ops.matmul(x, ops.transpose(table))


def _rows_that_count(x):
    """How many rows x [B, T, D] has, where a CPU's library has a better way with a few of them; else very many."""
    # PyTorch multiplies half precision by another library, which is fastest with the rows first.
    gains = keras.config.backend() != "torch" or keras.backend.standardize_dtype(x.dtype) == "float32"
    return x.shape[0] * x.shape[1] if gains and None not in x.shape[:2] and on_cpu(x) else math.inf


def _table_first(x, table):
    rows = ops.reshape(x, (-1, x.shape[2]))
    count = rows.shape[0]
    if keras.config.backend() == "jax":
        import jax

        # XLA would turn a product that is transposed around again.
        logits = ops.transpose(jax.lax.optimization_barrier(ops.matmul(table, ops.transpose(rows))))
    else:
        # One row is made two, in memory: of a single vector PyTorch's library makes use of a third of the memory's
        # speed on some processors (57 against 18 ms, see benchmarks/RESULTS.md), and of one row seen twice of a sixth.
        columns = rows.T if count > 1 else rows.repeat(2, 1).T
        logits = (table @ columns)[:, :count].T.contiguous()
    return ops.reshape(logits, (*x.shape[:2], -1))
