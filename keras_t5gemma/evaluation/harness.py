"""`HarnessLM`: a T5Gemma as a model of lm-evaluation-harness, registered there as `keras-t5gemma`."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.checks import integer
from keras_t5gemma.evaluation.batches import choice_batches, prompt_batches
from keras_t5gemma.evaluation.decoding import Decoding, ReadyPrompts, answers
from keras_t5gemma.evaluation.extra import require_lm_eval
from keras_t5gemma.evaluation.model_info import model_info
from keras_t5gemma.evaluation.prompts import ContextReader, Prompt, chat_context, prompt_inputs
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.progress import text_progress
from keras_t5gemma.suggestions import check_choice

require_lm_eval()
from lm_eval.api.model import LM  # noqa: E402 the line above explains its absence
from lm_eval.api.registry import register_model  # noqa: E402

# Gemma 2's context (arXiv 2408.00118, section 2: "a context length of 8192 tokens").
CONTEXT_LENGTH = 8192


@register_model("keras-t5gemma")
class HarnessLM(LM):
    """A T5Gemma as a model of lm-evaluation-harness: `lm_eval.simple_evaluate(kt.HarnessLM(lm), tasks=[...])`.

    The encoder reads a context's own ids, without `<bos>`, as it does in training. The decoder starts from `<bos>`, and
    its log-likelihood of a continuation counts the continuation's tokens, without an end. A continuation keeps its
    leading space. All continuations of a context are scored after one pass of the encoder. An empty context is a single
    `<bos>`. A context in turns is split after its last `<start_of_turn>model` and newline: what follows starts the
    decoder's answer. A system message joins the first user turn.

    The model's own preprocessor and sampler are neither used nor changed, except for the tokenizer.

    Args:
        lm: a `T5GemmaSeq2SeqLM` with a preprocessor, or a preset.
        batch_size: the maximum number of contexts that the encoder reads at once.
        max_length: the maximum number of tokens of a context; None for 8,192, the context of Gemma 2.
        truncate: what to do with a longer context. "left" cuts its start, which has the first of the examples, "right"
            its end. None raises an error. One warning per call says how many were cut, and `truncated` counts them.
        max_gen_toks: the maximum number of tokens of an answer, for a task that has none.
        rolling: how `loglikelihood_rolling` reads a text, whose whole likelihood an encoder-decoder does not have.
            None refuses. "halves": the encoder reads the first half of a text, and only the second half counts, so a
            perplexity per word or byte is not that of other models.
        seed: of random draws, for tasks with `do_sample`.

    Attributes:
        truncated: how many contexts were cut so far.

    Raises:
        ImportError: if lm-evaluation-harness is not installed.
        ValueError: if an option is invalid, or the model has no preprocessor.
    """

    def __init__(
        self,
        lm: "T5GemmaSeq2SeqLM | str | Path",
        batch_size: int | str = 8,
        max_length: int | None = None,
        truncate: str | None = "left",
        *,
        max_gen_toks: int = 256,
        rolling: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        # The command line of the harness passes text.
        batch_size = int(batch_size) if isinstance(batch_size, str) and batch_size.isdecimal() else batch_size
        self.batch_size = integer(batch_size, "batch_size")
        self.max_length = integer(max_length, "max_length", optional=True) or CONTEXT_LENGTH
        self.max_gen_toks = integer(max_gen_toks, "max_gen_toks")
        self.seed = integer(seed, "seed", least=0)
        if truncate is not None:
            check_choice(truncate, "truncate", ("left", "right"), others=", or None")
        if rolling is not None:
            check_choice(rolling, "rolling", ("halves",), others=", or None")
        self.rolling = rolling
        self.preset = None if isinstance(lm, T5GemmaSeq2SeqLM) else str(lm)
        self.lm = T5GemmaSeq2SeqLM.from_preset(lm) if isinstance(lm, (str, Path)) else lm
        if getattr(self.lm, "preprocessor", None) is None:
            raise ValueError(
                "`lm` must be a T5GemmaSeq2SeqLM with a preprocessor, which has the tokenizer, or a preset. Received: "
                f"{lm!r}."
            )
        self.tokenizer = self.lm.preprocessor.tokenizer
        self.reader = ContextReader(self.tokenizer, self.max_length, truncate)
        self.truncated = 0
        self._models: dict[str, T5GemmaSeq2SeqLM] = {}
        self._sampling: Decoding | None = None
        self._draws = 0

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "HarnessLM":
        """The model of `--model keras-t5gemma --model_args pretrained=FOLDER,dtype=bfloat16`.

        Args:
            arg_dict: arguments of the class, with the preset as `pretrained` or `lm`, and the `dtype` of
                `from_preset`.
            additional_config: `batch_size`; values that are None do not count.

        Raises:
            ValueError: if there is no preset, or `device` or `max_batch_size` is set.
        """
        options = {**arg_dict, **{name: x for name, x in (additional_config or {}).items() if x is not None}}
        if refused := [name for name in ("device", "max_batch_size") if options.pop(name, None) is not None]:
            raise ValueError(
                f"{', '.join(refused)}: Keras chooses the device when its backend starts, and `batch_size` is a number."
            )
        preset = options.pop("pretrained", None) or options.pop("lm", None)
        if preset is None:
            raise ValueError(f"Name the preset: pretrained=FOLDER. Received: {sorted(options)}.")
        dtype = {"dtype": options.pop("dtype")} if "dtype" in options else {}
        created = cls(T5GemmaSeq2SeqLM.from_preset(preset, **dtype), **options)
        created.preset = str(preset)
        return created

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "HarnessLM":
        """As `create_from_arg_obj`, from `name=value,name=value`."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(self, requests: Sequence) -> list[tuple[float, bool]]:
        """The log-likelihood of continuations.

        Args:
            requests: `lm_eval.api.instance.Instance`s with `(context, continuation)`.

        Returns:
            `(log-likelihood in nats, whether it is what greedy decoding gives)` per request.
        """
        pairs = [self.reader.pair(*request.args) for request in requests]
        self._warn_of_cuts(prompt for prompt, _ in pairs)
        results = self._scored(pairs)
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence) -> list[float]:
        """The log-likelihood of the second halves of texts, if `rolling="halves"` asks for it.

        Args:
            requests: `Instance`s with `(text,)`.

        Returns:
            A number per request, in nats. A text longer than twice `max_length` is read in parts of that length.

        Raises:
            ValueError: if `rolling` is None.
        """
        if self.rolling is None:
            raise ValueError(
                "An encoder-decoder has no likelihood of a whole text, which this task asks for (perplexity per word "
                'or byte). kt.HarnessLM(lm, rolling="halves") has the encoder read the first half of each text, and '
                "counts the second half: compare that only with itself. Or choose tasks with a context."
            )
        pairs, owners = [], []
        for i, request in enumerate(requests):
            ids = self.reader.ids(request.args[0])
            for start in range(0, len(ids), 2 * self.max_length):
                part = ids[start : start + 2 * self.max_length]
                half = len(part) // 2
                pairs.append((Prompt(part[:half] or (self.tokenizer.start_token_id,)), part[half:]))
                owners.append(i)
        results = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._scored(pairs), strict=True):
            results[owner] += log_likelihood
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: Sequence) -> list[str]:
        """Answers of the model.

        Args:
            requests: `Instance`s with `(context, gen_kwargs)`.

        Returns:
            A string per request, which ends before the first of the strings in `until`.
        """
        return self.generated([request.args for request in requests])

    def generated(self, pairs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Answers of the model, for those who have no `Instance`s.

        Args:
            pairs: `(context, gen_kwargs)` per request.

        Returns:
            As `generate_until`.
        """
        prompts = [self.reader.prompt(context) for context, _ in pairs]
        self._warn_of_cuts(prompts)
        groups: dict[Decoding, list[int]] = {}
        for i, (_, gen_kwargs) in enumerate(pairs):
            groups.setdefault(Decoding.of(gen_kwargs, self.max_gen_toks), []).append(i)
        results = [""] * len(pairs)
        with text_progress("Generating", len(pairs)) as advance:
            for decoding, indices in groups.items():
                lm = self._generator(decoding)
                group = [prompts[i] for i in indices]
                for batch in prompt_batches(group, self.batch_size):
                    inputs = prompt_inputs([group[i] for i in batch], self.tokenizer)
                    seed = self._next_seed() if decoding.do_sample else None
                    for i, text in zip(batch, answers(lm, inputs, decoding, seed), strict=True):
                        results[indices[i]] = text
                        self.cache_hook.add_partial("generate_until", pairs[indices[i]], text)
                    advance(len(batch))
        return results

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a context in Gemma's turns; see `keras_t5gemma.evaluation.prompts.chat_context`."""
        return chat_context(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """A name of the template, for the results."""
        if isinstance(chat_template, str):
            raise ValueError(f"T5Gemma has one chat template: pass True or False. Received: {chat_template!r}.")
        return "Gemma's turns; a system message joins the first user turn" if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """A name that is the same for equal vocabularies, for the harness's cache of requests."""
        return f"keras-t5gemma__{hashlib.sha256(self.tokenizer.proto or b'').hexdigest()[:16]}"

    def get_model_info(self) -> dict:
        """What the harness writes into its results about the model."""
        facts = model_info(self.lm, self.preset)
        return {**facts, "max_length": self.max_length, "truncated_contexts": self.truncated}

    def _scored(self, pairs: Sequence[tuple[Prompt, tuple[int, ...]]]) -> list[tuple[float, bool]]:
        """`(log-likelihood, is_greedy)` per pair of a prompt and a target's ids."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        lm = self._model("score", None)
        with text_progress("Scoring", len(pairs)) as advance:
            for batch in choice_batches(pairs, self.batch_size):
                inputs = prompt_inputs([choices.prompt for choices in batch], self.tokenizer)
                scores = lm.score(inputs, [[list(ids) for ids in choices.targets] for choices in batch])
                for row, choices in enumerate(batch):
                    found = (scores[name][row].tolist() for name in ("log_likelihood", "is_greedy"))
                    for index, result in zip(choices.indices, zip(*found, strict=True), strict=True):
                        results[index] = result
                advance(sum(len(choices.indices) for choices in batch))
        return results

    def _generator(self, decoding: Decoding) -> T5GemmaSeq2SeqLM:
        """The model that generates, compiled with the sampler of a `Decoding`."""
        lm = self._model("generate", ReadyPrompts(self.tokenizer, self.max_length))
        sampling = dataclasses.replace(decoding, until=(), max_new_tokens=1)
        if self._sampling != sampling:
            lm.compile(sampler=decoding.sampler(), **self._options())
            self._sampling = sampling
        return lm

    def _next_seed(self) -> int:
        """A seed per batch, the same in each run."""
        self._draws += 1
        return self.seed + self._draws

    def _model(self, purpose: str, preprocessor: ReadyPrompts | None) -> T5GemmaSeq2SeqLM:
        """A model over the same backbone that takes ids."""
        if purpose not in self._models:
            self._models[purpose] = T5GemmaSeq2SeqLM(self.lm.backbone, preprocessor, compile=False)
            self._models[purpose].compile(**self._options())
        self._models[purpose].buckets = self.lm.buckets
        return self._models[purpose]

    def _options(self) -> dict:
        """The options of `compile` that change how the user's model runs."""
        is_auto = getattr(self.lm, "jit_compile_is_auto", True)
        return {"run_eagerly": self.lm.run_eagerly, "jit_compile": "auto" if is_auto else self.lm.jit_compile}

    def _warn_of_cuts(self, prompts) -> None:
        """Counts contexts that were cut, each once, and warns of them."""
        found = list(dict.fromkeys(prompts))
        cut = sum(prompt.is_cut for prompt in found)
        if cut:
            self.truncated += cut
            warn_caller(
                f"{cut} of {len(found)} contexts have more than max_length={self.max_length} tokens and were cut on "
                f"the {self.reader.truncate}. Raise `max_length`, or ask for fewer examples by `num_fewshot`."
            )
