"""Which attention runs: the backend's plain one, the one in blocks, or a kernel of an accelerator's library.

    TPU, JAX             splash attention
    NVIDIA GPU, PyTorch  `flex_attention`

Both kernels keep no logits in memory, and have soft caps, gradients and grouped heads; they skip what a window hides.
They serve long sequences in bfloat16 and float16. JAX has none on NVIDIA's GPUs: cuDNN has no soft cap, and those of
Tokamax's that ran were slower than what XLA makes of the plain one (benchmarks/log/2026-11-27-tokamax-attention.md).
"""

import functools

import keras

from keras_t5gemma.kernels.attention import flex, splash
from keras_t5gemma.kernels.attention.masks import BlockMask
from keras_t5gemma.kernels.choose import implementation

PACKAGE = __name__.rpartition(".")[0]
# TPUs have no float16.
_DTYPES = {"splash": ("bfloat16",), "flex": ("bfloat16", "float16")}


def attention(query, key, value, visible, *, cap, dtype):
    """Values, weighted by how well their keys match the queries: at once, by a kernel, or in blocks.

    Args:
        query: [B, T, K, G, H], scaled.
        key: [B, K, S, H].
        value: [B, K, S, H].
        visible: bool [B, T, S], True if the query may see the key; or a `BlockMask`, for long sequences.
        cap: soft cap on the logits, or None.
        dtype: the compute dtype; the softmax is in float32.

    Returns:
        [B, T, K, G, H]; zeros for a query that sees no key.
    """
    module = implementation(PACKAGE)
    if not isinstance(visible, BlockMask):
        return module.attend(query, key, value, visible, cap=cap, dtype=dtype)
    if has_kernel(dtype) and (kernel := kernel_for(visible)) is not None:
        return kernel(query, key, value, visible, cap)
    return module.in_blocks(query, key, value, visible, cap=cap, dtype=dtype)


def has_kernel(dtype):
    """Whether this machine and backend have a kernel for a compute dtype."""
    return dtype in _DTYPES.get(kernel_name(), ())


def kernel_for(mask):
    """`(query, key, value, mask, cap) -> [B, T, K, G, H]` for a `BlockMask`, or None if no kernel can serve it.

    Shapes are those of `attention`, and so are the numbers, but for the order of sums.
    """
    name = kernel_name()
    # Splash attention's mask is made before it runs: queries must not begin at a position that is known only then.
    if name is None or (name == "splash" and not _from_the_start(mask)):
        return None
    return {"splash": splash, "flex": flex}[name].attend


def _from_the_start(mask):
    return isinstance(mask.query_start, int) and mask.query_start == 0


@functools.cache
def kernel_name():
    """ "splash", "flex", or None on a machine that has neither."""
    return {"jax": _name_on_jax, "torch": _name_on_torch}.get(keras.config.backend(), lambda: None)()


def _name_on_jax():
    import jax

    return "splash" if jax.default_backend() == "tpu" else None


def _name_on_torch():
    import torch

    return "flex" if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) else None
