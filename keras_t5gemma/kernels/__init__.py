"""Code that differs by backend or device: one folder per operation, one file per backend.

Each operation has a plain implementation in `keras.ops`. It is the oracle of all others.

    choose            which implementation of an operation runs, and how a test selects another one
    attention/        softmax attention: plain, in blocks of queries, by kernels of accelerators
    cross_entropy/    the loss over a large vocabulary, without storing its logits
    embedding/        lookups, and products with tables in int8 and int4
    matmul/           products in half precision
    barriers          keep a compiler from recomputing, fusing or transposing tensors
    cache_update      writes into the key and value cache of decoding
    device            the device that computes a tensor
    float16           clips values to the range of float16
    gradients         whether gradients are recorded
    rematerialization recomputes activations in the backward pass
    row_draws         random choices of rows that each have a seed of their own
    soft_cap          `cap * tanh(x / cap)`
"""
