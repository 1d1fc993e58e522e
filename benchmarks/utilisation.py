"""Model FLOP utilization of a training step on an accelerator, and the largest batch that fits.

    python benchmarks/utilisation.py                                  # 2B-2B, 1,024 + 1,024 and 4,096 + 4,096 tokens
    python benchmarks/utilisation.py --backend torch
    python benchmarks/utilisation.py --pair s s --lengths 64 --tokens-kept 64 --tokens-again 64

Weights, gradients and AdamW moments are bfloat16, and the loss is chunked. Each row is measured with and without
rematerialization. The batch is the largest of those tried that fits. On JAX this is XLA's own account of the compiled
step; on PyTorch it is two steps that did not run out of memory. Seconds are the median of the steps after one warm-up
step.

FLOPs are those of the model: two per weight of a matrix and token. Each of attention's two products adds two per
visible pair of positions, head and element of the head. The backward pass makes that three times as much.
Recomputation is not counted. Utilization is relative to `--peak`, the chip's dense bfloat16 rate by its data sheet, and
to the rate of a product of two 8,192 x 8,192 matrices in the same run.
"""

import argparse
import gc
import itertools
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import record
from rich.console import Console
from rich.table import Table

# Tokens a side of the batches that are tried: few where each is compiled.
TOKENS = {
    "jax": {"kept": [4096, 2048], "again": [65536, 32768, 16384]},
    "torch": {"kept": [32768, 16384, 8192, 4096, 2048], "again": [131072, 65536, 32768, 16384]},
}


def flops(config, length, batch):
    """FLOPs of a step on a batch of `length` + `length` tokens."""
    encoder, decoder = config.encoder, config.decoder
    heads = [stack.num_query_heads * stack.head_dim for stack in (encoder, decoder)]
    shared = [stack.num_key_value_heads * stack.head_dim for stack in (encoder, decoder)]

    def block(stack, width, kv_width):
        return stack.hidden_dim * (2 * width + 2 * kv_width + 3 * stack.intermediate_dim)

    matrices = encoder.num_layers * block(encoder, heads[0], shared[0])
    cross = 2 * decoder.hidden_dim * heads[1] + 2 * encoder.hidden_dim * shared[1]
    matrices += decoder.num_layers * (block(decoder, heads[1], shared[1]) + cross)
    matrices += config.vocabulary_size * decoder.hidden_dim
    pairs = 0
    for kind in encoder.layer_kinds:
        window = encoder.sliding_window if kind == "sliding" else length
        pairs += heads[0] * sum(min(q + window, length) - max(q - window + 1, 0) for q in range(length))
    for kind in decoder.layer_kinds:
        window = decoder.sliding_window if kind == "sliding" else length
        pairs += heads[1] * (sum(min(q + 1, window) for q in range(length)) + length * length)
    return 3 * batch * (2 * matrices * length + 4 * pairs)


def matmul_rate(backend):
    """FLOP/s of a large product in bfloat16."""
    if backend == "jax":
        import jax
        import jax.numpy as jnp

        left, right = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in range(2))
        product, wait = jax.jit(jnp.matmul), jax.block_until_ready
    else:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
        product, wait = torch.matmul, wait_for_torch
    return 2 * 8192**3 / statistics.median(seconds(lambda: wait(product(left, right)), 10))


def seconds(run, repeats):
    """Seconds of each run after a first one."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times[1:]


def wait_for_torch(*_):
    """Waits until the GPU, if there is one, has finished."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_batch(vocabulary_size, length, batch):
    """`(x, y, sample_weight)` of random tokens, in numpy."""
    import numpy as np

    ids = np.random.default_rng(0).integers(3, vocabulary_size, (batch, length), dtype="int32")
    names = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask")
    return dict(zip(names, (ids, np.ones_like(ids)) * 2, strict=True)), ids, np.ones(ids.shape, "float32")


def print_tried(step, start):
    """Prints a line for a batch that was compiled or tried."""
    took = step.compile_seconds = time.perf_counter() - start
    print(f"{step.batch} x {step.length} + {step.length}: {step.bytes / 1e9:.1f} GB, {took:.0f} s", flush=True)


class JaxStep:
    """A training step of a model on a batch of random tokens, traced."""

    def __init__(self, lm, length, batch):
        import jax

        self._batch = jax.device_put(random_batch(lm.backbone.config.vocabulary_size, length, batch))
        groups = (lm.trainable_variables, lm.non_trainable_variables, lm.optimizer.variables, lm.metrics_variables)
        self._variables = groups
        state = tuple([variable.value for variable in group] for group in groups)
        self.length, self.batch = length, batch
        self._traced = jax.jit(lm.train_step, donate_argnums=0).lower(state, self._batch)

    def compile(self):
        """Compiles, which takes minutes and may be done for several at once."""
        start = time.perf_counter()
        self._run = self._traced.compile()
        memory = self._run.memory_analysis()
        self.bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        print_tried(self, start)

    def fits(self, memory):
        """Whether it needs no more bytes than these."""
        return self.bytes <= memory

    def seconds(self, repeats):
        """The median of a step's seconds; the model's variables are none the wiser until it is done."""
        import jax

        state = [tuple([variable.value for variable in group] for group in self._variables)]

        def run():
            logs, state[0] = self._run(state[0], self._batch)
            jax.block_until_ready((logs, state[0]))

        times = seconds(run, repeats)
        for group, values in zip(self._variables, state[0], strict=True):
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)
        return statistics.median(times)


