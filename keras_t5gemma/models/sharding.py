"""Layouts for `keras.distribution`: which device holds which part of a weight or activation."""

import keras

from keras_t5gemma.checkpoints.tensor_table import TABLE, tensor_specs

# By letter in `TABLE`: the axis of a matrix that tensor parallelism cuts in pieces. The other one is D or E,
# the width of a stack, and full sharding cuts that.
_MODEL_LETTERS = ("V", "NH", "KH", "F")

# keras-hub's Gemma 2, which may teach: by the path of a layer the axes of its weight, and of what the layer gives. Its
# key and value heads, of which there are few, are cut along the width alone.
_TEACHER = {
    "token_embedding/{}": ("embeddings: V D", "B T D"),
    r"decoder_block_\d+/attention/query/{}": ("kernel: N D H", "B T N H"),
    r"decoder_block_\d+/attention/(key|value)/{}": ("kernel: K D H", "B T K H"),
    r"decoder_block_\d+/attention/attention_output/{}": ("kernel: N H D", "B T D"),
    r"decoder_block_\d+/ffw_gating(_2)?/{}": ("kernel: D F", "B T F"),
    r"decoder_block_\d+/ffw_linear/{}": ("kernel: F D", "B T D"),
}


def layout_map(device_mesh, config=None, *, data_axis="batch", model_axis="model", fully_sharded=True):
    """A `keras.distribution.LayoutMap` of T5Gemma's weights and activations.

    The mesh says how the work is divided. With eight devices:

        mesh shape and axes                             a matrix [D, F]        a device holds  a device computes
        (8,)   ("batch",)         fully_sharded=False   whole                  all             1/8 of the batch
        (8,)   ("batch",)                               [D / batch, F]         1/8             1/8 of the batch
        (1, 8) ("batch", "model")                       [D, F / model]         1/8             1/8 of each layer
        (2, 4) ("batch", "model")                       [D / batch, F / model] 1/8             1/4 of each, 1/2 batch
        (2, 4) ("batch", "model") fully_sharded=False   [D, F / model]         1/4             the same

    The first is data parallel, the second fully sharded (ZeRO-3, FSDP: arXiv 1910.02054), the third tensor parallel
    (arXiv 1909.08053): query, key, value, gate and up are cut by columns, heads and feed-forward units, output and down
    by rows, and embeddings into pieces of the vocabulary. Activations are held to their part of the batch and, between
    the two matrices of a pair, to their heads or units: left alone, XLA would rather gather the batch on every device
    than a fully sharded matrix.

    Scales of norms are whole everywhere. LoRA's matrices are cut as their kernel is, but for the rank, and an
    optimizer's state lies as its weight does. The weights of a keras-hub Gemma 2 that is made under this map, to teach
    (`Distillation`), are divided in the same way; its query heads, too, must divide by the devices along `model_axis`.

    With a `config`, what does not divide is put elsewhere. Heads stay whole: where the number of key and value heads is
    no multiple of the devices along `model_axis`, that axis cuts the rows of those matrices instead. Where that does
    not divide either, or is cut along the other axis of the mesh already, the matrix is whole along this one.

        mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
        distribution = keras.distribution.ModelParallel(layout_map=kt.layout_map(mesh), batch_dim_name="batch")
        keras.distribution.set_distribution(distribution)
        lm = kt.T5GemmaSeq2SeqLM.from_preset("t5gemma_9b_9b_ul2", dtype="bfloat16")  # straight into the shards

    In training, batches must be a multiple of the devices along `data_axis`; `generate` and the like round them up.

    Several processes call `keras.distribution.initialize` first and give `ModelParallel` `auto_shard_dataset=False`.
    Each then reads its share, `pretraining_dataset(...)[process::count]`, in batches of the whole one divided by their
    number.

    `keras.distribution` works on JAX alone: keras/src/backend/tensorflow/distribution_lib.py says not to use it, and
    PyTorch has none. On TensorFlow, a model made and compiled in the scope of a `tf.distribute.MirroredStrategy` is
    trained data parallel by `fit`; the gradient is the mean of the replicas' means. On PyTorch, `fit` knows one device;
    `DistributedDataParallel` takes the model in a training loop of one's own.

    Args:
        device_mesh: a `keras.distribution.DeviceMesh`.
        config: the model's `T5GemmaConfig`; None takes every size to divide by its axis of the mesh.
        data_axis: the axis of the mesh along which the batch is divided.
        model_axis: the one along which each example's work is; the mesh may do without.
        fully_sharded: whether weights are divided along `data_axis`, too.

    Returns:
        A `LayoutMap` from regular expressions for the paths of variables and of layers' outputs to layouts.

    Raises:
        ValueError: if the mesh is none, or has no `data_axis`.
    """
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise ValueError(f"`device_mesh` must be a `keras.distribution.DeviceMesh`. Received: {device_mesh!r}.")
    if data_axis not in device_mesh.axis_names:
        raise ValueError(
            f"`device_mesh` needs the axis {data_axis!r}, of length 1 where the batch is not to be divided. Received: "
            f"axes {tuple(device_mesh.axis_names)}."
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
                if weight == "kernel":  # takes [B, T, D] as one matrix, and gives one
                    by_columns = letters[1] in _MODEL_LETTERS and cut[1] == model_axis
                    output = (data_axis, model_axis if by_columns else None)
                if stack == "decoder" and weight == "embeddings":
                    layouts["logits/output"] = (data_axis, None, model_axis if cut[0] == model_axis else None)
            if weight != "reverse_embeddings":
                layouts[f"{layer}/output"] = output
    axes = {"B": data_axis, "D": data_axis if fully_sharded else None} | dict.fromkeys("VNF", model_axis)
    for path, (of_weight, output) in _TEACHER.items():
        weight, letters = of_weight.split(": ")
        layouts[path.format(weight)] = tuple(map(axes.get, letters.split()))
        layouts[path.format("output")] = tuple(None if letter == "D" else axes.get(letter) for letter in output.split())
    return layouts


def _units(letters, shape, stack):
    """Per axis of a matrix, how many parts it has that computing keeps whole: heads, or single rows and columns."""
    heads = {"NH": stack.num_query_heads, "KH": stack.num_key_value_heads}
    return [heads.get(letter, size) for letter, size in zip(letters, shape, strict=True)]


def _cut(letters, shape, units, devices, model_axis, sharded_axis):
    """The axis of the mesh, or None, that cuts either axis of a matrix."""
    cut = [None, None]
    wanted = next(i for i, letter in enumerate(letters) if letter in _MODEL_LETTERS)
    # What is fully sharded is gathered before anything is computed, so that heads may be cut.
    for axis, first, sizes in ((model_axis, wanted, units), (sharded_axis, 1 - wanted, shape)):
        for i in (first, 1 - first) if axis is not None else ():
            if cut[i] is None and (sizes is None or sizes[i] % devices[axis] == 0):
                cut[i] = axis
                break
    return tuple(cut)
