"""Layouts for `keras.distribution`: which device holds which part of a weight or activation."""

from collections.abc import Mapping, Sequence

import keras

from keras_t5gemma.checkpoints.tensor_table import TABLE, tensor_specs
from keras_t5gemma.config import StackConfig, T5GemmaConfig, T5GemmaEncoderConfig

# Letters of `TABLE`: the axis of a matrix that tensor parallelism divides. The other axis is D or E, the width of a
# stack; full sharding divides that one.
_MODEL_LETTERS = ("V", "NH", "KH", "F")

# keras-hub's Gemma 2, a possible teacher: per layer path, the axes of its weight and of its output. It has few key and
# value heads, so these weights are divided along the width only.
_TEACHER = {
    "token_embedding/{}": ("embeddings: V D", "B T D"),
    r"decoder_block_\d+/attention/query/{}": ("kernel: N D H", "B T N H"),
    r"decoder_block_\d+/attention/(key|value)/{}": ("kernel: K D H", "B T K H"),
    r"decoder_block_\d+/attention/attention_output/{}": ("kernel: N H D", "B T D"),
    r"decoder_block_\d+/ffw_gating(_2)?/{}": ("kernel: D F", "B T F"),
    r"decoder_block_\d+/ffw_linear/{}": ("kernel: F D", "B T D"),
}


def layout_map(
    device_mesh: keras.distribution.DeviceMesh,
    config: T5GemmaConfig | T5GemmaEncoderConfig | None = None,
    *,
    data_axis: str = "batch",
    model_axis: str = "model",
    fully_sharded: bool = True,
) -> keras.distribution.LayoutMap:
    """A `keras.distribution.LayoutMap` of T5Gemma's weights and activations.

    The mesh decides how the work is divided. With eight devices:

        mesh shape and axes                             a matrix [D, F]        a device holds  a device computes
        (8,)   ("batch",)         fully_sharded=False   whole                  all             1/8 of the batch
        (8,)   ("batch",)                               [D / batch, F]         1/8             1/8 of the batch
        (1, 8) ("batch", "model")                       [D, F / model]         1/8             1/8 of each layer
        (2, 4) ("batch", "model")                       [D / batch, F / model] 1/8             1/4 of each, 1/2 batch
        (2, 4) ("batch", "model") fully_sharded=False   [D, F / model]         1/4             the same

    The first row is data parallel. The second is fully sharded (ZeRO-3, FSDP: arXiv 1910.02054). The third is tensor
    parallel (arXiv 1909.08053): query, key, value, gate and up are divided by columns (heads and feed-forward units),
    output and down by rows, and embeddings by the vocabulary.

    Activations are divided along the batch. Between the two matrices of a pair they are also divided by heads or units.
    Without these constraints, XLA would gather the batch on every device rather than a fully sharded matrix.

    Scales of norms are replicated. LoRA's matrices are divided as their kernel is, except along the rank. An
    optimizer's state has the layout of its weight. A keras-hub Gemma 2 that is created under this map as a teacher
    (`Distillation`) is divided in the same way. The number of its query heads must be a multiple of the devices along
    `model_axis`.

    With a `config`, sizes that do not divide are handled. Heads stay whole: if the number of key and value heads is not
    a multiple of the devices along `model_axis`, that axis divides the rows of those matrices instead. If the rows do
    not divide either, or if the mesh's other axis already divides them, `model_axis` does not divide the matrix.

        mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
        distribution = keras.distribution.ModelParallel(layout_map=kt.layout_map(mesh), batch_dim_name="batch")
        keras.distribution.set_distribution(distribution)
        lm = kt.T5GemmaSeq2SeqLM.from_preset("t5gemma_9b_9b_ul2", dtype="bfloat16")  # straight into the shards

    In training, the batch size must be a multiple of the devices along `data_axis`. `generate`, `stream`, `score` and
    `embed` round it up.

    Each of several processes first calls `keras.distribution.initialize`, and passes `auto_shard_dataset=False` to
    `ModelParallel`. It then reads its share of the data, `pretraining_dataset(...)[process::count]`. Its batch size is
    the global one divided by the number of processes.

    `keras.distribution` works on JAX only: keras/src/backend/tensorflow/distribution_lib.py says not to use it, and
    PyTorch has no implementation. On TensorFlow, create and compile the model in the scope of a
    `tf.distribute.MirroredStrategy`: `fit` then trains data parallel, and the gradient is the mean of the replicas'
    means. On PyTorch, `fit` uses one device. `DistributedDataParallel` accepts the model in a custom training loop.

    Args:
        device_mesh: a `keras.distribution.DeviceMesh`.
        config: the model's `config`; None assumes that every size divides by its axis of the mesh.
        data_axis: the axis of the mesh along which the batch is divided.
        model_axis: the axis along which the work of each example is divided; the mesh may lack it.
        fully_sharded: whether weights are also divided along `data_axis`.

    Returns:
        A `LayoutMap` from regular expressions for the paths of variables and of layers' outputs to layouts.

    Raises:
        ValueError: if `device_mesh` is not a `DeviceMesh`, or has no axis `data_axis`.
    """
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise ValueError(f"`device_mesh` must be a `keras.distribution.DeviceMesh`. Received: {device_mesh!r}.")
    if data_axis not in device_mesh.axis_names:
        raise ValueError(
            f"`device_mesh` needs the axis {data_axis!r}. Its length is 1 if the batch is not divided. Received: axes "
            f"{tuple(device_mesh.axis_names)}."
        )
    devices = dict(zip(device_mesh.axis_names, device_mesh.shape, strict=True))
    model_axis = model_axis if model_axis in devices else None
    shapes = {} if config is None else {(tensor.row, tensor.stack): tensor.shape for tensor in tensor_specs(config)}
    layouts = keras.distribution.LayoutMap(device_mesh)
    for row in TABLE:
        for stack in row.stacks:
            layer, _, weight = row.path.format(s=stack, i=r"\d+").rpartition("/")
            output = (data_axis, None, None)
            letters = row.letters.split()
            if len(letters) == 2:
                shape = shapes.get((row, stack))
                units = shape and _units(letters, shape, getattr(config, stack))
                cut = _cut(letters, shape, units, devices, model_axis, data_axis if fully_sharded else None)
                layouts[f"{layer}/{weight}"] = cut
                layouts[f"{layer}/lora_{weight}_a"] = (cut[0], None)
                layouts[f"{layer}/lora_{weight}_b"] = (None, cut[1])
                if weight == "kernel":  # input and output are matrices [B * T, ...]
                    by_columns = letters[1] in _MODEL_LETTERS and cut[1] == model_axis
                    output = (data_axis, model_axis if by_columns else None)
                if stack == "decoder" and weight == "embeddings":
                    layouts["logits/output"] = (data_axis, None, model_axis if cut[0] == model_axis else None)
            if weight != "reverse_embeddings":
                layouts[f"{layer}/output"] = output
    axes = {"B": data_axis, "D": data_axis if fully_sharded else None} | dict.fromkeys("VNF", model_axis)
    for path, (weight_axes, output) in _TEACHER.items():
        weight, letters = weight_axes.split(": ")
        layouts[path.format(weight)] = tuple(map(axes.get, letters.split()))
        layouts[path.format("output")] = tuple(None if letter == "D" else axes.get(letter) for letter in output.split())
    return layouts


