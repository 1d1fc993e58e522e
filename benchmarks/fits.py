"""Which training steps fit an accelerator: memory by XLA's own account, compiled without having the accelerator.

    pip install "jax[cuda12]"                                                          # or jax[tpu]
    python benchmarks/fits.py --length 1024 --batches 2 4                              # 2B-2B on an H100 of 80 GB
    python benchmarks/fits.py --length 1024 --batches 32 64 --rematerialize
    python benchmarks/fits.py --topology v5p:2x2x1 --length 1024 --batches 4
    python benchmarks/fits.py --recipe 2b_2b_prefixlm                                  # as it stands, teacher included
    python benchmarks/fits.py --recipe 9b_2b_ul2 --topology v5p:2x2x2

Runs on JAX, with AdamW and the chunked loss. No weights are allocated. The bytes are counted as in `utilisation.py`,
which compiles the step on the device itself. Seconds are compilation times on this machine. Autotuning is disabled,
because it needs a device. With a mesh, bytes are per device.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import time
from unittest import mock

import record
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


def topology(name, count):
    """The devices of a topology, which need not exist; GPUs are those of one host."""
    from jax.experimental import topologies

    if name == "h100":
        return topologies.get_topology_desc(platform="cuda", target_config=H100, topology=f"1x1x{count}")
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def without_values(make):
    """The model that `make` gives, its variables and its optimizer's without values."""
    import jax

    made = []

    def build():
        made.append(make())
        made[0].optimizer.build(made[0].trainable_variables)

    jax.eval_shape(build)
    return made[0]


def compiled(lm, length, batch, place):
    """A training step on a batch of `length` + `length` tokens."""
    import jax

    from keras_t5gemma.data.pipelines import teacher_view
    from keras_t5gemma.training.losses.distillation import Distillation
    from keras_t5gemma.training.steps.model import TaughtBatch

    def array(many, dtype="int32"):
        return jax.ShapeDtypeStruct((batch, many), dtype, sharding=place())

    names = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask")
    y = array(length)
    if isinstance(lm.loss, Distillation):
        y = dict.fromkeys((teacher_view.LABELS, teacher_view.POSITIONS), array(length))
        y |= dict.fromkeys((teacher_view.TOKEN_IDS, teacher_view.PADDING_MASK), array(2 * length))
    data = dict.fromkeys(names, array(length)), y, array(length, "float32")

    def placed_like(variables):
        return [jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place(v)) for v in variables]

    groups = (lm.trainable_variables, lm.non_trainable_variables, lm.optimizer.variables, lm.metrics_variables)
    state = tuple(map(placed_like, groups))
    if lm.teacher_variables:
        data = TaughtBatch(data, placed_like(lm.teacher_variables))
    return jax.jit(lm.train_step, donate_argnums=0).lower(state, data).compile()


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


def of_arguments(arguments):
    """A compiled model of the requested pair."""
    import keras_t5gemma as kt
    from keras_t5gemma import presets
    from keras_t5gemma.training.optimizers.adamw import AdamW

    stacks = [with_layers(presets.stack(size), arguments.layers) for size in arguments.pair]
    lm = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone(*stacks, dtype=arguments.dtype))
    lm.backbone.rematerialize = arguments.rematerialize
    lm.compile(AdamW(1e-5))
    return lm


def of_recipe(recipe, layers):
    """The model of a recipe, compiled, with its teacher; only the sizes of Gemma 2 are read."""
    import keras_hub

    import keras_t5gemma as kt
    from keras_t5gemma import presets
    from keras_t5gemma.demo.pretraining import build_gemma2
    from keras_t5gemma.recipes import components as building

    def stack(preset):
        return with_layers(presets.stack(preset.split("_")[1]), layers)  # "gemma2_9b_en"

    def adapt_gemma2(*names, dtype, **_):
        return kt.T5GemmaBackbone(stack(names[0]), stack(names[-1]), dtype=dtype)

    def teacher(name, dtype):
        return keras_hub.models.GemmaCausalLM(build_gemma2(stack(name), kt.T5GemmaConfig.vocabulary_size, dtype=dtype))

    with (
        mock.patch.object(building, "adapt_gemma2", adapt_gemma2),
        mock.patch.object(building, "T5GemmaTokenizer"),
        mock.patch.object(building, "T5GemmaSeq2SeqLMPreprocessor", return_value=None),
        mock.patch.object(keras_hub.models.GemmaCausalLM, "from_preset", teacher),
    ):
        return building.compiled_model(recipe)


