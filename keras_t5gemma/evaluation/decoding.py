"""The generation options of the harness's tasks as options of `generate`."""

import dataclasses
from collections.abc import Mapping

import keras_hub
import numpy as np

from keras_t5gemma.inference.samplers.beam import BeamSampler
from keras_t5gemma.inference.samplers.top_k_top_p import TopKTopPSampler
from keras_t5gemma.suggestions import did_you_mean
from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor

_KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "num_beams")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the answers of one group of requests are decoded.

    Attributes:
        until: strings that end an answer.
        max_new_tokens: the maximum number of tokens of an answer.
        do_sample: whether tokens are drawn at random. If not, the next three have no effect, as in `transformers`.
        temperature: divides the logits.
        top_k: draws from the k likeliest tokens; None for all.
        top_p: draws from the likeliest tokens with this total probability; None for all.
        num_beams: beam search with this many beams; 1 for greedy decoding.
    """

    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int = 1

    @classmethod
    def of(cls, gen_kwargs: Mapping, max_gen_toks: int) -> "Decoding":
        """The options of a request.

        Args:
            gen_kwargs: a task's `generation_kwargs`, under any of the names that the harness accepts.
            max_gen_toks: the maximum number of tokens if the task has none.

        Raises:
            ValueError: if an option is unknown, or options contradict each other.
        """
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        options = dict(normalize_gen_kwargs(dict(gen_kwargs), max_gen_toks))
        if unknown := sorted(set(options) - set(_KNOWN)):
            raise ValueError(
                f"Generation options of a task are {', '.join(_KNOWN)}. Received: {', '.join(unknown)}."
                f"{did_you_mean(unknown[0], _KNOWN)}"
            )
        until = tuple(text for text in handle_stop_sequences(options.pop("until"), eos=None) if text)
        max_new_tokens = options.pop("max_gen_toks")
        decoding = cls(until, max_new_tokens, **options)
        if decoding.do_sample and decoding.num_beams > 1:
            raise ValueError(
                f"Beam search does not draw: use do_sample=True or num_beams, not both. Received: {gen_kwargs}."
            )
        return decoding

    def sampler(self) -> "str | keras_hub.samplers.Sampler":
        """The sampler, for `compile`."""
        if self.do_sample and self.temperature:
            return TopKTopPSampler(self.top_k or None, self.top_p, temperature=float(self.temperature))
        return "greedy" if self.num_beams == 1 else BeamSampler(num_beams=self.num_beams)


class ReadyPrompts(T5GemmaSeq2SeqLMPreprocessor):
    """A preprocessor for prompts that are ids already, which makes texts of the answers."""

    def generate_preprocess(self, x, **_) -> dict:
        """The prompts, unchanged."""
        return x


def answers(lm, inputs: dict[str, np.ndarray], decoding: Decoding, seed: int | None) -> list[str]:
    """Decodes one batch.

    Args:
        lm: a `T5GemmaSeq2SeqLM` whose preprocessor is `ReadyPrompts`, compiled with the sampler of `decoding`.
        inputs: the result of `prompt_inputs`, B prompts.
        decoding: a `Decoding`.
        seed: of random draws, or None.

    Returns:
        B strings, without the starts of the answers and without the strings that ended them.
    """
    options = {"max_new_tokens": decoding.max_new_tokens, "stop": decoding.until or None, "seed": seed}
    return lm.generate(inputs, strip_prompt=True, **options)
