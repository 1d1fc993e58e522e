"""Matrix products in the forms that each backend computes fast.

Each implementation has these functions:

    dense(call, x, kernel)                  a layer's product, [M, K] by [K, N]
    table_product(x, table)                 logits [B, T, V] of x [B, T, D] and a table [V, D]
    float32_product(equation, left, right)  an einsum of two operands in the compute dtype, summed in float32

The modules are:

    reference   `keras.ops`
    jax         half precision for XLA on CPUs and GPUs
    torch       few rows on a CPU
"""

PACKAGE = __name__
