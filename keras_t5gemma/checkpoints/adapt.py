"""Gemma 2's tensors as T5Gemma's: the adaptation of arXiv 2504.06225, one tensor at a time.

The encoder takes every weight of its Gemma 2. A decoder block takes self-attention, feed-forward and their norms from
the same layer of its Gemma 2. Gemma 2 has no cross-attention: how that is initialized is the only choice.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from keras_t5gemma.checkpoints.tensor_source import CheckpointError, TensorSource
from keras_t5gemma.checkpoints.tensor_table import TABLE, TensorSpec, tensor_specs
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.suggestions import check_choice

if TYPE_CHECKING:
    from keras_t5gemma.checkpoints.hugging_face.config import Gemma2Config
    from keras_t5gemma.checkpoints.sources import Source

CROSS_ATTENTIONS = ("auto", "self-attention", "random")
ENCODER_HEADS = ("grouped", "multi")
_GEMMA2_NAMES = {row.path: row.gemma2 for row in TABLE if row.gemma2 is not None}


def adapted_config(
    encoder: Gemma2Config,
    decoder: Gemma2Config,
    encoder_attention: str = "bidirectional",
    encoder_heads: str = "grouped",
) -> T5GemmaConfig:
    """The config of the T5Gemma that is adapted from two Gemma 2.

    Args:
        encoder: the config of the encoder's Gemma 2.
        decoder: the config of the decoder's Gemma 2, which also gives the soft cap on the output logits.
        encoder_attention: "bidirectional", or "causal", an ablation in the paper.
        encoder_heads: "grouped" as in Gemma 2, or "multi": as many key and value heads as query heads, an ablation in
            the paper.

    Returns:
        A `T5GemmaConfig`.

    Raises:
        ValueError: if `encoder_attention` or `encoder_heads` is invalid.
        CheckpointError: if the vocabularies differ.
    """
    check_choice(encoder_heads, "encoder_heads", ENCODER_HEADS)
    if encoder.vocabulary_size != decoder.vocabulary_size:
        raise CheckpointError(
            f"The encoder's Gemma 2 has a vocabulary of {encoder.vocabulary_size}, the decoder's one of "
            f"{decoder.vocabulary_size}. Both read the same ids: adapt models that share a tokenizer."
        )
    stack = encoder.stack
    if encoder_heads == "multi":
        stack = dataclasses.replace(stack, num_key_value_heads=stack.num_query_heads)
    return T5GemmaConfig(
        encoder=stack,
        decoder=decoder.stack,
        vocabulary_size=decoder.vocabulary_size,
        final_logit_soft_cap=decoder.final_logit_soft_cap,
        encoder_attention=encoder_attention,
    )


class AdaptedTensors(TensorSource):
    """The T5Gemma that is adapted from two Gemma 2, as a `TensorSource`. Tensors are computed when read, not stored.

    Args:
        encoder: the `Source` of the encoder's Gemma 2 (`gemma2_source`).
        decoder: the `Source` of the decoder's Gemma 2; it may be the same object.
        encoder_attention: as for `adapted_config`; the weights do not depend on it.
        encoder_heads: as for `adapted_config`. With "multi" each key and value head is copied to every query head that
            shares it, so the model computes the same function.
        cross_attention: how cross-attention and its two norms are initialized. "self-attention": from the decoder's
            self-attention and its norms, layer by layer. "random": kernels are drawn with the decoder's
            `initializer_range`, norms are zero. "auto", the paper's rule: "self-attention" if both stacks have the same
            configuration, else "random" (then train cross-attention alone for the first 1,000 steps).
        seed: seed of the random draws. A tensor's draw depends on the seed and on the tensor's name only.

    Raises:
        ValueError: if `cross_attention`, `encoder_attention` or `encoder_heads` is invalid.
        CheckpointError: if the vocabularies differ, or "self-attention" does not fit because the encoder's width is not
            the decoder's, which the keys and values of self-attention read.
    """

    def __init__(
        self,
        encoder: Source[Gemma2Config],
        decoder: Source[Gemma2Config],
        *,
        encoder_attention: str = "bidirectional",
        encoder_heads: str = "grouped",
        cross_attention: str = "auto",
        seed: int = 0,
    ):
        self.config = adapted_config(encoder.config, decoder.config, encoder_attention, encoder_heads)
        # "auto" compares Gemma 2's own heads: copying heads changes no function.
        grouped = adapted_config(encoder.config, decoder.config, encoder_attention)
        self.cross_attention = resolve_cross_attention(grouped, cross_attention)
        stack = encoder.config.stack
        self._copies = self.config.encoder.num_key_value_heads // stack.num_key_value_heads
        self._head_dim = stack.head_dim
        self._sources = {"encoder": encoder.tensors, "decoder": decoder.tensors}
        self._seed = seed
        self._tensors = {tensor.name: tensor for tensor in tensor_specs(self.config)}

    def names(self) -> list[str]:
        """The names in a Hugging Face T5Gemma."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape as Hugging Face stores it."""
        return self._tensors[name].stored_shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype of the Gemma 2 tensor that it is adapted from; for a random one, of its self-attention namesake."""
        tensor = self._tensors[name]
        return self._sources[tensor.stack].dtype(self._gemma2_name(tensor))

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor from its Gemma 2, or draws it at random."""
        tensor = self._tensors[name]
        if tensor.gemma2 is None and self.cross_attention == "random":
            return self._draw(tensor).astype(self.dtype(name))
        array = self._sources[tensor.stack].read(self._gemma2_name(tensor))
        return self._copy_heads(array) if self._is_copied(tensor) else array

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Reads one tensor in flat pieces: those of its Gemma 2, if the tensor is taken unchanged."""
        tensor = self._tensors[name]
        if self._is_copied(tensor) or (tensor.gemma2 is None and self.cross_attention == "random"):
            yield from super().chunks(name)
        else:
            yield from self._sources[tensor.stack].chunks(self._gemma2_name(tensor))

    def where(self, name: str | None = None) -> str:
        """The origin of the Gemma 2 tensor; without a name, of both Gemma 2."""
        if name is None:
            return " + ".join(source.where() for source in self._sources.values())
        tensor = self._tensors[name]
        return self._sources[tensor.stack].where(self._gemma2_name(tensor))

    def _gemma2_name(self, tensor: TensorSpec) -> str:
        """The name of the Gemma 2 tensor; for cross-attention, of its namesake in self-attention."""
        if tensor.gemma2 is not None:
            return tensor.gemma2
        # Every row of cross-attention has a namesake among those of self-attention.
        return _GEMMA2_NAMES[tensor.row.path.replace("cross_attention", "self_attention")].format(i=tensor.layer)

    def _is_copied(self, tensor: TensorSpec) -> bool:
        return self._copies > 1 and tensor.stack == "encoder" and "K" in tensor.row.letters

    def _copy_heads(self, array: np.ndarray) -> np.ndarray:
        heads = array.reshape(-1, self._head_dim, array.shape[1])  # [K, H, D]
        return np.repeat(heads, self._copies, axis=0).reshape(-1, array.shape[1])

    def _draw(self, tensor: TensorSpec) -> np.ndarray:
        """Draws a tensor of cross-attention: a kernel from a normal distribution, the scale of a norm as zeros."""
        if len(tensor.shape) == 1:
            return np.zeros(tensor.shape, "float32")  # Norms multiply by 1 + scale.
        name = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:8], "little")
        draw = np.random.default_rng([self._seed, name]).standard_normal(tensor.stored_shape, dtype="float32")
        draw *= self.config.decoder.initializer_range
        return draw


def resolve_cross_attention(config: T5GemmaConfig, cross_attention: str) -> str:
    """Resolves "auto" to "self-attention" or "random"; returns either of these unchanged, if it fits the config.

    Args:
        config: the `T5GemmaConfig`.
        cross_attention: one of `CROSS_ATTENTIONS`.

    Raises:
        ValueError: if `cross_attention` is invalid.
        CheckpointError: if it is "self-attention" and the stacks' widths differ.
    """
    check_choice(cross_attention, "cross_attention", CROSS_ATTENTIONS)
    if cross_attention == "auto":
        # The paper's rule is about what the weights compute: dropout and the spread of fresh weights do not matter.
        encoder, decoder = (
            dataclasses.replace(stack, dropout=0.0, initializer_range=1.0) for stack in (config.encoder, config.decoder)
        )
        return "self-attention" if encoder == decoder else "random"
    if cross_attention == "self-attention" and config.encoder.hidden_dim != config.decoder.hidden_dim:
        raise CheckpointError(
            f'`cross_attention="self-attention"` needs stacks of one width: the encoder has '
            f'{config.encoder.hidden_dim}, the decoder {config.decoder.hidden_dim}. Use "random" or "auto".'
        )
    return cross_attention
