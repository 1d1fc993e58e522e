"""What fits an accelerator: memory of a training step by XLA's own account, compiled for one without having it.

    pip install "jax[cuda12]"                                                          # or jax[tpu]
    python benchmarks/fits.py --length 1024 --batches 2 4                              # 2B-2B on an H100 of 80 GB
    python benchmarks/fits.py --length 1024 --batches 32 64 --rematerialize
    python benchmarks/fits.py --topology v5p:2x2x1 --length 1024 --batches 4
    python benchmarks/fits.py --topology v5p:2x2x2 --mesh 8 --pair 9b 2b --dtype mixed_bfloat16 --length 8192 \\
        --batches 16 --rematerialize

On JAX, with AdamW and the chunked loss. No weight is made. The bytes are those of `utilisation.py`, which has the step
compiled on the device itself; seconds are those of compiling on this machine. Autotuning, which needs a device, is left
out. With a mesh, bytes are a device's.
"""

import argparse
import contextlib
import dataclasses
import os
import time
from unittest import mock

from rich.console import Console
from rich.table import Table

# What XLA asks a GPU about itself: CUDA's device properties of an "NVIDIA H100 80GB HBM3".
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def topology(name):
    """The accelerators of that name, none of which need exist."""
    from jax.experimental import topologies

    if name == "h100":
        return topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def without_values(make):
    """What `make` gives, variables without values in it."""
    import jax

    made = []
    jax.eval_shape(lambda: made.append(make()))
    return made[0]


def compiled(lm, length, batch, place):
    """A training step on a batch of `length` + `length` tokens."""
    import jax

    groups = (lm.trainable_variables, lm.non_trainable_variables, lm.optimizer.variables, lm.metrics_variables)
    state = tuple([jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place(v)) for v in group] for group in groups)
    names = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask")
    ids, weight = (jax.ShapeDtypeStruct((batch, length), dtype, sharding=place()) for dtype in ("int32", "float32"))
    return jax.jit(lm.train_step, donate_argnums=0).lower(state, (dict.fromkeys(names, ids), ids, weight)).compile()


def placed(devices, mesh):
    """`(scope, place)`: the distribution over a mesh, if any, and where a variable lies, or without one a batch."""
    import jax
    import keras

    import keras_t5gemma as kt

    if not mesh:
        here = jax.sharding.SingleDeviceSharding(devices[0])
        return contextlib.nullcontext(), lambda *_: here
    mesh = keras.distribution.DeviceMesh(mesh, ("batch", "model")[: len(mesh)], devices)
    parallel = keras.distribution.ModelParallel(layout_map=kt.layout_map(mesh), batch_dim_name="batch")

    def place(variable=None):
        if variable is None:
            return parallel.get_data_layout((1, 1)).backend_layout
        return parallel.get_variable_layout(variable).backend_layout

    return parallel.scope(), place


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="h100", help='"h100", or a TPU\'s such as "v5p:2x2x1".')
    parser.add_argument("--mesh", nargs="*", type=int, default=[], help="Devices along the batch, and the model.")
    parser.add_argument("--pair", nargs=2, default=["2b", "2b"])
    parser.add_argument("--layers", type=int, help="So many a stack, in place of the size's.")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batches", nargs="*", type=int, default=[4])
    parser.add_argument("--rematerialize", action="store_true")
    arguments = parser.parse_args()
    os.environ |= {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

    import jax

    devices = topology(arguments.topology).devices
    # Some of what is traced depends on it.
    with mock.patch.object(jax, "default_backend", return_value="gpu" if arguments.topology == "h100" else "tpu"):
        run(arguments, devices)


def run(arguments, devices):
    """Compiles each batch, and prints a row for it."""
    import keras_t5gemma as kt
    from keras_t5gemma import presets
    from keras_t5gemma.training.adamw import AdamW

    stacks = [presets.stack(size) for size in arguments.pair]
    if arguments.layers:
        stacks = [dataclasses.replace(stack, num_layers=arguments.layers) for stack in stacks]

    def make():
        lm = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone(*stacks, dtype=arguments.dtype))
        lm.backbone.rematerialize = arguments.rematerialize
        lm.compile(AdamW(1e-5))
        lm.optimizer.build(lm.trainable_variables)
        return lm

    scope, place = placed(devices, arguments.mesh)
    activations = "again" if arguments.rematerialize else "kept"
    title = f"{'-'.join(arguments.pair)}, {arguments.dtype}, {devices[0].device_kind}, activations {activations}"
    table = Table("tokens", "batch", "GB", "of them at work", "compile, s", title=title)
    with scope:
        lm = without_values(make)
        for batch in arguments.batches:
            start = time.perf_counter()
            memory = compiled(lm, arguments.length, batch, place).memory_analysis()
            state, work = (x / 1e9 for x in (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
            took = time.perf_counter() - start
            row = (f"{arguments.length:,} + {arguments.length:,}", str(batch), f"{state + work:.1f}", f"{work:.1f}")
            table.add_row(*row, f"{took:.0f}")
            print(*row, f"{took:.0f}", flush=True)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
