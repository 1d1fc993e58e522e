"""Random choice of the next token, and seeds for a single call."""

import copy
import threading

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_t5gemma._keras_internals import variable_array
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
        ValueError: if an argument is out of range.
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
            kept = ops.logical_or(likelier < self.p * total, ops.arange(ids.shape[1], dtype="int32") == 0)
            probabilities = ops.where(kept, probabilities, 0.0)
        return ops.log(probabilities), ids

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "k": self.k, "p": self.p, "seed": self.seed}


# Taking a number from a sampler and counting on is one act.
_LOCK = threading.Lock()


class Draws:
    """The random numbers of one call: a sampler's, from a start of the call's own.

    A call without a seed takes the next start of the sampler, which counts calls; one with a seed leaves the sampler
    alone. Nothing is shared while calls run, so that several threads get what one thread would:

        sampler's state  [s, 0]       [s, 1]       [s, 2]
        calls                 from (s, 0)  from (s, 1)

    As a context a call that fails gives its start back, if no other call has taken one since.

    Args:
        sampler: a `keras_hub.samplers.Sampler`; one without random numbers has none here.
        seed: an integer from 0, or None for the sampler's next start.

    Raises:
        ValueError: if the seed is neither.

    Attributes:
        values: a list of int [2], the state of each of the sampler's generators; whoever draws brings them up to date.
    """

    def __init__(self, sampler, seed):
        seed = integer(seed, "seed", least=0, optional=True)
        self._variables = sampler.variables
        self._seed = seed
        self._before = self._after = None
        self.values = []

    def __enter__(self):
        if self._seed is not None:
            self.values = [self._start([int(self._seed), i], variable) for i, variable in enumerate(self._variables)]
            return self
        with _LOCK:
            self._before = self._read()
            self._after = [[seed, count + 1] for seed, count in self._before]
            self._assign(self._after)
        self.values = [
            self._start([*map(abs, before), i], variable, calls=(1,))
            for i, (before, variable) in enumerate(zip(self._before, self._variables, strict=True))
        ]
        return self

    def __exit__(self, error, *_):
        # A generator that is given up has drawn.
        if error is None or error is GeneratorExit or self._before is None:
            return
        with _LOCK:
            if self._read() == self._after:
                self._assign(self._before)

    def _start(self, entropy, variable, calls=()):
        # Keras counts draws in the second number, and PyTorch adds both up: seeds 1 and 2 as they are would give the
        # same draws, one step apart. 30 bits leave room to count in every backend's integers.
        start = np.random.SeedSequence(entropy, spawn_key=calls).generate_state(1)[0] >> 2
        return np.array([start, 0], keras.backend.standardize_dtype(variable.dtype))

    def _read(self):
        return [variable_array(variable).tolist() for variable in self._variables]

    def _assign(self, values):
        for variable, value in zip(self._variables, values, strict=True):
            variable.assign(np.array(value, keras.backend.standardize_dtype(variable.dtype)))


def with_own_loop(sampler):
    """A sampler whose loop carries the state of its generators, if the backend's loop must be told what changes in it.

    keras-hub's carries it on JAX, and PyTorch's is Python's; TensorFlow's takes tensors alone out of a loop.

    Args:
        sampler: a `keras_hub.samplers.Sampler`, called in a `keras.StatelessScope` that holds its variables.
    """
    variables = sampler.variables
    if keras.config.backend() != "tensorflow" or not variables:
        return sampler
    carrying = copy.copy(sampler)

    def run_loop(cond, body, model=None, loop_vars=None, maximum_iterations=None):
        def cond_of_rest(_, *rest):
            return cond(*rest)

        def body_with_seeds(seeds, *rest):
            with keras.StatelessScope(state_mapping=list(zip(variables, seeds, strict=True))) as scope:
                rest = body(*rest)
            return [scope.get_current_value(variable) for variable in variables], *rest

        seeds = [ops.convert_to_tensor(variable) for variable in variables]
        seeds, *rest = sampler.run_loop(
            cond_of_rest,
            body_with_seeds,
            model=model,
            loop_vars=(seeds, *loop_vars),
            maximum_iterations=maximum_iterations,
        )
        for variable, seed in zip(variables, seeds, strict=True):
            variable.assign(seed)
        return rest

    carrying.run_loop = run_loop
    return carrying
