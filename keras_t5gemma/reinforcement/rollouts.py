"""Answers drawn from a model, as arrays to train on."""

from functools import partial
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_t5gemma.inference.arrays import prompt_arrays, result_arrays, scoring_arrays
from keras_t5gemma.inference.buckets import is_compiled, rounded_for
from keras_t5gemma.inference.decoding.loop import Control
from keras_t5gemma.inference.generate import generate_step, stop_ids
from keras_t5gemma.inference.memory import memory_errors_explained
from keras_t5gemma.inference.programs.compiled import Program
from keras_t5gemma.inference.samplers.top_k_top_p import Draws, TopKTopPSampler


class Rollout(NamedTuple):
    """n answers to each of B prompts. Rows R = B n, an example's answers next to each other.

    Attributes:
        texts: the R answers.
        has_ended: bool [R], False for an answer that was cut at the maximum length.
        lengths: int [R], the answers' tokens, with the one that ended them.
        inputs: `encoder_token_ids`, `encoder_padding_mask` [B, S], `decoder_token_ids`, `decoder_padding_mask`
            [B, n, T].
        labels: int32 [B, n, T].
        log_probs: float32 [B, n, T], of the labels by the weights that drew them, at temperature 1.
        weights: float32 [B, n, T], 1 at the answers' tokens and 0 elsewhere.
    """

    texts: list[str]
    has_ended: np.ndarray
    lengths: np.ndarray
    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    log_probs: np.ndarray
    weights: np.ndarray


class Rollouts:
    """Draws answers from a model, each prompt encoded once. The model's own sampler is not touched.

    Args:
        lm: a `T5GemmaSeq2SeqLM` with a preprocessor.
        num_samples: n.
        temperature: logits are divided by it before a token is drawn.
        max_new_tokens: the most tokens of an answer.
        seed: an integer that determines all draws.
    """

    def __init__(self, lm, num_samples: int, temperature: float, max_new_tokens: int, seed: int):
        self._lm, self._num_samples, self._max_new_tokens, self._seed = lm, num_samples, max_new_tokens, seed
        self._sampler = TopKTopPSampler(temperature=temperature, seed=seed)
        control = Control(stop_ids(lm, "auto"), num_samples=num_samples, log_probs=True)
        step = partial(generate_step, lm, control=control, sampler=self._sampler)
        self._control, self._program = control, Program(step, lm, seeds=self._sampler.variables, decodes=True)

    def __call__(self, prompts: list, step: int) -> Rollout:
        """Draws answers.

        Args:
            prompts: B strings or conversations.
            step: the step; with the seed it determines the draws.

        Raises:
            ValueError: if a prompt is invalid or too long.
            MemoryError: if memory does not suffice.
        """
        lm, samples = self._lm, self._num_samples
        batch = lm.preprocessor.generate_preprocess(prompts)
        prompts = prompt_arrays(batch, None, lm.backbone.config.vocabulary_size, self._max_new_tokens)
        arrays = rounded_for(lm, prompts)
        seed = int(np.random.SeedSequence([self._seed, step]).generate_state(1)[0])
        with Draws(self._sampler, seed) as draws, memory_errors_explained(lm, prompts, arrays, samples):
            outputs, _ = self._program(arrays, seeds=draws.values)
            outputs = {name: ops.convert_to_numpy(x) for name, x in outputs.items()}
        return self._rollout(prompts, result_arrays(outputs, prompts, samples, strip_prompt=True))

    def _rollout(self, prompts: dict[str, np.ndarray], answers: dict[str, np.ndarray]) -> Rollout:
        """The `Rollout` of prompts and the arrays of their answers [R, L], moved to the left."""
        lm, samples = self._lm, self._num_samples
        ids, mask = answers["decoder_token_ids"], answers["decoder_padding_mask"]
        count = len(prompts["encoder_token_ids"])
        answer_arrays = {name: answers[name] for name in ("decoder_token_ids", "decoder_padding_mask")}
        vocabulary_size = lm.backbone.config.vocabulary_size
        arrays, lengths = scoring_arrays(prompts, answer_arrays, vocabulary_size, counts=[samples] * count)
        log_probs = np.zeros(arrays["labels"].shape, "float32")
        log_probs[arrays["label_mask"]] = answers["log_probs"][mask]  # both by row, then from left to right
        arrays = {"log_probs": log_probs, **arrays}
        del arrays["prompt_rows"]
        arrays = {name: x if name.startswith("encoder") else _grouped(x, samples) for name, x in arrays.items()}
        arrays = self._rounded(arrays)
        return Rollout(
            texts=lm.preprocessor.generate_postprocess(answer_arrays),
            has_ended=(np.isin(ids, self._control.stop_token_ids) & mask).any(axis=1),
            lengths=lengths,
            inputs={name: x for name, x in arrays.items() if name.startswith(("encoder", "decoder"))},
            labels=arrays["labels"],
            log_probs=arrays["log_probs"],
            weights=arrays["label_mask"].astype("float32"),
        )

    def _rounded(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """S and T rounded up to the model's buckets, if a new shape needs a new program. B and n are always the same.

        Args:
            arrays: those of the encoder [B, S], all others [B, n, T].
        """
        lm = self._lm
        if not is_compiled(lm):
            return arrays
        limits = {"encoder": lm.preprocessor.encoder_sequence_length, "decoder": self._max_new_tokens}
        padded = {}
        for name, x in arrays.items():
            # As in scoring, the decoder's positions are computed, so the encoder's sizes apply to both.
            limit = limits["encoder" if name.startswith("encoder") else "decoder"]
            size = lm.buckets.size("encoder", x.shape[-1], limit)
            padded[name] = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
        return padded


def _grouped(x: np.ndarray, samples: int) -> np.ndarray:
    """[B, n, T] of rows [B n, T]."""
    return x.reshape(-1, samples, x.shape[-1])