def _units(letters: Sequence[str], shape: Sequence[int], stack: StackConfig) -> list[int]:
    """The number of indivisible units along each axis of a matrix: heads, or single rows or columns."""
    heads = {"NH": stack.num_query_heads, "KH": stack.num_key_value_heads}
    return [heads.get(letter, size) for letter, size in zip(letters, shape, strict=True)]


def _cut(
    letters: Sequence[str],
    shape: Sequence[int] | None,
    units: Sequence[int] | None,
    devices: Mapping[str, int],
    model_axis: str | None,
    sharded_axis: str | None,
) -> tuple[str | None, str | None]:
    """Chooses the mesh axis that divides each axis of a matrix.

    Args:
        letters: the two axes of the matrix, in letters of `TABLE`.
        shape: sizes of the axes; None if every size divides.
        units: indivisible units along the axes; None if every number divides.
        devices: devices along each axis of the mesh.
        model_axis: the mesh axis of tensor parallelism, or None.
        sharded_axis: the mesh axis of full sharding, or None.

    Returns:
        Per axis of the matrix, an axis of the mesh or None.
    """
    cut = [None, None]
    model_index = next(i for i, letter in enumerate(letters) if letter in _MODEL_LETTERS)
    # Fully sharded matrices are gathered before they are used, so full sharding may divide heads.
    for axis, first, sizes in ((model_axis, model_index, units), (sharded_axis, 1 - model_index, shape)):
        for i in (first, 1 - first) if axis is not None else ():
            if cut[i] is None and (sizes is None or sizes[i] % devices[axis] == 0):
                cut[i] = axis
                break
    return tuple(cut)
