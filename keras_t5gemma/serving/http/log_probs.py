"""Log-probabilities of an answer's tokens, in the two shapes of OpenAI's API."""

import re

from keras_t5gemma.serving.handles import Answer
from keras_t5gemma.text.whole_characters import TextStream

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def token_bytes(preprocessor, token_id: int) -> bytes:
    """What a token adds to the text: a part of a character for tokens that are bytes, nothing for special tokens.

    Args:
        preprocessor: a `T5GemmaSeq2SeqLMPreprocessor`.
        token_id: the token.
    """
    if not preprocessor.has_text(token_id):
        return b""
    piece = preprocessor.tokenizer.id_to_token(token_id)
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()


def token_name(preprocessor, token_id: int) -> str:
    """A token as text: its own, or the name of a special token or of a byte."""
    tokenizer = preprocessor.tokenizer
    if token_id >= tokenizer.vocabulary_size():
        return f"<{token_id}>"
    return tokenizer.id_to_token(token_id).replace(_SPACE, " ")


def for_chat(preprocessor, answer: Answer) -> dict:
    """The `logprobs` of a choice of a chat. The bytes of all tokens join to those of the text before stop strings."""
    assert answer.log_probs is not None
    pairs = zip(answer.token_ids.tolist(), answer.log_probs.tolist(), strict=True)
    content = [
        {
            "token": token_name(preprocessor, token_id),
            "bytes": list(token_bytes(preprocessor, token_id)),
            "logprob": log_prob,
            "top_logprobs": [],
        }
        for token_id, log_prob in pairs
    ]
    return {"content": content, "refusal": None}


def for_completion(preprocessor, answer: Answer) -> dict:
    """The `logprobs` of a choice of a completion; offsets count characters of the choice's text."""
    assert answer.log_probs is not None
    ids = answer.token_ids.tolist()
    # As a stream gives them: a character in bytes comes with its last byte.
    stream, offsets, length = TextStream(preprocessor.tokenizer.detokenize), [], 0
    for token_id in ids:
        offsets.append(length)
        length += len(stream.add([token_id])) if preprocessor.has_text(token_id) else 0
    return {
        "tokens": [token_name(preprocessor, token_id) for token_id in ids],
        "token_logprobs": answer.log_probs.tolist(),
        "top_logprobs": None,
        "text_offset": offsets,
    }
