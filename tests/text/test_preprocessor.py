"""What the model is fed by `fit` and by `generate`, token for token, and what comes back as text."""

import keras
import numpy as np
import pytest

from keras_t5gemma.text.chat import format_turns
from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer

PAD, EOS, BOS, END_OF_TURN = 0, 1, 2, 107
PROMPT = "Why is the sky blue?"
CONVERSATION = [
    {"role": "user", "content": "Knock knock."},
    {"role": "assistant", "content": "Who is there?"},
    {"role": "user", "content": "The fox."},
]


@pytest.fixture
def make(tokenizer):
    return lambda *args, **kwargs: T5GemmaSeq2SeqLMPreprocessor(tokenizer, *args, **kwargs)


@pytest.fixture
def ids(tokenizer):
    return lambda text: np.array(tokenizer(text)).tolist()


def unpadded(inputs, side, row=0):
    token_ids, mask = inputs[f"{side}_token_ids"], inputs[f"{side}_padding_mask"]
    return np.atleast_2d(token_ids)[row][np.atleast_2d(mask)[row] == 1].tolist()


# ----- fit


def test_fit_closes_the_answer_with_eos_and_shifts_labels_by_one(make, ids):
    x, y, weights = make(32, 8)({"encoder_text": [PROMPT, "a"], "decoder_text": ["air", ""]})
    a, b, c = ids("air")
    assert x["encoder_token_ids"].shape == x["encoder_padding_mask"].shape == (2, 32)
    assert unpadded(x, "encoder", 0) == ids(PROMPT)
    assert unpadded(x, "encoder", 1) == ids("a")
    assert x["decoder_token_ids"].tolist() == [[BOS, a, b, c, EOS, 0, 0, 0], [BOS, EOS, 0, 0, 0, 0, 0, 0]]
    assert x["decoder_padding_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert y.tolist() == [[a, b, c, EOS, 0, 0, 0, 0], [EOS, 0, 0, 0, 0, 0, 0, 0]]
    assert weights.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]


def test_fit_with_chat_puts_the_prompt_in_turns_and_closes_the_answer_twice(make, ids):
    x, y, _ = make(32, 8, chat=True)({"encoder_text": ["Why?"], "decoder_text": ["a"]})
    assert unpadded(x, "encoder") == ids("<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n")
    assert y[0].tolist() == [*ids("a"), END_OF_TURN, EOS, 0, 0, 0, 0, 0][:8]


def test_fit_gives_numpy_arrays_whatever_the_backend(make):
    x, y, weights = make()({"encoder_text": ["a"], "decoder_text": ["b"]})
    assert all(isinstance(array, np.ndarray) for array in (*x.values(), y, weights))
    assert {str(array.dtype) for array in (*x.values(), y)} == {"int32"}
    assert weights.dtype == "float32"


@pytest.mark.parametrize(
    "wrap",
    [tuple, np.array, lambda texts: np.array(texts, dtype=object), lambda texts: [text.encode() for text in texts]],
)
def test_fit_takes_any_kind_of_list_of_texts(make, wrap):
    expected, *_ = make(32, 8)({"encoder_text": [PROMPT, "é"], "decoder_text": ["a", "b"]})
    x, *_ = make(32, 8)({"encoder_text": wrap([PROMPT, "é"]), "decoder_text": wrap(["a", "b"])})
    assert all(np.array_equal(x[name], expected[name]) for name in expected)


def test_fit_of_single_strings_has_no_batch_dimension(make):
    single, y, weights = make(32, 8)({"encoder_text": PROMPT, "decoder_text": "a"})
    batch, *_ = make(32, 8)({"encoder_text": [PROMPT], "decoder_text": ["a"]})
    assert y.shape == weights.shape == (8,)
    assert all(np.array_equal(single[name], batch[name][0]) for name in batch)


def test_fit_lengths_can_be_given_for_one_call(make):
    x, y, _ = make(32, 8)(
        {"encoder_text": ["a"], "decoder_text": ["b"]}, encoder_sequence_length=4, decoder_sequence_length=5
    )
    assert x["encoder_token_ids"].shape == (1, 4)
    assert x["decoder_token_ids"].shape == y.shape == (1, 5)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, "  padded \n", "a\n\nb", "12 漢"])
