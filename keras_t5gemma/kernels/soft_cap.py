"""The soft cap of logits (Gemma 2, arXiv 2408.00118, section 2)."""

from keras import ops

from keras_t5gemma.kernels.gradients import may_overwrite


def soft_cap(logits, cap: float | None):
    """`cap * tanh(logits / cap)`, or the logits themselves if `cap` is None."""
    return logits if cap is None else ops.tanh(logits / cap) * cap


def soft_cap_in_place(logits, cap: float | None):
    """`soft_cap` of logits that nothing else reads. It overwrites them on PyTorch if gradients are not recorded."""
    if cap is None or not may_overwrite():
        return soft_cap(logits, cap)
    return logits.div_(cap).tanh_().mul_(cap)
