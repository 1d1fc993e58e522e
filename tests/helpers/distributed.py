"""One training step and one `generate`, on one device or on several: the jobs of `test_distribution`.

`python distributed.py job file arguments` runs a job in a process of its own, where it can have several devices or be
one of several processes, and writes what it found into an npz file.
"""

import functools
import sys

import keras
import numpy as np
from keras import ops

import keras_t5gemma as kt
from helpers.launch import PROCESSES
from helpers.one_step import compiled_step
from helpers.peers import tiny_config
from helpers.tiny import backbone_of
from keras_t5gemma.demo.pretraining import build_gemma2
from keras_t5gemma.kernels.attention import masks, splash
from keras_t5gemma.kernels.attention.reference import attend
from keras_t5gemma.kernels.cross_entropy.chunks import CHUNK_BYTES
from keras_t5gemma.layers.initialization import weights_from

# 8 and 4 heads, 4 and 2 key and value heads.
CONFIG = tiny_config(balanced=False, num_layers=1)
# Mesh, its axes, and whether weights are cut along the first.
LAYOUTS = {
    "data parallel": ((8,), ("batch",), False),
    "fully sharded": ((8,), ("batch",), True),
    "tensor parallel": ((1, 8), ("batch", "model"), True),
    "both": ((2, 4), ("batch", "model"), True),
}


def batches():
    """A dataset whose first two batches, one per process, make the batch of the step on one device."""
    ids = np.random.default_rng(0).integers(3, CONFIG.vocabulary_size, 4_000, dtype="int32")
    data = kt.pretraining_dataset(ids, None, kt.PrefixLM(14, 10), batch_size=4, num_epochs=1)
    # `MirroredStrategy` averages the means of its replicas, whatever number of tokens each is of.
    return data if keras.config.backend() == "tensorflow" else data.map_with_index(shortened)


def shortened(index, batch):
    """Every other batch has fewer target tokens: what processes have is not of equal weight."""
    x, y, weight = batch
    keep = (np.arange(y.shape[1]) < y.shape[1] - 3 * (index % 2)).astype("int32")
    return {**x, "decoder_padding_mask": x["decoder_padding_mask"] * keep}, y, weight * keep.astype("float32")


def whole_batch(view=lambda data: data):
    """`(x, y, sample_weight)` of both processes, of a view of the dataset."""
    data = view(batches())
    return keras.tree.map_structure(lambda *parts: np.concatenate(parts), *(data[i] for i in range(PROCESSES)))


def prompt():
    """Fewer rows than devices."""
    return {name: x[:3] for name, x in whole_batch()[0].items() if name.startswith("encoder")}


def loud(path, shape, dtype):
    """The first value of a weight, the same on every device, process and backend."""
    generator = np.random.default_rng(list(path.encode()))
    if len(shape) == 1:
        return ops.convert_to_tensor(generator.uniform(-0.5, 1.0, shape), dtype)
    scale = 0.15 if "embedding" in path else 1.7 * shape[0] ** -0.5
    return ops.convert_to_tensor(scale * generator.standard_normal(shape), dtype)


def compiled(**kwargs):
    with weights_from(loud):
        lm = kt.T5GemmaSeq2SeqLM(backbone_of(CONFIG))
    lm.compile(keras.optimizers.SGD(0.05, momentum=0.9), **kwargs)
    return lm


def weights(model):
    return {variable.path: np.array(ops.convert_to_numpy(variable.value)) for variable in model.weights}


def step(generate=True):
    """What a step finds: its loss, the weights after it, and, before it, ids generated."""
    lm = compiled()
    found = {}
    if generate:
        found["generated"] = lm.generate(prompt(), max_length=6, stop_token_ids=None)["decoder_token_ids"]
    found["loss"] = lm.train_on_batch(*whole_batch(), return_dict=True)["loss"]
    return lm, found | weights(lm.backbone)


def distilled():
    """What a step with a teacher finds: its loss and the weights after it."""
    teacher = build_gemma2(CONFIG.encoder, CONFIG.vocabulary_size)
    for variable in teacher.variables:
        variable.assign(loud(variable.path, variable.shape, variable.dtype))
    lm = compiled(loss=kt.Distillation(teacher))
    logs = lm.train_on_batch(*whole_batch(kt.distillation_dataset), return_dict=True)
    return teacher, {"loss": logs["loss"]} | weights(lm.backbone)


def classified():
    """What a step of a classifier finds: its loss and the weights after it."""
    with weights_from(loud):
        classifier = kt.T5GemmaTextClassifier(backbone_of(CONFIG), 3)
    for variable in classifier.head.weights:
        variable.assign(loud(variable.path, variable.shape, variable.dtype))
    classifier.compile(keras.optimizers.SGD(0.05))
    inputs, _, _ = whole_batch()
    texts = {name: inputs[f"encoder_{name}"] for name in ("token_ids", "padding_mask")}
    logs = classifier.train_on_batch(texts, np.arange(len(texts["token_ids"])) % 3, return_dict=True)
    return {"loss": logs["loss"]} | weights(classifier)


def sharded(name):
    """Steps on eight devices of JAX, with and without a teacher, and what of each weight lies on the first."""
    CHUNK_BYTES[keras.config.backend()] = 4 * CONFIG.vocabulary_size  # a target position a chunk
    distribution = model_parallel(name)
    with distribution.scope():
        lm, found = step()
        found["forward"] = forward_program(lm, distribution)
        found["training"] = compiled_step(lm, spread(distribution, whole_batch())).as_text()
        teacher, taught = distilled()
        for variable in [*lm.backbone.weights, *lm.optimizer.variables, *teacher.variables]:
            found[f"shape of {variable.path}"] = variable.value.addressable_shards[0].data.shape
        labelled = classified() if name == "both" else {}
    found |= {f"classified {name}": value for name, value in labelled.items()}
    return found | {f"distilled {name}": value for name, value in taught.items()}


