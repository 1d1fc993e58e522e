"""Softmax attention with soft caps, windows and segments.

masks          who may attend to whom
reference      plain attention, which every other implementation must equal
query_blocks   queries cut into blocks, and the keys that a block sees
jax            with a gradient of its own, which keeps one number per query and head
tensorflow     in blocks by a loop, with the loop's gradient
torch          in place without gradients; in blocks that are computed again in the backward pass
splash, flex   kernels of JAX on TPUs, of PyTorch on NVIDIA's GPUs
dispatch       which of these runs
"""
