"""Checks that read a checkpoint's numbers: its checksums, and comparisons with another checkpoint."""

import dataclasses

import numpy as np

from keras_t5gemma.checkpoints.hugging_face.reader import CheckpointFolder
from keras_t5gemma.checkpoints.sources import gemma2_source, t5gemma_source
from keras_t5gemma.checkpoints.tensor_source import CheckpointError, check_finite
from keras_t5gemma.checkpoints.tensor_table import tensor_specs
from keras_t5gemma.checkpoints.transforms import equal_pieces
from keras_t5gemma.progress import byte_progress


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two things that should be equal are apart.

    Attributes:
        name: of a tensor, or of what a model computes.
        largest: the largest absolute difference.
        scale: the largest absolute value.
    """

    name: str
    largest: float
    scale: float


def read_all(checkpoint):
    """Reads every tensor of a T5Gemma: each is there, finite, and has its checksum where the file tells one.

    Args:
        checkpoint: what `T5GemmaBackbone.from_preset` takes.

    Returns:
        (tensors, how many of them had a checksum to compare).

    Raises:
        CheckpointError: at the first tensor that is damaged or not finite.
    """
    source = t5gemma_source(checkpoint).tensors
    names = source.names()
    with byte_progress("Reading", sum(map(source.nbytes, names))) as advance:
        for name in names:
            for piece in source.chunks(name):
                check_finite(source, name, piece)
                advance(piece.nbytes)
    with_checksum = [name for name in names if isinstance(source, CheckpointFolder) and source.has_checksum(name)]
    return len(names), len(with_checksum)


def compare_checkpoints(checkpoint, other):
    """The differences of two T5Gemma, tensor by tensor.

    Args:
        checkpoint: what `T5GemmaBackbone.from_preset` takes.
        other: likewise; its dtype may be another.

    Returns:
        A `Difference` for each tensor that is not the same bit for bit, the largest relative one first.

    Raises:
        CheckpointError: if either is damaged, or they are of different configs.
    """
    mine, theirs = t5gemma_source(checkpoint), t5gemma_source(other)
    if mine.config != theirs.config:
        fields = [
            field.name
            for field in dataclasses.fields(mine.config)
            if getattr(mine.config, field.name) != getattr(theirs.config, field.name)
        ]
        raise CheckpointError(f"{checkpoint} and {other} are of different configs: they differ in {', '.join(fields)}.")
    differences = []
    names = mine.tensors.names()
    with byte_progress("Comparing", sum(map(mine.tensors.nbytes, names))) as advance:
        for name in names:
            differences.append(_difference(name, (mine.tensors, name), (theirs.tensors, name)))
            advance(mine.tensors.nbytes(name))
    unequal = [difference for difference in differences if difference.largest]
    return sorted(unequal, key=lambda difference: -difference.largest / max(difference.scale, 1e-30))


def check_invariants(checkpoint, encoder, decoder=None, *, length=64, seed=0):
    """Whether an adapted T5Gemma still computes its Gemma 2 (arXiv 2504.06225), a layer in memory at a time.

    The encoder run under a causal mask must give Gemma 2's hidden states, the decoder without cross-attention's
    contribution Gemma 2's logits. So both run on the same random embeddings and must agree in what leaves the last
    norm, and each embedding table, which is the output projection too, must be Gemma 2's.

    Args:
        checkpoint: a T5Gemma as adapted, not yet trained.
        encoder: the Gemma 2 its encoder was adapted from, as for `adapt_gemma2`.
        decoder: that of its decoder; the encoder's if None.
        length: T, embeddings in the sequence to run.
        seed: of that sequence.

    Returns:
        A `Difference` for the hidden states and one for the embeddings of the encoder, and two of the decoder.

    Raises:
        CheckpointError: if a checkpoint is damaged, or the stacks' sizes differ.
    """
    adapted = t5gemma_source(checkpoint)
    differences = []
    for stack, origin in (("encoder", encoder), ("decoder", encoder if decoder is None else decoder)):
        gemma2 = gemma2_source(origin)
        theirs, mine = gemma2.config.stack, getattr(adapted.config, stack)
        if (mine.num_layers, mine.hidden_dim) != (theirs.num_layers, theirs.hidden_dim):
            raise CheckpointError(
                f"{checkpoint}: its {stack} has {mine.num_layers} layers of width {mine.hidden_dim}; {origin} has "
                f"{theirs.num_layers} of width {theirs.hidden_dim}."
            )
        x = np.random.default_rng(seed).standard_normal((1, length, mine.hidden_dim), dtype="float32")
        table = [tensor for tensor in tensor_specs(adapted.config) if tensor.stack == stack]
        own_names = {tensor.path.partition("/")[2]: tensor for tensor in table}
        names = {path: (tensor, tensor.name) for path, tensor in own_names.items()}
        their_names = {path: (tensor, tensor.gemma2) for path, tensor in own_names.items()}
        found = _hidden_states(mine, adapted.tensors, names, x)
        expected = _hidden_states(theirs, gemma2.tensors, their_names, x)
        largest, scale = float(np.abs(found - expected).max()), float(np.abs(expected).max())
        differences.append(Difference(f"{stack} hidden states", largest, scale))
        embeddings = own_names["token_embedding/embeddings"]
        pair = (adapted.tensors, embeddings.name), (gemma2.tensors, embeddings.gemma2)
        differences.append(_difference(f"{stack} embeddings", *pair))
    return differences


def _difference(title, mine, theirs):
    """The `Difference` of two tensors, each a (source, name)."""
    largest = scale = 0.0
    for pieces in equal_pieces([mine, theirs]):
        left, right = (piece.astype("float32") for piece in pieces)
        # Equal infinities are equal; a NaN is not even equal to itself.
        apart = np.abs(np.subtract(left, right, out=np.zeros_like(left), where=left != right))
        largest, scale = max(largest, float(apart.max(initial=0))), max(scale, float(np.abs(left).max(initial=0)))
    return Difference(title, largest, scale)


def _hidden_states(config, source, names, x):
    """What leaves the last norm of a stack run as a decoder-only model, its layers built one after the other.

    Args:
        config: its `StackConfig`.
        source: the `TensorSource` it is in.
        names: (`tensor_table.TensorSpec`, name in the source) by our variable's path without the stack.
        x: embeddings, float32 [1, T, D].
    """
    from keras import ops

    from keras_t5gemma.kernels.attention.masks import attention_mask
    from keras_t5gemma.layers.block import Block
    from keras_t5gemma.layers.initialization import weights_from
    from keras_t5gemma.layers.norm import RMSNorm
    from keras_t5gemma.layers.rope import rotary_angles

    def read(path, shape, dtype):
        tensor, name = names[path]
        flat = np.concatenate([piece.astype(dtype) for piece in source.chunks(name)])
        stored = flat.reshape(shape[::-1] if tensor.row.transposed else shape)
        return ops.convert_to_tensor(np.ascontiguousarray(tensor.from_stored(stored)), dtype)

    segments = ops.ones(x.shape[:2], dtype="int32")
    angles = rotary_angles(x.shape[1], 0, config.head_dim, config.rope_wavelength)
    x = ops.convert_to_tensor(x)
    for layer, kind in enumerate(config.layer_kinds):
        window = config.sliding_window if kind == "sliding" else None
        mask = attention_mask(segments, segments, causal=True, window=window)
        block = Block(config, name=f"layer_{layer}", dtype="float32")
        with weights_from(read):
            block.build((None, None, config.hidden_dim))
        x, _ = block(x, mask, angles, training=False)
    norm = RMSNorm(config.norm_epsilon, name="final_norm", dtype="float32")
    with weights_from(read):
        norm.build((None, None, config.hidden_dim))
    return ops.convert_to_numpy(norm(x))
