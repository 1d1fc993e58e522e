"""What the endpoints answer: to OpenAI's own client, what `generate`, `score` and `embed` give."""

import base64
import itertools

import numpy as np
import pytest

import keras_t5gemma as kt

QUESTION = [{"role": "user", "content": "Why is the sky?"}]
TALK = [
    {"role": "user", "content": "knock knock"},
    {"role": "assistant", "content": "who"},
    {"role": "user", "content": "12 apples"},
]
GREEDY = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def chat(client):
    return client.chat.completions.create


@pytest.fixture(scope="module")
def drawn(lm):
    """`generate` with a seed, for a conversation or a text."""
    sampling = kt.T5GemmaSeq2SeqLM(lm.backbone, lm.preprocessor, buckets=lm.buckets)
    sampling.compile(sampler=kt.TopKTopPSampler(temperature=1.0))
    return lambda prompt, seed: sampling.generate(prompt, seed=seed)


def joined(events, index=0):
    parts = [choice.delta.content for event in events for choice in event.choices if choice.index == index]
    return "".join(filter(None, parts))


@pytest.mark.parametrize("messages", [QUESTION, TALK], ids=["question", "talk"])
def test_chat_is_what_generate_answers(chat, lm, messages):
    answer = chat(messages=messages, **GREEDY)
    (choice,) = answer.choices
    assert choice.message.content == lm.generate(messages) != ""
    assert (choice.message.role, choice.index, choice.finish_reason) == ("assistant", 0, "length")
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    prompt = lm.preprocessor.generate_preprocess(messages)["encoder_padding_mask"].sum()
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 15)
    assert answer.usage.total_tokens == prompt + 15


def test_contents_in_parts_are_joined(chat, lm):
    parts = [{"type": "text", "text": "Why is "}, {"type": "text", "text": "the sky?"}]
    answer = chat(messages=[{"role": "user", "content": parts}], **GREEDY)
    assert answer.choices[0].message.content == lm.generate(QUESTION)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_limit_of_tokens_cuts_the_answer(chat, lm, name):
    answer = chat(messages=QUESTION, **{name: 4}, **GREEDY)
    assert answer.choices[0].message.content == lm.generate(QUESTION, max_new_tokens=4)
    assert answer.usage.completion_tokens == 4


def test_choices_have_seeds_one_after_the_other_and_drawing_is_the_default(chat, drawn):
    answer = chat(model="tiny", messages=QUESTION, n=3, seed=5)
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [drawn(QUESTION, 5 + i) for i in range(3)]
    assert len(set(texts)) == 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    random = [chat(model="tiny", messages=QUESTION).choices[0].message.content for _ in range(2)]
    assert random[0] != random[1]


DRAWN = {"temperature": 1.0, "seed": 1}


@pytest.mark.parametrize(
    ("more", "others"),
    [
        ({"temperature": 1.9}, DRAWN),
        ({"top_p": 0.2}, DRAWN),
        ({"top_k": 3}, DRAWN),
        ({"presence_penalty": 2.0}, {"temperature": 0}),
        ({"frequency_penalty": 2.0}, {"temperature": 0}),
        ({"repetition_penalty": 3.0}, {"temperature": 0}),
    ],
    ids=lambda options: next(iter(options)),
)
def test_option_of_sampling_is_that_of_the_batcher(chat, batcher, more, others):
    def answered(**options):
        return chat(model="tiny", messages=QUESTION, extra_body=options).choices[0].message.content

    expected = batcher.submit(QUESTION, **{**others, **more}).result(60).text
    assert answered(**{**others, **more}) == expected != answered(**others)