def with_layers(stack, layers):
    """A stack with this many layers, or with its own number if None."""
    return dataclasses.replace(stack, num_layers=layers) if layers else stack


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="h100", help='"h100", or a TPU topology such as "v5p:2x2x1".')
    parser.add_argument("--layers", type=int, help="Layers per stack, instead of the size's.")
    parser.add_argument("--recipe", help="File or name of a recipe, instead of all following options.")
    parser.add_argument("--mesh", nargs="*", type=int, default=[], help="Devices along the batch, and along the model.")
    parser.add_argument("--pair", nargs=2, default=["2b", "2b"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batches", nargs="*", type=int, default=[4])
    parser.add_argument("--rematerialize", action="store_true")
    record.add_options(parser)
    arguments = parser.parse_args()
    os.environ |= {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

    import jax

    make = functools.partial(of_arguments, arguments)
    title = (
        f"{'-'.join(arguments.pair)}, {arguments.dtype}, activations {'again' if arguments.rematerialize else 'kept'}"
    )
    if arguments.recipe:
        from keras_t5gemma.recipes.reading import read_recipe

        recipe = read_recipe(arguments.recipe)
        arguments.mesh, title = recipe.hardware.mesh, arguments.recipe
        arguments.length, arguments.batches = recipe.objective.encoder_length, [recipe.training.batch_size]
        make = functools.partial(of_recipe, recipe, arguments.layers)
    devices = topology(arguments.topology, math.prod(arguments.mesh)).devices
    table = Table("tokens", "batch", "GB", "of them at work", "compile, s")
    table.title = f"{title}; {math.prod(arguments.mesh)} x {devices[0].device_kind}"
    # Some of what is traced depends on it.
    with mock.patch.object(jax, "default_backend", return_value="gpu" if arguments.topology == "h100" else "tpu"):
        scope, place = placed(devices, arguments.mesh)
        with scope:
            lm = without_values(make)
            for batch in arguments.batches:
                state, work, seconds = measured(lm, arguments.length, batch, place)
                tokens = f"{arguments.length:,} + {arguments.length:,}"
                row = (tokens, str(batch), f"{state + work:.1f}", f"{work:.1f}", f"{seconds:.0f}")
                table.add_row(*row)
                numbers = {"memory_gb": state + work, "work_gb": work, "compile_s": seconds}
                record.record(arguments, [{**recorded(arguments, batch, devices), **numbers}])
                print(*row, flush=True)
    Console(width=120).print(table)


def measured(lm, length, batch, place):
    """Compiles a batch's step: `(GB of weights and moments, GB at work, seconds)`."""
    start = time.perf_counter()
    memory = compiled(lm, length, batch, place).memory_analysis()
    state, work = (x / 1e9 for x in (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
    return state, work, time.perf_counter() - start


def recorded(arguments, batch, devices):
    """A row for results/, without its numbers."""
    common = {"backend": "jax", "length": arguments.length, "layers": arguments.layers}
    if arguments.recipe:
        count = math.prod(arguments.mesh)
        recipe = {"recipe": arguments.recipe, "devices": f"{count} x {devices[0].device_kind}"}
        return {"topic": "Published recipes, by XLA's account", **common, **recipe}
    return {
        "topic": "Batches that fit, by XLA's account",
        **common,
        "device": devices[0].device_kind,
        "pair": "_".join(arguments.pair),
        "dtype": arguments.dtype,
        "activations": "again" if arguments.rematerialize else "kept",
        "batch": batch,
    }


if __name__ == "__main__":
    main()