def test_fit_and_generate_feed_the_encoder_the_same_ids(make, chat, prompt):
    preprocessor = make(64, 8, chat=chat)
    x, *_ = preprocessor({"encoder_text": [prompt], "decoder_text": ["a"]})
    assert unpadded(x, "encoder") == unpadded(preprocessor.generate_preprocess([prompt]), "encoder")
    assert BOS not in unpadded(x, "encoder")
    assert EOS not in unpadded(x, "encoder")


# ----- generate


def test_generate_starts_the_decoder_from_bos_padded_to_max_length(make, ids):
    inputs = make(32, 8).generate_preprocess([PROMPT, "a"], sequence_length=6)
    assert inputs["decoder_token_ids"].tolist() == [[BOS, 0, 0, 0, 0, 0]] * 2
    assert inputs["decoder_padding_mask"].tolist() == [[1, 0, 0, 0, 0, 0]] * 2
    assert [unpadded(inputs, "encoder", row) for row in (0, 1)] == [ids(PROMPT), ids("a")]
    assert {str(array.dtype) for array in inputs.values()} == {"int32"}


def test_generate_without_max_length_takes_the_decoder_sequence_length(make):
    assert make(32, 8).generate_preprocess(["a"])["decoder_token_ids"].shape == (1, 8)


def test_generate_continues_the_start_of_an_answer(make, ids):
    inputs = make(32, 8).generate_preprocess({"encoder_text": ["a", "b"], "decoder_text": ["The ", ""]})
    assert unpadded(inputs, "decoder", 0) == [BOS, *ids("The ")]
    assert unpadded(inputs, "decoder", 1) == [BOS]


@pytest.mark.parametrize("missing", [{}, {"decoder_text": None}])
def test_generate_of_a_dict_without_decoder_text_starts_from_bos(make, missing):
    assert unpadded(make().generate_preprocess({"encoder_text": ["a"], **missing}), "decoder") == [BOS]


def test_generate_pads_on_the_right_to_the_longest_prompt(make):
    preprocessor = make(512, 8)
    inputs = preprocessor.generate_preprocess(["a" * 17, "a"])
    assert inputs["encoder_padding_mask"].tolist() == [[1] * 17, [1] + [0] * 16]
    assert preprocessor.generate_preprocess(["a"])["encoder_token_ids"].shape == (1, 1)


def test_generate_of_a_single_prompt_has_no_batch_dimension(make):
    inputs = make(32, 8, chat=True).generate_preprocess(CONVERSATION[:1])
    assert {array.ndim for array in inputs.values()} == {1}


def test_generate_takes_conversations_and_strings_in_one_batch(make, ids):
    inputs = make(128, 8, chat=True).generate_preprocess([CONVERSATION, "Hi"])
    assert unpadded(inputs, "encoder", 0) == ids(format_turns(CONVERSATION))
    assert unpadded(inputs, "encoder", 1) == ids(format_turns([{"role": "user", "content": "Hi"}]))


# ----- back to text


@pytest.mark.parametrize("kind", [np.array, keras.ops.convert_to_tensor])
def test_postprocess_leaves_out_padding_special_and_turn_tokens(make, ids, kind):
    row = [BOS, *ids("The sky"), END_OF_TURN, EOS, PAD]
    inputs = {"decoder_token_ids": kind(np.array([row])), "decoder_padding_mask": kind(np.ones((1, len(row)), bool))}
    assert make().generate_postprocess(inputs) == ["The sky"]


def test_postprocess_keeps_what_the_mask_shows(make, ids):
    row = [BOS, *ids("ab"), *ids(" cd"), *ids("x")]
    start, shown = 1 + len(ids("ab")), len(ids(" cd"))
    mask = [start <= i < start + shown for i in range(len(row))]
    inputs = {"decoder_token_ids": np.array(row), "decoder_padding_mask": np.array(mask)}
    assert make().generate_postprocess(inputs) == " cd"