def test_stop_texts_end_an_answer_and_are_left_out(chat, lm):
    whole = lm.generate(QUESTION)
    stop = whole[len(whole) // 2 :][:2]
    for given in (stop, ["#never#", stop]):
        (choice,) = chat(messages=QUESTION, stop=given, **GREEDY).choices
        assert choice.message.content == whole[: whole.find(stop)]
        assert choice.finish_reason == "stop"


def test_stream_has_the_pieces_of_all_choices(chat, drawn):
    events = list(chat(model="tiny", messages=QUESTION, n=2, seed=5, stream=True))
    assert [joined(events, i) for i in range(2)] == [drawn(QUESTION, 5 + i) for i in range(2)]
    for index in range(2):
        mine = [choice for event in events for choice in event.choices if choice.index == index]
        assert mine[0].delta.role == "assistant"
        assert [choice.finish_reason for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason in ("length", "stop")
        assert len(mine) > 5
    assert len({event.id for event in events}) == 1
    assert {event.object for event in events} == {"chat.completion.chunk"}
    assert all(event.usage is None for event in events)


def test_stream_tells_the_numbers_of_tokens_if_asked(chat):
    *events, last = chat(messages=QUESTION, stream=True, stream_options={"include_usage": True}, **GREEDY)
    assert last.choices == []
    assert last.usage == chat(messages=QUESTION, **GREEDY).usage
    assert all(event.usage is None for event in events)


def test_log_probs_are_those_of_generate_and_bytes_join_to_the_text(chat, lm):
    expected = lm.generate(QUESTION, return_log_probs=True)
    (choice,) = chat(messages=QUESTION, logprobs=True, **GREEDY).choices
    tokens = choice.logprobs.content
    np.testing.assert_allclose([token.logprob for token in tokens], expected["log_probs"][1:], atol=2e-4)
    text = bytes(itertools.chain.from_iterable(token.bytes for token in tokens))
    first, *_ = choice.message.content.split("\N{REPLACEMENT CHARACTER}")  # a byte that is no character
    assert first
    assert text.startswith(first.encode())
    ids = [lm.preprocessor.tokenizer.token_to_id(token.token) for token in tokens]
    assert ids == expected["decoder_token_ids"][1:].tolist()
    assert chat(messages=QUESTION, **GREEDY).choices[0].logprobs is None
    *_, last = chat(messages=QUESTION, logprobs=True, stream=True, **GREEDY)
    same = [(token.token, pytest.approx(token.logprob, abs=2e-4)) for token in tokens]
    assert [(token.token, token.logprob) for token in last.choices[0].logprobs.content] == same


def test_bytes_of_tokens_are_those_of_their_text(lm):
    from keras_t5gemma.serving.http.log_probs import token_bytes

    text = "The quick €5 é\nfox  jumps"
    ids = lm.preprocessor.tokenizer.tokenize(text)
    assert len({lm.preprocessor.tokenizer.id_to_token(i)[:3] for i in ids} & {"<0x"}) == 1
    assert b"".join(token_bytes(lm.preprocessor, int(i)) for i in ids).decode() == text
    assert token_bytes(lm.preprocessor, 1) == b""


def test_completions_of_several_prompts_have_indexes_one_after_the_other(client, drawn, lm):
    prompts = ["Why is the sky?", "knock"]
    answer = client.completions.create(model="tiny", prompt=prompts, n=2, seed=5, max_tokens=15, user="me")
    assert [choice.text for choice in answer.choices] == [drawn(prompt, 5 + i) for prompt in prompts for i in range(2)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    rows = lm.preprocessor.generate_preprocess(prompts)
    assert answer.usage.prompt_tokens == rows["encoder_padding_mask"].sum()
    assert (answer.object, len(answer.choices[0].text) > 0) == ("text_completion", True)


def test_completion_streams_and_has_log_probs_with_offsets(client, lm):
    expected = lm.generate("knock", return_log_probs=True, max_new_tokens=9)
    options = {"prompt": "knock", "max_tokens": 9, "logprobs": 0, **GREEDY}
    (choice,) = client.completions.create(**options).choices
    assert choice.text == expected["text"]
    count = len(choice.logprobs.tokens)
    np.testing.assert_allclose(choice.logprobs.token_logprobs, expected["log_probs"][1 : 1 + count], atol=2e-4)
    assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)
    assert max(choice.logprobs.text_offset) < len(choice.text)
    events = list(client.completions.create(stream=True, **options))
    assert "".join(event.choices[0].text for event in events) == choice.text
    assert events[-1].choices[0].logprobs.tokens == choice.logprobs.tokens
    assert {event.object for event in events} == {"text_completion"}


def test_completion_has_sixteen_tokens_unless_a_slot_has_fewer(client):
    assert client.completions.create(prompt="a", **GREEDY).usage.completion_tokens == 15


@pytest.mark.parametrize("count", [1, 3, 11])
def test_embeddings_are_those_of_embed_with_length_1(client, lm, count):
    texts = [f"{'12 apples ' * (i % 3)}{i}" for i in range(count)]
    vectors = lm.embed(texts)
    expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    answer = client.embeddings.create(model="tiny", input=texts)  # the client asks for base64
    np.testing.assert_allclose([item.embedding for item in answer.data], expected, atol=2e-5)
    assert [item.index for item in answer.data] == list(range(count))
    tokens = lm.preprocessor.generate_preprocess(texts)["encoder_padding_mask"].sum()
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens


def test_embedding_of_one_text_in_both_encodings_and_cut(client, lm):
    whole = lm.embed("knock")
    for encoding in ("float", "base64"):
        (item,) = client.embeddings.create(model="tiny", input="knock", dimensions=7, encoding_format=encoding).data
        is_text = isinstance(item.embedding, str)
        assert is_text == (encoding == "base64")
        vector = np.frombuffer(base64.b64decode(item.embedding), "<f4") if is_text else np.array(item.embedding)
        np.testing.assert_allclose(vector, whole[:7] / np.linalg.norm(whole[:7]), atol=2e-5)


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert model == client.models.retrieve("tiny")
    assert model.id == "tiny"


def test_fields_that_change_no_answer_and_ask_for_nothing_are_accepted(chat, lm):
    answer = chat(
        messages=QUESTION,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        logit_bias={},
        response_format={"type": "text"},
        top_logprobs=0,
        tools=[],
        parallel_tool_calls=True,
        extra_body={"seed": None, "n": None, "functions": None},
        **GREEDY,
    )
    assert answer.choices[0].message.content == lm.generate(QUESTION)
