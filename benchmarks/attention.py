"""Attention over long sequences on an accelerator: library kernels, plain attention, and attention in blocks.

    python benchmarks/attention.py --backend jax
    python benchmarks/attention.py --backend torch --lengths 1024 4096

The 2B size: 8 query heads, 4 key and value heads of 256, soft cap 50, bfloat16, batch 1, one segment. `sliding` has a
window of 4,096, in both directions as in the encoder. Milliseconds are measured for the output alone, and with the
gradients of query, key and value. They are medians of `--repeats` runs after a first one. The error is the output's
distance from plain attention in float32, relative to its norm.
"""

import argparse
import functools
import importlib.util
import os
import statistics
import time

import record
from rich.console import Console
from rich.table import Table

HEADS, KV_HEADS, SIZE, CAP, WINDOW = 8, 4, 256, 50.0, 4096
KINDS = {"global": {}, "causal": {"causal": True}, "sliding": {"window": WINDOW}}


def ways(backend):
    """By name: `(query, key, value, mask, cap) -> output`."""
    from keras_t5gemma.kernels.attention import flex, splash
    from keras_t5gemma.kernels.attention.dispatch import PACKAGE, attention
    from keras_t5gemma.kernels.choose import implementation

    def plain(query, key, value, mask, cap):
        return attention(query, key, value, whole(mask), cap=cap, dtype="bfloat16")

    def blocks(query, key, value, mask, cap):
        return implementation(PACKAGE).in_blocks(query, key, value, mask, cap=cap, dtype="bfloat16")

    found = {"plain": plain, "in blocks": blocks}
    if backend == "torch":
        return found | {"flex_attention": flex.attend}
    import jax

    if jax.default_backend() == "tpu":
        return found | {"splash": splash.attend}
    if importlib.util.find_spec("tokamax"):
        found |= {f"tokamax, {name}": functools.partial(tokamax, name) for name in ("mosaic", "triton", "xla_chunked")}
    return found


def tokamax(implementation, query, key, value, mask, cap):
    """Tokamax's attention, unused by the package: see benchmarks/log/2026-11-27-tokamax-attention.md."""
    import tokamax as library
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # else it takes this program's arguments for its own
    batch, queries, kv_heads, groups, size = query.shape
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    window = None if mask.window is None else (mask.window - 1,) * 2
    options = {"is_causal": mask.causal, "local_window_size": window, "logits_soft_cap": cap, "scale": 1.0}
    query = query.reshape(batch, queries, kv_heads * groups, size)
    found = library.dot_product_attention(query, key, value, implementation=implementation, **options)
    return found.reshape(batch, queries, kv_heads, groups, size)


def whole(mask):
    from keras_t5gemma.kernels.attention.masks import attention_mask

    return attention_mask(mask.query_segments, mask.key_segments, causal=mask.causal, window=mask.window)


def runners(backend, way, mask):
    """`(tensors -> output, tensors -> (output, gradients))`, compiled on JAX, and a function to wait."""
    if backend == "jax":
        import jax

        def call(query, key, value):
            return way(query, key, value, mask, CAP)

        def with_gradients(query, key, value):
            output, backward = jax.vjp(call, query, key, value)
            return output, backward(output)

        return jax.jit(call), jax.jit(with_gradients), jax.block_until_ready
    import torch

    def call(*tensors):
        with torch.no_grad():
            return way(*tensors, mask, CAP)

    def with_gradients(*tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        output = way(*tensors, mask, CAP)
        return output.detach(), torch.autograd.grad(output, tensors, output.detach())

    return call, with_gradients, lambda _: torch.cuda.synchronize() if torch.cuda.is_available() else None


def measure(run, wait, tensors, repeats):
    """`(milliseconds, result)`."""
    found = run(*tensors)
    wait(found)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(run(*tensors))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times), found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="jax", choices=["jax", "torch"])
    parser.add_argument("--lengths", nargs="*", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--repeats", type=int, default=10)
    record.add_options(parser)
    arguments = parser.parse_args()
    os.environ["KERAS_BACKEND"] = arguments.backend
    import numpy as np
    from keras import ops

    from keras_t5gemma.kernels.attention.masks import BLOCK_BYTES, BlockMask
    from keras_t5gemma.kernels.attention.reference import attend

    table = Table(title=f"Attention, {arguments.backend}")
    for heading in ("tokens", "kind", "way", "forward, ms", "with gradients, ms", "error"):
        table.add_column(heading, justify="left" if heading in ("kind", "way") else "right")
    generator = np.random.default_rng(0)
    for length in arguments.lengths:
        shapes = [(1, length, KV_HEADS, HEADS // KV_HEADS, SIZE), (1, KV_HEADS, length, SIZE)]
        arrays = [generator.standard_normal(shape, "float32") for shape in (shapes[0], shapes[1], shapes[1])]
        exact = [ops.convert_to_tensor(x) for x in arrays]
        tensors = [ops.cast(x, "bfloat16") for x in exact]
        segments = ops.ones((1, length), dtype="int32")
        block = min(length, max(128, BLOCK_BYTES // (4 * HEADS * length)))
        for kind, options in KINDS.items():
            if kind == "sliding" and length <= WINDOW:
                continue
            mask = BlockMask(block, segments, segments, **options)
            expected = None
            if length <= WINDOW:  # the plain one, of what bfloat16 makes of the numbers
                rounded = [ops.cast(x, "float32") for x in tensors]
                expected = ops.convert_to_numpy(attend(*rounded, whole(mask), cap=CAP, dtype="float32"))
            for name, way in ways(arguments.backend).items():
                call, with_gradients, wait = runners(arguments.backend, way, mask)
                row = [f"{length:,}", kind, name]
                numbers = {"forward_ms": None, "with_gradients_ms": None, "error": None}
                try:
                    forward, found = measure(call, wait, tensors, arguments.repeats)
                    row.append(f"{forward:.2f}")
                    numbers["forward_ms"] = forward
                    both, _ = measure(with_gradients, wait, tensors, arguments.repeats)
                    row.append(f"{both:.2f}")
                    numbers["with_gradients_ms"] = both
                    if expected is not None:
                        found = ops.convert_to_numpy(ops.cast(found, "float32"))
                        numbers["error"] = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
                        row.append(f"{numbers['error']:.1e}")
                except Exception as error:  # out of memory, or not for this chip: a row says so
                    row.append(f"{type(error).__name__}: {str(error)[:60]}")
                table.add_row(*row)
                print(*row, flush=True)
                configuration = {"topic": "Attention's kernels", "backend": arguments.backend, "length": length}
                configuration |= {"kind": kind, "way": name, "dtype": "bfloat16", "batch": 1}
                record.record(arguments, [configuration | numbers])
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