def test_postprocess_keeps_sentinels_and_leaves_out_ids_the_tokenizer_lacks(make, tokenizer):
    row = np.array([[9, tokenizer.vocabulary_size()]])
    inputs = {"decoder_token_ids": row, "decoder_padding_mask": np.ones_like(row)}
    assert make().generate_postprocess(inputs) == ["<unused2>"]


def test_postprocess_reads_back_what_fit_was_given(make):
    x, *_ = make(32, 32, chat=True)({"encoder_text": ["a", "b"], "decoder_text": ["  A\n\nb ", ""]})
    assert make().generate_postprocess(x) == ["  A\n\nb ", ""]


# ----- too long


def test_over_long_prompt_is_refused_with_lengths_and_remedies(make, ids):
    size = len(ids(PROMPT))
    message = rf"`encoder_text`\[1\] takes {size} tokens, more than encoder_sequence_length=6\. .*truncate="
    with pytest.raises(ValueError, match=message):
        make(6, 8).generate_preprocess(["a", PROMPT])
    with pytest.raises(ValueError, match=message):
        make(6, 8)({"encoder_text": ["a", PROMPT], "decoder_text": ["a", "b"]})


def test_decoder_text_that_just_fits_is_taken_and_one_more_token_refused(make):
    preprocessor = make(8, 4)
    _, y, weights = preprocessor({"encoder_text": ["a"], "decoder_text": ["aaa"]})
    assert y[0, -1] == EOS
    assert weights.all()
    with pytest.raises(ValueError, match=r"`decoder_text`\[0\] takes 5 tokens, more than decoder_sequence_length=4"):
        preprocessor({"encoder_text": ["a"], "decoder_text": ["aaaa"]})
    assert unpadded(preprocessor.generate_preprocess({"encoder_text": "a", "decoder_text": "aaa"}), "decoder")[0] == BOS
    with pytest.raises(ValueError, match=r"`decoder_text` takes 5 tokens, more than `max_length`"):
        preprocessor.generate_preprocess({"encoder_text": "a", "decoder_text": "aaaa"})


@pytest.mark.parametrize(("side", "kept"), [("right", slice(0, 4)), ("left", slice(-4, None))])
def test_truncation_keeps_the_named_sides_opposite(make, ids, side, kept):
    preprocessor = make(4, 4, truncate=side)
    x, *_ = preprocessor({"encoder_text": [PROMPT], "decoder_text": ["a"]})
    assert unpadded(x, "encoder") == ids(PROMPT)[kept]
    assert unpadded(preprocessor.generate_preprocess(PROMPT), "encoder") == ids(PROMPT)[kept]


def test_truncated_answer_keeps_its_end_only_when_cut_on_the_left(make, ids):
    text = {"encoder_text": ["a"], "decoder_text": [PROMPT]}
    _, right, _ = make(4, 4, truncate="right")(text)
    _, left, _ = make(4, 4, truncate="left")(text)
    assert right[0].tolist() == ids(PROMPT)[:4]
    assert left[0].tolist() == [*ids(PROMPT)[-3:], EOS]


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_truncated_start_of_an_answer_still_follows_bos(make, ids, side, length):
    start = {"encoder_text": "a", "decoder_text": PROMPT}
    kept = unpadded(make(4, length, truncate=side).generate_preprocess(start), "decoder")
    room = length - 1
    assert kept == [BOS, *(ids(PROMPT)[:room] if side == "right" else ids(PROMPT)[len(ids(PROMPT)) - room :])]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_with_chat_cuts_the_text_and_keeps_its_turn(make, ids, side):
    header, footer = ids("<start_of_turn>user\n"), ids("<end_of_turn>\n<start_of_turn>model\n")
    length = len(header) + len(footer) + 5
    kept = unpadded(make(length, 8, chat=True, truncate=side).generate_preprocess(PROMPT), "encoder")
    assert kept == header + (ids(PROMPT)[:5] if side == "right" else ids(PROMPT)[-5:]) + footer


def test_truncation_on_the_left_drops_a_conversations_oldest_turns_first(make, ids):
    last = ids(format_turns(CONVERSATION[2:]))
    preprocessor = make(len(last) + 3, 8, chat=True, truncate="left")
    assert unpadded(preprocessor.generate_preprocess(CONVERSATION), "encoder") == last


