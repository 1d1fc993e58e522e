"""Softmax attention with soft caps, windows and segments.

masks          the keys that each query may see
reference      plain attention, which every other implementation must equal
query_blocks   cuts queries into blocks, and selects the keys that a block sees
jax            a custom gradient that stores one number per query and head
tensorflow     a loop over blocks, with a custom gradient
torch          in place without gradients; in blocks that the backward pass recomputes
flex           PyTorch's `flex_attention`, a kernel for NVIDIA GPUs
splash         JAX's splash attention, a kernel for TPUs
dispatch       selects one of these implementations
"""
