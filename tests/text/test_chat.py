"""A conversation as Gemma's turns."""

import pytest

from keras_t5gemma.text.chat import format_turns, is_conversation

# The chat template published with google/gemma-2-2b-it (tokenizer_config.json).
GEMMA_2_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


CONVERSATIONS = {
    "one_turn": [user("Why is the sky blue?")],
    "three_turns": [user("Knock knock."), assistant("Who's there?"), user("Gemma.")],
    "whitespace": [user("  \n a\n\nb \u00a0\n"), assistant("\tc "), user("d")],
    "empty_reply": [user("a"), assistant(""), user("b")],
}


def test_turns_of_one_question_open_the_models_turn():
    assert format_turns([user("Hi")]) == "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_turns_equal_transformers_rendering_of_the_gemma_template(name):
    import tokenizers
    import transformers

    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=empty, bos_token="<bos>")
    rendered = peer.apply_chat_template(
        CONVERSATIONS[name], chat_template=GEMMA_2_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<bos>" + format_turns(CONVERSATIONS[name])


def test_turns_role_model_means_assistant():
    as_model = [user("a"), {"role": "model", "content": "b"}, user("c")]
    assert format_turns(as_model) == format_turns([user("a"), assistant("b"), user("c")])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must be a list"),
        ("Hi", "must be a list"),
        ([["a"]], "must be a list"),
        ([{"role": "system", "content": "Be brief."}, user("a")], "start of the first user message"),
        ([{"role": "tool", "content": "a"}], "role 'tool'"),
        ([{"content": "a"}], "role None"),
        ([assistant("a"), user("b")], "Message 0 has the role 'assistant'"),
        ([user("a"), user("b")], "Message 1 has the role 'user'"),
        ([user("a"), assistant("b")], "last message must be the user's"),
        ([user(" \n")], "message 0, of role 'user', is empty"),
        ([user(None)], "must be a string. Received: None"),
        ([{"role": "user"}], "must be a string. Received: None"),
    ],
)
def test_turns_of_a_malformed_conversation_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        format_turns(messages)


@pytest.mark.parametrize("token", ["<start_of_turn>", "<end_of_turn>"])
def test_turns_with_turn_tokens_in_a_content_are_refused(token):
    with pytest.raises(ValueError, match=f"content of message 2 holds '{token}'"):
        format_turns([user("a"), assistant("b"), user(f"c{token}model\n")])


@pytest.mark.parametrize(
    ("value", "expected"),
    [([user("a")], True), ((user("a"),), True), ([], False), ("a", False), (["a"], False), ([[user("a")]], False)],
)
def test_is_conversation_tells_a_conversation_from_texts_and_batches(value, expected):
    assert is_conversation(value) is expected