def test_truncation_to_less_than_the_turns_themselves_is_refused(make):
    with pytest.raises(ValueError, match="its turns alone take"):
        make(8, 8, chat=True, truncate="left").generate_preprocess(PROMPT)


# ----- bad input


@pytest.mark.parametrize(("chat", "empty"), [(False, ""), (True, ""), (True, " \n")])
def test_empty_prompt_is_refused(make, chat, empty):
    with pytest.raises(ValueError, match=r"`encoder_text`\[1\] is empty"):
        make(chat=chat).generate_preprocess(["a", empty])
    with pytest.raises(ValueError, match="`encoder_text` is empty"):
        make(chat=chat)({"encoder_text": empty, "decoder_text": "a"})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([], "empty list"),
        ([3], r"`encoder_text`\[0\] must be text. Received: 3"),
        (None, "`encoder_text` must be text. Received: None"),
        ([["a"]], r"must be text. Received: \['a'\]"),
        ({"prompt": "a"}, r"The keys are .* Received: \['prompt'\]"),
        ({"encoder_text": "a", "decoder": "b"}, r"Received: \['decoder', 'encoder_text'\]"),
        ({"encoder_text": ["a"], "decoder_text": [1]}, r"`decoder_text`\[0\] must be text. Received: 1"),
        ({"encoder_text": ["a", "b"], "decoder_text": ["c"]}, "must match. Received: 2 and 1"),
        ({"encoder_text": ["a", "b"], "decoder_text": "c"}, "must match. Received: 2 and a single one"),
        (CONVERSATION, "`encoder_text` is a conversation, which needs `chat=True`"),
    ],
)
def test_generate_of_anything_but_prompts_is_refused(make, x, message):
    with pytest.raises(ValueError, match=message):
        make().generate_preprocess(x)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (({"encoder_text": ["a"]},), 'has no "decoder_text"'),
        ((["a"],), 'has no "decoder_text"'),
        (({"encoder_text": ["a"], "decoder_text": ["b"]}, ["c"]), "`y` must be None"),
    ],
)
def test_fit_of_anything_but_pairs_is_refused(make, args, message):
    with pytest.raises(ValueError, match=message):
        make()(*args)


@pytest.mark.parametrize("key", ["encoder_text", "decoder_text"])
def test_chat_refuses_text_that_is_in_turns_already(make, key):
    text = {"encoder_text": ["a"], "decoder_text": ["b"]} | {key: ["a<end_of_turn>"]}
    with pytest.raises(ValueError, match=rf"`{key}`\[0\] holds '<end_of_turn>'"):
        make(chat=True)(text)


def test_malformed_conversation_is_refused_with_its_place_in_the_batch(make):
    with pytest.raises(ValueError, match=r"`encoder_text`\[1\]: Message 0 has the role 'system'"):
        make(chat=True).generate_preprocess(["a", [{"role": "system", "content": "b"}]])


@pytest.mark.parametrize(
    "arguments",
    [
        {"encoder_sequence_length": 0},
        {"decoder_sequence_length": 1.5},
        {"decoder_sequence_length": True},
        {"chat": "yes"},
        {"truncate": True},
    ],
)
def test_option_out_of_range_is_refused(make, arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be"):
        make(**arguments)


def test_length_of_one_call_out_of_range_is_refused(make):
    with pytest.raises(ValueError, match="`decoder_sequence_length` must be a positive integer"):
        make().generate_preprocess("a", sequence_length=0)


@pytest.mark.parametrize("options", [{"add_bos": True}, {"add_eos": True}, {"sequence_length": 9}])
def test_tokenizer_that_adds_tokens_is_refused(model_file, options):
    with pytest.raises(ValueError, match="must neither add tokens nor pad"):
        T5GemmaSeq2SeqLMPreprocessor(T5GemmaTokenizer(proto=model_file, **options))


def test_tokenizer_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="must be a T5GemmaTokenizer"):
        T5GemmaSeq2SeqLMPreprocessor("tokenizer.model")
