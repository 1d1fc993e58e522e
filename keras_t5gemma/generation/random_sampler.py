"""Random choice of the next token, and seeds for a single call."""

import contextlib

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_t5gemma.checks import integer


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class TopKTopPSampler(keras_hub.samplers.Sampler):
    """Draws from the k likeliest tokens, and of these from the fewest that hold the share p of the probability.

    Temperature, k and p come in this order, as in `transformers`; keras-hub's `TopPSampler` takes its k without scaling
    what is left to a whole, so that its p means something else. Each of them may be left out.

    Args:
        k: the most tokens to draw from, or None for all.
        p: in (0, 1], or None for 1. A token is kept where those likelier than it hold less than p together.
        temperature: logits are divided by it: below 1 for safer, above for wilder choices.
        seed: an integer, or None for a random one; `generate(seed=...)` sets it for one call.

    Raises:
        ValueError: where an argument is out of range.
    """

    def __init__(self, k=None, p=None, temperature=1.0, seed=None):
        super().__init__(temperature=temperature)
        k = integer(k, "k", optional=True, none_means="for all tokens")
        seed = integer(seed, "seed", least=0, optional=True)
        if p is not None and not 0 < p <= 1:
            raise ValueError(f"`p` must be in (0, 1], or None for 1. Received: p={p!r}.")
        self.k = k
        self.p = p
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def get_next_token(self, probabilities):
        """A token a row: [B] of probabilities [B, V]."""
        log_probs, ids = self.candidates(probabilities)
        chosen = keras.random.categorical(log_probs, 1, seed=self.seed_generator, dtype="int32")
        return ops.squeeze(chosen if ids is None else ops.take_along_axis(ids, chosen, axis=1), 1)

    def candidates(self, probabilities):
        """What is drawn from.

        Args:
            probabilities: [B, V], with the temperature in them.

        Returns:
            `(log_probs, ids)`: [B, k], not scaled to a whole, -inf for what is cut off, and the tokens they belong to,
            int [B, k]. Where there is neither k nor p, [B, V] and None.
        """
        if self.k is None and self.p is None:
            return ops.log(probabilities), None
        size = probabilities.shape[1]
        probabilities, ids = ops.top_k(probabilities, size if self.k is None else min(self.k, size))
        if self.p is not None:
            likelier = ops.cumsum(probabilities, axis=1) - probabilities
            total = ops.sum(probabilities, axis=1, keepdims=True)
            kept = ops.logical_or(likelier < self.p * total, ops.arange(ids.shape[1]) == 0)
            probabilities = ops.where(kept, probabilities, 0.0)
        return ops.log(probabilities), ids

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "k": self.k, "p": self.p, "seed": self.seed}


class Draws:
    """The random numbers of one call, from a seed of its own; the sampler's go on afterwards as if it had not been.

    They also go on so after a call that fails, whatever its seed.

    Args:
        sampler: a `keras_hub.samplers.Sampler`; one without random numbers stays as it is.
        seed: an integer from 0, or None to go on with the sampler's.

    Raises:
        ValueError: where the seed is neither.
    """

    def __init__(self, sampler, seed):
        seed = integer(seed, "seed", least=0, optional=True)
        self._variables = sampler.variables
        self._values = None
        if seed is None:
            return
        # Keras counts calls in the second number, and PyTorch adds both up: seeds 1 and 2 as they are would give the
        # same draws, one step apart. 30 bits leave room to count in every backend's integers.
        starts = (np.random.SeedSequence([seed, i]).generate_state(1)[0] >> 2 for i in range(len(self._variables)))
        self._values = [[start, 0] for start in starts]

    @contextlib.contextmanager
    def active(self):
        """While it is, the sampler draws these; the next time it goes on with those after."""
        before = self._read()
        if self._values is not None:
            self._assign(self._values)
        try:
            yield
            after = self._read()  # on JAX, what a program that failed left behind cannot even be read
        except BaseException:
            self._assign(before)
            raise
        if self._values is not None:
            self._values = after
            self._assign(before)

    def _read(self):
        return [np.array(ops.convert_to_numpy(variable)) for variable in self._variables]

    def _assign(self, values):
        for variable, value in zip(self._variables, values, strict=True):
            variable.assign(np.array(value, keras.backend.standardize_dtype(variable.dtype)))
