"""Whatever differs by backend or device, one folder per operation and one file per backend.

Each operation has a plain implementation in `keras.ops`, which is the oracle of all others.

    choose            which implementation of an operation runs, and how a test asks for another one
    attention/        softmax attention: plain, in blocks of queries, by kernels of accelerators
    cross_entropy/    the loss over a large vocabulary, without its logits
    embedding/        lookups, and products with tables in int8 and int4
    matmul/           products in half precision
    barriers          what a compiler must not recompute, fuse or transpose
    cache_update      writing into the keys and values that decoding keeps
    device            where tensors are computed
    float16           values clipped to float16's range
    gradients         whether gradients are recorded
    rematerialization activations that are computed again in the backward pass
    soft_cap          `cap * tanh(x / cap)`
"""
