"""The memory's speed and the bytes of a decoding step of Small-Small.

    memory_floor.py BATCH INPUTS DTYPE MIDDLE LONG REPEATS

Prints `[bytes a second, those of a product with the table, a step's bytes of weights, of keys and values]`.
"""

import json
import sys

import torch
from first_and_fastest import first_and_fastest

V = 256_000
batch, inputs, dtype = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
middle, long, repeats = map(int, sys.argv[4:7])
mode, _, policy = dtype.partition("_from_")
policy = (policy or "float32") if mode in ("int8", "int4") else dtype
flat, other = torch.zeros(V * 512), torch.ones(V * 512)


def speed(run, read):
    """Bytes a second."""
    return read / first_and_fastest(run, 5 * repeats)[1]


def product(width, vectors):
    """Bytes a second of the table's numbers as rows of a width, with so many vectors."""
    right = other[: width * vectors].view(vectors, width).T
    return speed(lambda: flat.view(-1, width) @ right, 4 * V * 512)


# The table with one vector and with two, which can be faster; wider matrices; two vectors of the table's size.
speeds = [product(*shape) for shape in [(512, 1), (512, 2), (2048, 1), (8192, 1), (32768, 1)]]
best = max(*speeds, speed(lambda: torch.dot(flat, other), 8 * V * 512))
# 8 layers: six attention kernels of 512 x 512, since cross-attention's keys and values are made once, and three of
# 512 x 1,024; the table.
numbers = 8 * (6 * 512 * 512 + 3 * 512 * 1024) + V * 512
weights = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5}[mode] * numbers
cache = {"float32": 4, "bfloat16": 2}[policy] * 8 * 2 * 512 * batch * (inputs + (middle + long) // 2)
print(json.dumps([best, speeds[0], weights, cache]))