class TorchStep:
    """A training step on PyTorch, eager."""

    def __init__(self, lm, length, batch):
        self._lm, self.length, self.batch = lm, length, batch
        self._remat = lm.backbone.rematerialize

    def compile(self):
        """Nothing: `fits` makes a step."""

    def fits(self, memory):
        """Makes two steps, if there is room."""
        import keras
        import torch

        self._lm.backbone.rematerialize = self._remat
        batch = random_batch(self._lm.backbone.config.vocabulary_size, self.length, self.batch)
        self._batch = keras.tree.map_structure(keras.ops.convert_to_tensor, batch)
        start = time.perf_counter()
        if torch.cuda.is_available():
            share = memory / torch.cuda.get_device_properties().total_memory
            torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
            torch.cuda.reset_peak_memory_stats()
        fitting = self._runs()
        if not fitting:
            self._batch = None
            self._lm.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
        self.bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        print_tried(self, start)
        return fitting

    def _runs(self):
        """Whether a step does, and another after it; what one that does not had made goes with its traceback."""
        import torch

        try:
            self._run()
            self._run()
        except torch.cuda.OutOfMemoryError:
            return False
        return True

    def _run(self):
        self._lm.train_step(self._batch)
        wait_for_torch()

    def seconds(self, repeats):
        """The median of a step's seconds."""
        self._lm.backbone.rematerialize = self._remat
        return statistics.median(seconds(self._run, repeats))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, default=["2b", "2b"])
    parser.add_argument("--lengths", nargs="*", type=int, default=[1024, 4096])
    parser.add_argument(
        "--tokens-kept", nargs="*", type=int, help="Tokens per side of the batches to try, activations kept."
    )
    parser.add_argument("--tokens-again", nargs="*", type=int, help="The same for recomputed activations.")
    parser.add_argument("--activations", nargs="*", default=["kept", "again"], choices=["kept", "again"])
    parser.add_argument("--memory", type=float, default=0.92 * 79.6e9, help="Usable bytes.")
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s by the data sheet; default: H100 or H200.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backend", default="jax", choices=["jax", "torch"])
    record.add_options(parser)
    arguments = parser.parse_args()
    os.environ["KERAS_BACKEND"] = arguments.backend
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    # PyTorch's allocator would keep what one size of a batch has left in pieces from the next.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import keras_t5gemma as kt
    from keras_t5gemma.training.optimizers.adamw import AdamW

    reached = matmul_rate(arguments.backend)
    lm = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone(*arguments.pair, dtype="bfloat16"))
    lm.compile(AdamW(1e-5))
    lm.optimizer.build(lm.trainable_variables)
    title = f"{'-'.join(arguments.pair)}, bfloat16, {arguments.backend}, {device_kind(arguments.backend)}"
    table = Table(title=title, caption=f"A product of matrices reaches {reached / 1e12:.0f} TFLOP/s")
    for heading in ("tokens", "activations", "batch", "GB", "s a step", "tokens/s", "TFLOP/s", "MFU", "of a product"):
        table.add_column(heading, justify="left" if heading == "activations" else "right")
    candidates = {}
    for length, kept in itertools.product(arguments.lengths, arguments.activations):
        lm.backbone.rematerialize = kept == "again"
        wanted = arguments.tokens_kept if kept == "kept" else arguments.tokens_again
        sizes = {max(1, count // length) for count in wanted or TOKENS[arguments.backend][kept]}
        step = {"jax": JaxStep, "torch": TorchStep}[arguments.backend]
        candidates[length, kept] = [step(lm, length, batch) for batch in sorted(sizes, reverse=True)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda step: step.compile(), itertools.chain(*candidates.values())))
    for (length, kept), steps in candidates.items():
        step = next((step for step in steps if step.fits(arguments.memory)), None)
        if step is None:
            table.add_row(f"{length} + {length}", kept, "none fits")
            continue
        took = step.seconds(arguments.repeats)
        rate = flops(lm.backbone.config, length, step.batch) / took
        row = (f"{length} + {length}", kept, str(step.batch), f"{step.bytes / 1e9:.1f}", f"{took:.3f}")
        row += (f"{2 * step.batch * length / took:,.0f}", f"{rate / 1e12:.0f}")
        table.add_row(*row, f"{rate / arguments.peak:.2f}", f"{rate / reached:.2f}")
        print(*row, f"{rate / arguments.peak:.3f}", flush=True)
        numbers = {
            "topic": "Model FLOP utilisation",
            "backend": arguments.backend,
            "pair": "_".join(arguments.pair),
            "dtype": "bfloat16",
            "length": length,
            "activations": kept,
            "batch": step.batch,
            "memory_gb": step.bytes / 1e9,
            "seconds": took,
            "tokens_per_s": 2 * step.batch * length / took,
            "tflop_per_s": rate / 1e12,
            "share_of_peak": rate / arguments.peak,
            "share_of_product": rate / reached,
            "compile_s": getattr(step, "compile_seconds", None),
        }
        record.record(arguments, [numbers])
    Console(width=140).print(table)


def device_kind(backend):
    """The chip's name."""
    if backend == "jax":
        import jax

        return jax.devices()[0].device_kind
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
