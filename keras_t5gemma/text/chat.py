"""Gemma's turns: formats a conversation as the string that an instruction-tuned model was trained on.

    <start_of_turn>user
    Knock knock.<end_of_turn>
    <start_of_turn>model
    Who's there?<end_of_turn>
    <start_of_turn>user
    Gemma.<end_of_turn>
    <start_of_turn>model
                              <- the decoder answers from here, and closes with <end_of_turn><eos>

Source: "Gemma 2" (arXiv 2408.00118), table of formatting control tokens, and the chat template published with
google/gemma-2-2b-it. In T5Gemma the encoder reads all of this, without `<bos>`; the decoder starts from `<bos>`.
"""

from collections.abc import Mapping, Sequence
from typing import TypeGuard

from keras_t5gemma.suggestions import did_you_mean

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
# The start of a user's turn, and the end of every formatted prompt.
USER_HEADER = f"{START_OF_TURN}user\n"
ANSWER_FOOTER = f"{END_OF_TURN}\n{START_OF_TURN}model\n"
# Most chat data says "assistant"; "model" is Gemma's own word.
_GEMMA_ROLES = {"user": "user", "assistant": "model", "model": "model"}


def is_conversation(value: object) -> TypeGuard[Sequence[Mapping]]:
    """Whether a value is one conversation, a non-empty list of messages, rather than a string or a batch."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(part, Mapping) for part in value)


def format_turns(messages: Sequence[Mapping]) -> str:
    r"""Formats a conversation as the encoder's text.

    Whitespace around contents is stripped, as in Gemma's own template. Turn tokens inside a content are refused: the
    tokenizer would read them as real turns, so a user could speak for the model, and text that is formatted already
    would be formatted twice.

    >>> format_turns([{"role": "user", "content": "Knock knock."}])
    '<start_of_turn>user\nKnock knock.<end_of_turn>\n<start_of_turn>model\n'

    Args:
        messages: list of `{"role": ..., "content": ...}`. "user" and "assistant" (or "model", a synonym) alternate,
            and the first and the last message are the user's.

    Returns:
        A string that ends with `<start_of_turn>model` and a newline.

    Raises:
        ValueError: if there is no message, a role is unknown or out of turn, there is a system message, the last
            message is not the user's, or a content is not a string, an empty question, or holds turn tokens.
    """
    if not is_conversation(messages):
        raise ValueError(f'`messages` must be a list of {{"role": ..., "content": ...}}. Received: {messages!r}.')
    turns, role = [], None
    for index, message in enumerate(messages):
        role = _role(index, message)
        content = message.get("content")
        if not isinstance(content, str):
            raise ValueError(f"The content of message {index} must be a string. Received: {content!r}.")
        if role == "user" and not content.strip():
            raise ValueError(f"The content of message {index}, of role 'user', is empty.")
        check_no_turn_tokens(content, f"the content of message {index}")
        turns.append(f"{START_OF_TURN}{role}\n{content.strip()}{END_OF_TURN}\n")
    if role != "user":
        raise ValueError(
            f"The last message must be the user's, for the model to answer. Received: {len(messages)} messages, the "
            f"last of role {messages[-1]['role']!r}."
        )
    return "".join(turns) + f"{START_OF_TURN}model\n"


def check_no_turn_tokens(text: str, what: str) -> None:
    """Refuses text that holds Gemma's turn tokens.

    Raises:
        ValueError: if the text holds one. The message starts with `what`, a name of the text.
    """
    for token in (START_OF_TURN, END_OF_TURN):
        if token in text:
            raise ValueError(
                f"{what[0].upper()}{what[1:]} holds {token!r}, which would be read as a real turn. Turns are added "
                f"for you: pass plain text or a list of messages, or use chat=False for text in turns already."
            )


def _role(index: int, message: Mapping) -> str:
    """Checks the role of a message at its index in the conversation, and returns Gemma's name for the role."""
    role = message.get("role")
    if role == "system":
        raise ValueError(
            f"Message {index} has the role 'system', which Gemma 2 was not trained with. Put the instructions at the "
            f"start of the first user message instead."
        )
    if role not in _GEMMA_ROLES:
        raise ValueError(
            f"Message {index} has the role {role!r}. Known roles: {', '.join(_GEMMA_ROLES)}."
            f"{did_you_mean(role, _GEMMA_ROLES)}"
        )
    if (_GEMMA_ROLES[role] == "user") != (index % 2 == 0):
        raise ValueError(
            f"Message {index} has the role {role!r}, but turns must go user, assistant, user, ..., starting and "
            f"ending with the user."
        )
    return _GEMMA_ROLES[role]
