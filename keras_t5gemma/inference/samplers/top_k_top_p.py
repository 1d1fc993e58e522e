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
    """Draws from the k likeliest tokens, and of these from the smallest set whose probability reaches p.

    Temperature, k and p are applied in this order, as in `transformers`. keras-hub's `TopPSampler` does not normalize
    the probabilities again after its k, so its p has another meaning. Each of the three may be left out.

    Args:
        k: the maximum number of tokens to draw from, or None for all.
        p: in (0, 1], or None for 1. A token is kept if the total probability of the likelier tokens is below p.
        temperature: logits are divided by it: below 1 for safer, above 1 for wilder choices.
        seed: an integer, or None for a random one; `generate(seed=...)` sets it for one call.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, k: int | None = None, p: float | None = None, temperature: float = 1.0, seed: int | None = None):
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not temperature > 0:
            raise ValueError(
                f"`temperature` must be a number above 0; the likeliest token at each step is the sampler "
                f'"greedy". Received: temperature={temperature!r}.'
            )
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
        """Draws one token per row: int [B] from probabilities [B, V]."""
        log_probs, ids = self.candidates(probabilities)
        chosen = keras.random.categorical(log_probs, 1, seed=self.seed_generator, dtype="int32")
        return ops.squeeze(chosen if ids is None else ops.take_along_axis(ids, chosen, axis=1), 1)

    def candidates(self, probabilities):
        """The tokens that `get_next_token` draws from, with their log-probabilities.

        Args:
            probabilities: [B, V], after the temperature.

        Returns:
            `(log_probs, ids)`: [B, k], not normalized, -inf for tokens that p excludes; and their tokens, int [B, k].
            If neither k nor p is set, [B, V] and None.
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

    def get_config(self) -> dict:
        """The constructor's arguments."""
        return {**super().get_config(), "k": self.k, "p": self.p, "seed": self.seed}


def generator_start(entropy: list[int], calls: tuple[int, ...] = ()) -> int:
    """The first number of a generator's state, for a call's seed followed by the number of the generator: `entropy`."""
    # Keras counts draws in the second number, and PyTorch adds the two: the plain seeds 1 and 2 would give the same
    # draws, one step apart. 30 bits leave room for the count in every backend's integers.
    return int(np.random.SeedSequence(entropy, spawn_key=calls).generate_state(1)[0] >> 2)


# Held while a call reads a sampler's state and advances it: the two are one atomic step.
_LOCK = threading.Lock()


class Draws:
    """The random state of one call: the sampler's generators, restarted for the call.

    A call without a seed takes the sampler's next start, which counts the calls. A call with a seed leaves the sampler
    unchanged. Calls share no state while they run, so several threads get the same results as one thread:

        sampler's state  [s, 0]       [s, 1]       [s, 2]
        calls                 from (s, 0)  from (s, 1)

    As a context manager it gives the start back if the call fails and no other call has taken one since.

    Args:
        sampler: a `keras_hub.samplers.Sampler`. For a sampler without random numbers `values` is empty.
        seed: an integer from 0, or None for the sampler's next start.

    Raises:
        ValueError: if `seed` is neither.

    Attributes:
        values: a list of int [2], the state of each of the sampler's generators; the code that draws updates it.
    """

    def __init__(self, sampler: keras_hub.samplers.Sampler, seed: int | None):
        seed = integer(seed, "seed", least=0, optional=True)
        self._variables = sampler.variables
        self._seed = seed
        self._before = self._after = None
        self.values = []

    def __enter__(self):
        """Sets `values`, and takes the sampler's next start if there is no seed."""
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
        # An abandoned generator (`GeneratorExit`) has drawn numbers: its start counts as used.
        if error is None or error is GeneratorExit or self._before is None:
            return
        with _LOCK:
            if self._read() == self._after:
                self._assign(self._before)

    def _start(self, entropy: list[int], variable, calls: tuple[int, ...] = ()) -> np.ndarray:
        """A generator's first state, int [2], from `entropy`."""
        return np.array([generator_start(entropy, calls), 0], keras.backend.standardize_dtype(variable.dtype))

    def _read(self) -> list[list[int]]:
        return [variable_array(variable).tolist() for variable in self._variables]

    def _assign(self, values: list[list[int]]) -> None:
        for variable, value in zip(self._variables, values, strict=True):
            variable.assign(np.array(value, keras.backend.standardize_dtype(variable.dtype)))


def with_own_loop(sampler):
    """A copy of a sampler whose loop carries the state of its random generators, on TensorFlow; elsewhere the sampler.

    A TensorFlow loop returns its loop variables only, so the generators' state must be among them. On JAX keras-hub's
    loop carries it already, and on PyTorch the loop is a Python loop.

    Args:
        sampler: a `keras_hub.samplers.Sampler`, called in a `keras.StatelessScope` that holds its variables.

    Returns:
        A `keras_hub.samplers.Sampler` that shares the variables.
    """
    variables = sampler.variables
    if keras.config.backend() != "tensorflow" or not variables:
        return sampler
    wrapper = copy.copy(sampler)

    def run_loop(cond, body, model=None, loop_vars=None, maximum_iterations=None):
        def cond_without_seeds(_, *loop_vars):
            return cond(*loop_vars)

        def body_with_seeds(seeds, *loop_vars):
            with keras.StatelessScope(state_mapping=list(zip(variables, seeds, strict=True))) as scope:
                loop_vars = body(*loop_vars)
            return [scope.get_current_value(variable) for variable in variables], *loop_vars

        seeds = [ops.convert_to_tensor(variable) for variable in variables]
        seeds, *loop_vars = sampler.run_loop(
            cond_without_seeds,
            body_with_seeds,
            model=model,
            loop_vars=(seeds, *loop_vars),
            maximum_iterations=maximum_iterations,
        )
        for variable, seed in zip(variables, seeds, strict=True):
            variable.assign(seed)
        return loop_vars

    wrapper.run_loop = run_loop
    return wrapper
