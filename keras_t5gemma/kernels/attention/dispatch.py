"""Selects the attention that runs: the backend's plain one, the one in blocks, or an accelerator library's kernel.

    NVIDIA GPU, PyTorch  `flex_attention`
    TPU, JAX             splash attention, if the environment variable KERAS_T5GEMMA_EXPERIMENTAL names "splash"

Both kernels store no logits, and have soft caps, gradients and grouped heads. They skip the keys that a window hides.
They serve long sequences in bfloat16 and float16. Splash attention was compared in JAX's interpreter only, so it is
opt-in until it has run on a TPU. JAX has no such kernel on NVIDIA GPUs: cuDNN has no soft cap. The Tokamax kernels that
ran were slower than XLA's plain attention (benchmarks/log/2026-11-27-tokamax-attention.md).
"""

import functools
import os
from collections.abc import Callable

import keras

from keras_t5gemma.kernels.attention import flex, splash
from keras_t5gemma.kernels.attention.masks import BlockMask
from keras_t5gemma.kernels.choose import implementation

PACKAGE = __name__.rpartition(".")[0]
# TPUs have no float16.
_DTYPES = {"splash": ("bfloat16",), "flex": ("bfloat16", "float16")}


def attention(query, key, value, visible, *, cap, dtype):
    """Softmax attention by the fastest implementation for the backend, device and mask.

    Args:
        query: [B, T, K, G, H], scaled.
        key: [B, K, S, H].
        value: [B, K, S, H].
        visible: bool [B, T, S], True if the query may see the key; or a `BlockMask` for long sequences.
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


def has_kernel(dtype: str) -> bool:
    """Whether this machine and backend have a kernel for a compute dtype."""
    return dtype in _DTYPES.get(kernel_name(), ())


def kernel_for(mask: BlockMask) -> Callable | None:
    """The kernel that can serve a mask.

    Returns:
        `(query, key, value, mask, cap) -> [B, T, K, G, H]`, or None if no kernel can serve the mask. Shapes and numbers
        are those of `attention`; only the order of sums differs.
    """
    name = kernel_name()
    # Splash attention builds its mask before it runs, so the first query's position must be static.
    if name is None or (name == "splash" and not _starts_at_zero(mask)):
        return None
    return {"splash": splash, "flex": flex}[name].attend


def _starts_at_zero(mask: BlockMask) -> bool:
    return isinstance(mask.query_start, int) and mask.query_start == 0


@functools.cache
def kernel_name() -> str | None:
    """ "splash", "flex", or None on a machine that has neither."""
    return {"jax": _name_on_jax, "torch": _name_on_torch}.get(keras.config.backend(), lambda: None)()


def _name_on_jax() -> str | None:
    import jax

    wanted = os.environ.get("KERAS_T5GEMMA_EXPERIMENTAL", "").split(",")
    return "splash" if jax.default_backend() == "tpu" and "splash" in wanted else None


def _name_on_torch() -> str | None:
    import torch

    return "flex" if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) else None
