"""Checks that read a checkpoint's numbers: checksums, and comparisons with another checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from keras_t5gemma.checkpoints.hugging_face.reader import CheckpointFolder
from keras_t5gemma.checkpoints.parts import Renamed
from keras_t5gemma.checkpoints.sources import gemma2_source, stacks_source, t5gemma_source
from keras_t5gemma.checkpoints.tensor_source import CheckpointError, TensorSource, check_finite
from keras_t5gemma.checkpoints.tensor_table import TensorSpec, tensor_specs
from keras_t5gemma.checkpoints.transforms import equal_pieces
from keras_t5gemma.config import StackConfig
from keras_t5gemma.progress import byte_progress


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference between two arrays that should be equal.

    Attributes:
        name: the name of a tensor or of a model's output.
        largest: the largest absolute difference.
        scale: the largest absolute value.
    """

    name: str
    largest: float
    scale: float


def read_all(checkpoint: str | Path) -> tuple[int, int]:
    """Reads every tensor of a T5Gemma, and checks that it is finite and has the checksum that the file states, if any.

    Args:
        checkpoint: a name or folder that `T5GemmaBackbone.from_preset` takes, or the folder of an encoder or a
            classifier.

    Returns:
        (number of tensors, number of tensors whose checksum was compared).

    Raises:
        CheckpointError: at the first tensor that is damaged or not finite.
    """
    source = stacks_source(checkpoint).tensors
    if isinstance(source, Renamed):
        source = source.whole  # with the head of a classifier
    names = source.names()
    with byte_progress("Reading", sum(map(source.nbytes, names))) as advance:
        for name in names:
            for piece in source.chunks(name):
                check_finite(source, name, piece)
                advance(piece.nbytes)
    with_checksum = [name for name in names if isinstance(source, CheckpointFolder) and source.has_checksum(name)]
    return len(names), len(with_checksum)


def compare_checkpoints(checkpoint: str | Path, other: str | Path) -> list[Difference]:
    """The differences between two T5Gemma, tensor by tensor.

    Args:
        checkpoint: a name or folder that `T5GemmaBackbone.from_preset` takes.
        other: another one. Its dtype may be different.

    Returns:
        A `Difference` for each tensor whose values differ, the largest relative difference first.

    Raises:
        CheckpointError: if either checkpoint is damaged, or their configs differ.
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


def check_invariants(
    checkpoint: str | Path,
    encoder: str | Path,
    decoder: str | Path | None = None,
    *,
    length: int = 64,
    seed: int = 0,
) -> list[Difference]:
    """Compares an adapted T5Gemma with its Gemma 2 (arXiv 2504.06225), with one layer in memory at a time.

    With a causal mask the encoder must give Gemma 2's hidden states. Without the contribution of cross-attention the
    decoder must give Gemma 2's logits. So both are run on the same random embeddings, and the outputs of the last norm
    must agree; and each embedding table, which is the output projection too, must be Gemma 2's.

    Args:
        checkpoint: a T5Gemma that was adapted and not yet trained.
        encoder: the Gemma 2 that its encoder was adapted from, as for `adapt_gemma2`.
        decoder: the Gemma 2 that its decoder was adapted from; the encoder's if None.
        length: T, the number of embeddings in the sequence.
        seed: seed of the sequence.

    Returns:
        Four `Difference`s: of the encoder's hidden states and embeddings, and of the decoder's.

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
        embeddings = np.random.default_rng(seed).standard_normal((1, length, mine.hidden_dim), dtype="float32")
        table = [tensor for tensor in tensor_specs(adapted.config) if tensor.stack == stack]
        by_path = {tensor.path.partition("/")[2]: tensor for tensor in table}
        names = {path: (tensor, tensor.name) for path, tensor in by_path.items()}
        their_names = {path: (tensor, tensor.gemma2) for path, tensor in by_path.items() if tensor.gemma2 is not None}
        actual = _hidden_states(mine, adapted.tensors, names, embeddings)
        expected = _hidden_states(theirs, gemma2.tensors, their_names, embeddings)
        largest, scale = float(np.abs(actual - expected).max()), float(np.abs(expected).max())
        differences.append(Difference(f"{stack} hidden states", largest, scale))
        path = "token_embedding/embeddings"
        pair = (adapted.tensors, names[path][1]), (gemma2.tensors, their_names[path][1])
        differences.append(_difference(f"{stack} embeddings", *pair))
    return differences


def _difference(title: str, mine: tuple[TensorSource, str], theirs: tuple[TensorSource, str]) -> Difference:
    """The `Difference` between two tensors, each given as (source, name)."""
    largest = scale = 0.0
    for pieces in equal_pieces([mine, theirs]):
        left, right = (piece.astype("float32") for piece in pieces)
        # Equal infinities are equal; a NaN is not even equal to itself.
        apart = np.abs(np.subtract(left, right, out=np.zeros_like(left), where=left != right))
        largest, scale = max(largest, float(apart.max(initial=0))), max(scale, float(np.abs(left).max(initial=0)))
    return Difference(title, largest, scale)


def _hidden_states(
    config: StackConfig, source: TensorSource, names: Mapping[str, tuple[TensorSpec, str]], embeddings: np.ndarray
) -> np.ndarray:
    """Runs a stack as a decoder-only model, building its layers one after the other.

    Args:
        config: the stack's config.
        source: the source of the stack's tensors.
        names: (`TensorSpec`, name in the source) by the path of our variable without the stack.
        embeddings: the stack's input, float32 [1, T, D].

    Returns:
        The output of the last norm, float32 [1, T, D].
    """
    from keras import ops

    from keras_t5gemma.kernels.attention.masks import attention_mask
    from keras_t5gemma.layers.block import Block
    from keras_t5gemma.layers.initialization import weights_from
    from keras_t5gemma.layers.norm import RMSNorm
    from keras_t5gemma.layers.rope import rotary_angles

    def read(path: str, shape: tuple[int, ...], dtype: str):
        tensor, name = names[path]
        flat = np.concatenate([piece.astype(dtype) for piece in source.chunks(name)])
        stored = flat.reshape(shape[::-1] if tensor.row.transposed else shape)
        return ops.convert_to_tensor(np.ascontiguousarray(tensor.from_stored(stored)), dtype)

    segments = ops.ones(embeddings.shape[:2], dtype="int32")
    angles = rotary_angles(embeddings.shape[1], 0, config.head_dim, config.rope_wavelength)
    x = ops.convert_to_tensor(embeddings)
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
    return np.asarray(ops.convert_to_numpy(norm(x)))