def model_parallel(name, **kwargs):
    shape, axes, fully_sharded = LAYOUTS[name]
    mesh = keras.distribution.DeviceMesh(shape, axes)
    layouts = kt.layout_map(mesh, CONFIG, fully_sharded=fully_sharded)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch", **kwargs)


def forward_program(lm, distribution):
    """The text of the compiled forward pass."""
    import jax

    call = functools.partial(lm.stateless_call, training=False)
    state = [[variable.value for variable in group] for group in (lm.trainable_variables, lm.non_trainable_variables)]
    return jax.jit(call).lower(*state, spread(distribution, whole_batch()[0])).compile().as_text()


def spread(distribution, arrays):
    """Arrays of a batch, each device with its rows."""
    return keras.tree.map_structure(
        lambda x: keras.distribution.distribute_tensor(x, distribution.get_data_layout(x.shape)), arrays
    )


def kernel(name):
    """What splash attention, interpreted, gives on eight devices, what lies on the first of it, and the plain one's."""
    import jax

    generator = np.random.default_rng(0)
    shapes = [(8, 12, 4, 2, 6), (8, 4, 9, 6), (8, 4, 9, 6)]
    arrays = [generator.standard_normal(shape, "float32") for shape in shapes]
    segments = [np.sort(generator.integers(0, 3, (8, length)), axis=1) for length in (12, 9)]
    options = {"causal": True, "window": 4}

    def by_kernel(query, key, value, *segments):
        mask = masks.BlockMask(12, *segments, **options)
        return splash.attend(query, key, value, mask, 2.0, interpret=True)

    distribution = model_parallel(name)
    with distribution.scope():
        put = [ops.convert_to_tensor(x) for x in (*arrays, *segments)]
        put = [keras.distribution.distribute_tensor(x, distribution.get_data_layout(x.shape)) for x in put]
        found = jax.jit(by_kernel)(*put)
    visible = masks.attention_mask(*map(ops.convert_to_tensor, segments), **options)
    plain = attend(*map(ops.convert_to_tensor, arrays), visible, cap=2.0, dtype="float32")
    return {"kernel": found, "plain": plain, "shape": found.addressable_shards[0].data.shape}


def loaded(name, t5gemma, gemma2):
    """What of each weight lies on which device, after loading and adapting checkpoints there."""
    found = {}
    with model_parallel(name).scope():
        for title, backbone in (
            ("loaded", kt.T5GemmaBackbone.from_preset(t5gemma)),
            ("adapted", kt.adapt_gemma2(gemma2, seed=0)),
        ):
            for variable in backbone.weights:
                found[f"{title} {variable.path}"] = np.array(variable.value)
                for shard in variable.value.addressable_shards:
                    found[f"{title} {variable.path} on {shard.device.id}"] = np.array(shard.data)
    return found


def process(index, address, folder):
    """A step of `fit` as one of several processes of JAX, which reads its share of the data."""
    keras.distribution.initialize(address, PROCESSES, int(index))
    mesh = keras.distribution.DeviceMesh((PROCESSES,), ("batch",))
    layouts = kt.T5GemmaBackbone.get_layout_map(mesh)
    distribution = keras.distribution.ModelParallel(layout_map=layouts, auto_shard_dataset=False)
    with distribution.scope():
        lm = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone.from_preset(folder))
        lm.compile(keras.optimizers.SGD(0.05))
        history = lm.fit(batches()[int(index) :: PROCESSES], steps_per_epoch=1, verbose=0)
        shapes = {v.path: v.value.addressable_shards[0].data.shape for v in lm.backbone.weights}
    return {"loss": history.history["loss"][0]} | {f"shape of {path}": shape for path, shape in shapes.items()}


def mirrored():
    """A step on two devices of TensorFlow."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        lm = compiled()
    data = tf.data.Dataset.from_tensor_slices(whole_batch()).batch(8)
    history = lm.fit(data, verbose=0)
    return {"loss": history.history["loss"][0]} | weights(lm.backbone)


def replica(index, meeting):
    """A step on PyTorch as one of several processes, which reads its share of the data."""
    import torch

    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=int(index), world_size=PROCESSES)
    lm = compiled()
    parallel = torch.nn.parallel.DistributedDataParallel(lm)
    x, y, weight = batches()[int(index)]
    logits = parallel({name: ops.convert_to_tensor(value) for name, value in x.items()}, training=True)
    loss = lm.compute_loss(x, ops.convert_to_tensor(y), logits, ops.convert_to_tensor(weight))
    # The mean over all target tokens, of gradients that are averaged over processes.
    total = ops.convert_to_tensor(weight.sum())
    torch.distributed.all_reduce(total)
    share = loss * float(weight.sum()) / total
    (share * PROCESSES).backward()
    variables = lm.trainable_variables
    with torch.no_grad():
        lm.optimizer.apply([variable.value.grad for variable in variables], variables)
    share = share.detach()
    torch.distributed.all_reduce(share)
    found = {"loss": share.item()} | weights(lm.backbone)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    job, file, *arguments = sys.argv[1:]
    np.savez(file, **{name: np.asarray(value) for name, value in globals()[job](*arguments).items()})
