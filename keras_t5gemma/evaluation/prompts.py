"""Contexts of lm-evaluation-harness as the ids of the two stacks.

context                                          encoder                       decoder
"Q: 2 + 2 =\\nA:"                                 the text's ids                <bos>
"... Paris. "                                    "... Paris."                  <bos>, and " " starts the target
"<start_of_turn>user\\n...<end_of_turn>\\n         up to here -> model\\n        <bos> "The answer is"
 <start_of_turn>model\\nThe answer is"
""                                               <bos>                         <bos>
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from keras_t5gemma.text.chat import START_OF_TURN, USER_HEADER, format_turns
from keras_t5gemma.text.encoding import pad_rows
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer

_ANSWER_HEADER = f"{START_OF_TURN}model\n"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model reads before it answers.

    Attributes:
        encoder: the encoder's ids.
        start: ids that the decoder's answer starts with, without `<bos>`.
        is_cut: whether the context was longer than the limit.
    """

    encoder: tuple[int, ...]
    start: tuple[int, ...] = ()
    is_cut: bool = dataclasses.field(default=False, compare=False)


@dataclasses.dataclass(frozen=True)
class ContextReader:
    """Converts contexts to ids. `HarnessLM` has one.

    Attributes:
        tokenizer: a `T5GemmaTokenizer`.
        max_length: the maximum number of ids that the encoder reads.
        truncate: the end at which a longer context is cut, "left" or "right"; None to refuse it.
    """

    tokenizer: T5GemmaTokenizer
    max_length: int
    truncate: str | None

    def prompt(self, context: str) -> Prompt:
        """The ids of a context that the model continues.

        Args:
            context: any text, in Gemma's turns or not.

        Raises:
            ValueError: if it is too long, and `truncate` is None.
        """
        text, start = split_at_answer(context)
        ids = self._encode(text) or (self.tokenizer.start_token_id,)
        is_cut = len(ids) > self.max_length
        return Prompt(self._cut(text, ids) if is_cut else ids, self._encode(start), is_cut)

    def pair(self, context: str, continuation: str) -> tuple[Prompt, tuple[int, ...]]:
        """The ids of a context and of a continuation whose likelihood is asked for.

        White space at the end of a context goes to the continuation, as in the harness's own models.

        Args:
            context: any text, in Gemma's turns or not.
            continuation: the text that follows, with its leading space.

        Returns:
            `(prompt, target)`: the target's ids, without an end.

        Raises:
            ValueError: if the continuation is empty, or the context is too long and `truncate` is None.
        """
        _, start = split_at_answer(context)
        last = start if _ANSWER_HEADER in context else context
        moved = last[len(last.rstrip()) :]
        target = self._encode(moved + continuation)
        if not target:
            raise ValueError(f"A continuation is empty, after the context that ends with {context[-80:]!r}.")
        return self.prompt(context.removesuffix(moved)), target

    def ids(self, text: str) -> tuple[int, ...]:
        """The ids of a text, with nothing added or cut."""
        return self._encode(text)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(int(i) for i in self.tokenizer.tokenize(text)) if text else ()

    def _cut(self, text: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Ids cut to the limit. Of a conversation the oldest turns go first; a user's header and the end stay."""
        if self.truncate is None:
            raise ValueError(
                f"A context has {len(ids)} tokens, more than max_length={self.max_length}. Raise it, ask for fewer "
                f'examples by `num_fewshot`, or have contexts cut by truncate="left". It ends with {text[-80:]!r}.'
            )
        if self.truncate == "right" and not text.endswith(_ANSWER_HEADER):
            return ids[: self.max_length]
        if not text.endswith(_ANSWER_HEADER):
            return ids[len(ids) - self.max_length :]
        header, footer = len(self._encode(USER_HEADER)), len(self._encode(_ANSWER_HEADER))
        while self.truncate == "left" and len(ids) > self.max_length:
            later = text.find(USER_HEADER, 1)
            if later < 0:
                break
            text = text[later:]
            ids = self._encode(text)
        room = self.max_length - header - footer
        if room < 1:
            raise ValueError(f"max_length={self.max_length} has no room for text: turns take {header + footer} tokens.")
        if len(ids) <= self.max_length:
            return ids
        inner = ids[header : len(ids) - footer]
        inner = inner[:room] if self.truncate == "right" else inner[len(inner) - room :]
        return ids[:header] + inner + ids[len(ids) - footer :]


def split_at_answer(context: str) -> tuple[str, str]:
    """Splits a context in turns after its last `<start_of_turn>model` and newline; what follows starts the answer.

    >>> split_at_answer("<start_of_turn>user\\nHi<end_of_turn>\\n<start_of_turn>model\\nWell,")
    ('<start_of_turn>user\\nHi<end_of_turn>\\n<start_of_turn>model\\n', 'Well,')

    Args:
        context: any text.

    Returns:
        `(context, "")` for a context that is not in turns.
    """
    before, header, start = context.rpartition(_ANSWER_HEADER)
    return (before + header, start) if header else (context, "")


def chat_context(history: Sequence[Mapping], add_generation_prompt: bool = True) -> str:
    """A conversation as a context in Gemma's turns.

    Gemma 2 has no system turn, so a system message comes first in the first user turn, after it an empty line.

    Args:
        history: list of `{"role": ..., "content": ...}`; "system" may only be the first.
        add_generation_prompt: whether the model's turn is open and empty. If False, the last message is the
            assistant's, and its content is the start of the answer.

    Raises:
        ValueError: as for `keras_t5gemma.text.chat.format_turns`, or if the history has no such last message.
    """
    messages = list(history)
    if messages and messages[0]["role"] == "system":
        system, *messages = messages
        if not messages or messages[0]["role"] != "user":
            raise ValueError(f"A system message must be followed by the user's. Received: {history!r}.")
        messages[0] = {**messages[0], "content": f"{system['content'].strip()}\n\n{messages[0]['content']}"}
    if add_generation_prompt:
        return format_turns(messages)
    if not messages or messages[-1]["role"] not in ("assistant", "model"):
        raise ValueError(
            f"Without a generation prompt the last message must be the assistant's, the start of the answer. "
            f"Received: {history!r}."
        )
    return format_turns(messages[:-1]) + messages[-1]["content"]


def prompt_inputs(prompts: Sequence[Prompt], tokenizer: T5GemmaTokenizer) -> dict[str, np.ndarray]:
    """The inputs of `generate` and `score` without a preprocessor.

    Args:
        prompts: B prompts.
        tokenizer: a `T5GemmaTokenizer`.

    Returns:
        `encoder_token_ids`, `encoder_padding_mask` [B, S], `decoder_token_ids`, `decoder_padding_mask` [B, T], int32.
    """
    inputs = {}
    starts = [(tokenizer.start_token_id, *prompt.start) for prompt in prompts]
    for side, rows in (("encoder", [prompt.encoder for prompt in prompts]), ("decoder", starts)):
        arrays = pad_rows(rows, max(map(len, rows)), tokenizer.pad_token_id)
        inputs |= zip((f"{side}_token_ids", f"{side}_padding_mask"), arrays, strict=True)
    return inputs
