"""Contexts as ids: which part the encoder reads, which part the decoder starts with, and what is cut."""

import pytest

from keras_t5gemma.evaluation.prompts import ContextReader, chat_context, split_at_answer

USER = "<start_of_turn>user\n{}<end_of_turn>\n"
MODEL = "<start_of_turn>model\n{}<end_of_turn>\n"
OPEN = "<start_of_turn>model\n"


@pytest.fixture
def reader(tokenizer):
    return ContextReader(tokenizer, 24, "left")


def text_of(tokenizer, ids):
    return tokenizer.detokenize(list(ids))


def test_context_is_the_texts_own_ids_without_bos(reader, tokenizer):
    prompt = reader.prompt("Why is the sky blue?")
    assert prompt.encoder == tuple(tokenizer("Why is the sky blue?"))
    assert (prompt.start, prompt.is_cut) == ((), False)


def test_empty_context_is_a_bos(reader, tokenizer):
    assert reader.prompt("").encoder == (tokenizer.start_token_id,)
    assert reader.pair("\n", "Why")[0].encoder == (tokenizer.start_token_id,)


@pytest.mark.parametrize(
    ("context", "continuation", "read", "target"),
    [
        ("Why is", " the sky", "Why is", " the sky"),
        ("Why is ", "the sky", "Why is", " the sky"),
        ("Why?\n\n", "The sky", "Why?", "\n\nThe sky"),
        ("", " the", None, " the"),
    ],
)
def test_space_at_the_end_of_a_context_starts_the_continuation(reader, tokenizer, context, continuation, read, target):
    prompt, ids = reader.pair(context, continuation)
    assert ids == tuple(tokenizer(target))
    assert prompt.encoder == (tuple(tokenizer(read)) if read else (tokenizer.start_token_id,))


def test_context_in_turns_is_split_where_the_model_answers(reader, tokenizer):
    turns = USER.format("Why?") + OPEN
    assert split_at_answer(turns + "Because") == (turns, "Because")
    prompt, target = reader.pair(turns + "Because ", "air")
    assert prompt.encoder == tuple(tokenizer(turns))
    assert (prompt.start, target) == (tuple(tokenizer("Because")), tuple(tokenizer(" air")))
    assert reader.pair(turns, "air")[0] == reader.prompt(turns)


def test_continuation_without_text_is_refused(reader):
    with pytest.raises(ValueError, match="A continuation is empty, after the context that ends with 'Why'"):
        reader.pair("Why", "")


@pytest.mark.parametrize(("side", "kept"), [("left", slice(-24, None)), ("right", slice(24))])
def test_long_context_is_cut_on_one_side(tokenizer, side, kept):
    text = "The quick brown fox jumps over the lazy dog. " * 4
    prompt = ContextReader(tokenizer, 24, side).prompt(text)
    assert prompt.encoder == tuple(tokenizer(text))[kept]
    assert prompt.is_cut


def test_long_context_is_an_error_if_it_must_not_be_cut(tokenizer):
    with pytest.raises(ValueError, match=r"has \d+ tokens, more than max_length=2\. Raise it"):
        ContextReader(tokenizer, 2, None).prompt("The quick brown fox jumps over the lazy dog.")


def test_long_conversation_loses_its_oldest_turns(tokenizer):
    last = USER.format("Why is the sky blue?") + OPEN
    context = USER.format("Knock knock.") + MODEL.format("Who is there?") + last
    size = len(tokenizer(last))
    assert ContextReader(tokenizer, size + 2, "left").prompt(context).encoder == tuple(tokenizer(last))
    cut = text_of(tokenizer, ContextReader(tokenizer, size - 3, "left").prompt(context).encoder)
    assert cut.startswith("<start_of_turn>user\n")
    assert cut.endswith("blue?<end_of_turn>\n<start_of_turn>model\n")
    with pytest.raises(ValueError, match="max_length=4 has no room"):
        ContextReader(tokenizer, 4, "left").prompt(context)


def test_system_message_joins_the_first_user_turn():
    history = [{"role": "system", "content": "Be short. "}, {"role": "user", "content": "Why?"}]
    assert chat_context(history) == USER.format("Be short.\n\nWhy?") + OPEN
    with pytest.raises(ValueError, match="must be followed by the user's"):
        chat_context(history[:1])


def test_start_of_an_answer_follows_the_open_turn_unchanged():
    history = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Well, "}]
    assert chat_context(history, add_generation_prompt=False) == USER.format("Why?") + OPEN + "Well, "
    with pytest.raises(ValueError, match="the last message must be the assistant's"):
        chat_context(history[:1], add_generation_prompt=False)
