"""Gemma 2's tensors as T5Gemma's: the adaptation of arXiv 2504.06225, one tensor at a time.

The encoder takes every weight of its Gemma 2. A decoder block takes self-attention, feed-forward and their norms from
the same layer of its Gemma 2; what becomes of cross-attention, which Gemma 2 does not have, is the only choice.
"""

import dataclasses
import hashlib

import numpy as np

from keras_t5gemma.checkpoints.tensor_source import CheckpointError, TensorSource
from keras_t5gemma.checkpoints.tensor_table import TABLE, tensor_specs
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.suggestions import check_choice

CROSS_ATTENTIONS = ("auto", "self-attention", "random")
ENCODER_HEADS = ("grouped", "multi")
_GEMMA2_NAMES = {row.path: row.gemma2 for row in TABLE}


def adapted_config(encoder, decoder, encoder_attention="bidirectional", encoder_heads="grouped"):
    """The config of the T5Gemma that two Gemma 2 make.

    Args:
        encoder: the `Gemma2Config` of the encoder's.
        decoder: that of the decoder's, which also gives the soft cap on the output logits.
        encoder_attention: "bidirectional", or "causal", an ablation in the paper.
        encoder_heads: "grouped" as in Gemma 2, or "multi": as many key and value heads as query heads, an ablation in
            the paper.

    Raises:
        ValueError: where `encoder_heads` is neither.
        CheckpointError: where their vocabularies differ.
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
    """The T5Gemma that two Gemma 2 make, as a `TensorSource`: computed when read, nothing is kept.

    Args:
        encoder: the `Source` of the encoder's Gemma 2 (`gemma2_source`).
        decoder: that of the decoder's; the same one will do.
        encoder_attention: as for `adapted_config`; the weights are the same.
        cross_attention: where cross-attention and its two norms come from. "self-attention": the decoder's
            self-attention and its norms, layer by layer. "random": kernels drawn with the decoder's
            `initializer_range`, norms at zero. "auto", the paper's rule: the former where both stacks have the same
            configuration, else the latter (and then train cross-attention alone for the first 1,000 steps).
        encoder_heads: as for `adapted_config`; with "multi" each key and value head is copied to every query head that
            shares it, which computes the same.
        seed: of the random draws; each tensor's depends on the seed and on its name only.

    Raises:
        ValueError: where `cross_attention` or `encoder_heads` is none of these.
        CheckpointError: where the vocabularies differ, or "self-attention" does not fit: its keys and values read the
            decoder's width, and the encoder's is another.
    """

    def __init__(
        self,
        encoder,
        decoder,
        *,
        encoder_attention="bidirectional",
        encoder_heads="grouped",
        cross_attention="auto",
        seed=0,
    ):
        self.config = adapted_config(encoder.config, decoder.config, encoder_attention, encoder_heads)
        # By Gemma 2's own heads: copying them out changes no function.
        grouped = adapted_config(encoder.config, decoder.config, encoder_attention)
        self.cross_attention = resolve_cross_attention(grouped, cross_attention)
        stack = encoder.config.stack
        self._copies = self.config.encoder.num_key_value_heads // stack.num_key_value_heads
        self._head_dim = stack.head_dim
        self._sources = {"encoder": encoder.tensors, "decoder": decoder.tensors}
        self._seed = seed
        self._tensors = {tensor.name: tensor for tensor in tensor_specs(self.config)}

    def names(self):
        """The names in a Hugging Face T5Gemma."""
        return list(self._tensors)

    def shape(self, name):
        """The shape as Hugging Face stores it."""
        return self._tensors[name].stored_shape

    def dtype(self, name):
        """The dtype of the tensor it comes from; of one drawn at random, that of the decoder's counterpart."""
        tensor = self._tensors[name]
        return self._sources[tensor.stack].dtype(self._gemma2_name(tensor))

    def read(self, name):
        """One tensor, read or drawn now."""
        tensor = self._tensors[name]
        if tensor.gemma2 is None and self.cross_attention == "random":
            return self._draw(tensor).astype(self.dtype(name))
        array = self._sources[tensor.stack].read(self._gemma2_name(tensor))
        return self._copy_heads(array) if self._is_copied(tensor) else array

    def chunks(self, name):
        """One tensor in flat pieces: the Gemma 2's own, where they go unchanged."""
        tensor = self._tensors[name]
        if self._is_copied(tensor) or (tensor.gemma2 is None and self.cross_attention == "random"):
            yield from super().chunks(name)
        else:
            yield from self._sources[tensor.stack].chunks(self._gemma2_name(tensor))

    def where(self, name=None):
        """Where the Gemma 2 tensor comes from, or both sources."""
        if name is None:
            return " + ".join(source.where() for source in self._sources.values())
        tensor = self._tensors[name]
        return self._sources[tensor.stack].where(self._gemma2_name(tensor))

    def _gemma2_name(self, tensor):
        if tensor.gemma2 is not None:
            return tensor.gemma2
        # Every row of cross-attention has its namesake among those of self-attention.
        return _GEMMA2_NAMES[tensor.row.path.replace("cross_attention", "self_attention")].format(i=tensor.layer)

    def _is_copied(self, tensor):
        return self._copies > 1 and tensor.stack == "encoder" and "K" in tensor.row.letters

    def _copy_heads(self, array):
        heads = array.reshape(-1, self._head_dim, array.shape[1])  # [K, H, D]
        return np.repeat(heads, self._copies, axis=0).reshape(-1, array.shape[1])

    def _draw(self, tensor):
        if len(tensor.shape) == 1:
            return np.zeros(tensor.shape, "float32")  # Norms multiply by 1 + scale.
        name = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:8], "little")
        draw = np.random.default_rng([self._seed, name]).standard_normal(tensor.stored_shape, dtype="float32")
        draw *= self.config.decoder.initializer_range
        return draw


def resolve_cross_attention(config, cross_attention):
    """ "self-attention" or "random": what "auto" stands for in a config, or what was asked for, if it fits.

    Args:
        config: the `T5GemmaConfig`.
        cross_attention: one of `CROSS_ATTENTIONS`.

    Raises:
        ValueError: where it is none of these.
        CheckpointError: where "self-attention" was asked for and the stacks' widths differ.
    """
    check_choice(cross_attention, "cross_attention", CROSS_ATTENTIONS)
    if cross_attention == "auto":
        # Dropout and the spread of fresh weights are no part of what the weights were trained to compute.
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
