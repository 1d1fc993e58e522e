"""Pairs and chats to batches with loss on the answers alone."""

import json

import grain
import numpy as np
import pytest
from helpers.tiny_tokenizer import train_tiny_tokenizer

from keras_t5gemma.data.pipelines.supervised import supervised_dataset
from keras_t5gemma.data.sources.open import text_source
from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer

PAIRS = [(f"question {'why ' * (i % 7)}{i}", f"answer {'since ' * (i % 5)}{i}") for i in range(40)]
CHAT = [
    {"role": "user", "content": "Knock knock."},
    {"role": "assistant", "content": "Who is there?"},
    {"role": "user", "content": "Gemma."},
    {"role": "assistant", "content": "Gemma who?"},
]


def letters(text):
    return [300 + byte for byte in text.encode()]


def words(ids):
    return bytes(int(i) - 300 for i in ids if i >= 300).decode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return T5GemmaTokenizer(proto=train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))


@pytest.fixture(scope="module")
def preprocessor(tokenizer):
    return T5GemmaSeq2SeqLMPreprocessor(tokenizer, 96, 48)


@pytest.fixture(scope="module")
def chat_preprocessor(tokenizer):
    return T5GemmaSeq2SeqLMPreprocessor(tokenizer, 128, 64, chat=True)


def segments(data):
    """`(inputs, decoder inputs, labels)` of each example in the batches."""
    for x, y, weight in data:
        assert ((x["decoder_padding_mask"] > 0) == (weight == 1)).all()
        for row in range(len(y)):
            encoder, decoder = x["encoder_padding_mask"][row], x["decoder_padding_mask"][row]
            for segment in range(1, decoder.max() + 1):
                yield (
                    x["encoder_token_ids"][row][encoder == segment].tolist(),
                    x["decoder_token_ids"][row][decoder == segment].tolist(),
                    y[row][decoder == segment].tolist(),
                )


def test_pairs_with_a_tokenizer_have_weight_on_the_closed_target_alone():
    data = supervised_dataset(
        [("ab", "xyz")], letters, batch_size=1, encoder_length=4, decoder_length=5, shuffle=False, num_epochs=1
    )
    ((x, y, sample_weight),) = data
    a, b, x_, y_, z = (300 + ord(letter) for letter in "abxyz")
    assert {name: array.tolist() for name, array in x.items()} == {
        "encoder_token_ids": [[a, b, 0, 0]],
        "encoder_padding_mask": [[1, 1, 0, 0]],
        "decoder_token_ids": [[2, x_, y_, z, 0]],
        "decoder_padding_mask": [[1, 1, 1, 1, 0]],
    }
    assert y.tolist() == [[x_, y_, z, 1, 0]]
    assert sample_weight.tolist() == [[1, 1, 1, 1, 0]]


def test_pairs_with_a_preprocessor_are_its_own_arrays_wherever_something_is_learned(preprocessor):
    data = supervised_dataset(PAIRS, preprocessor, batch_size=4, shuffle=False, num_epochs=1)
    for number, (x, y, weight) in enumerate(data):
        prompts, answers = zip(*PAIRS[4 * number : 4 * number + 4], strict=True)
        expected = preprocessor({"encoder_text": list(prompts), "decoder_text": list(answers)})
        for name in ("encoder_token_ids", "encoder_padding_mask"):
            np.testing.assert_array_equal(x[name], expected[0][name])
        np.testing.assert_array_equal(y, expected[1])
        np.testing.assert_array_equal(weight, expected[2])
        # The preprocessor's decoder reads the closing <eos> too, behind all that has weight.
        for name in ("decoder_token_ids", "decoder_padding_mask"):
            np.testing.assert_array_equal(x[name], expected[0][name] * weight.astype(int))


def test_a_chats_last_answer_is_learned_and_all_before_it_read(chat_preprocessor, tokenizer):
    data = supervised_dataset([CHAT], chat_preprocessor, batch_size=1, num_epochs=1)
    ((inputs, decoder_ids, labels),) = segments(data)
    assert tokenizer.detokenize(inputs) == (
        "<start_of_turn>user\nKnock knock.<end_of_turn>\n<start_of_turn>model\nWho is there?<end_of_turn>\n"
        "<start_of_turn>user\nGemma.<end_of_turn>\n<start_of_turn>model\n"
    )
    assert tokenizer.detokenize(labels[:-2]) == "Gemma who?"
    assert labels[-2:] == [tokenizer.end_token2_id, tokenizer.end_token_id]
    assert decoder_ids == [2, *labels[:-1]]


def test_all_answers_of_a_chat_are_an_example_each_of_what_was_said_before(chat_preprocessor, tokenizer):
    rows = [{"messages": CHAT}, CHAT[:2]]
    data = supervised_dataset(rows, chat_preprocessor, batch_size=1, num_epochs=1, answers="all", shuffle=False)
    found = [(inputs, tokenizer.detokenize(labels[:-2])) for inputs, _, labels in segments(data)]
    assert [answer for _, answer in found] == ["Who is there?", "Gemma who?", "Who is there?"]
    assert found[0] == found[2]
    assert found[1][0][: len(found[0][0])] == found[0][0]


def test_packed_pairs_are_the_pairs_and_fill_the_rows():
    options = {"batch_size": 2, "encoder_length": 100, "decoder_length": 100, "num_epochs": 3, "seed": 1}
    alone = list(segments(supervised_dataset(PAIRS, letters, **options)))
    packed = list(segments(supervised_dataset(PAIRS, letters, pack=True, **options)))
    assert len(alone) == 120
    # The last batch, were it smaller, is left out.
    assert len(packed) > 110
    assert {words(row[0]) for row in packed} == {pair[0] for pair in PAIRS}
    assert {(words(row[0]), words(row[2])) for row in packed} <= set(PAIRS)
    rows = [x for x, _, _ in supervised_dataset(PAIRS, letters, pack=True, **options)]
    assert np.mean([(x["encoder_padding_mask"] > 0).mean() for x in rows]) > 0.9


def test_rows_come_as_pairs_fields_columns_files_and_grain_datasets(tmp_path):
    expected = sorted((words(row[0]), words(row[2])) for row in segments(made(PAIRS)))
    assert expected == sorted(PAIRS)
    named = [{"encoder_text": question, "decoder_text": answer} for question, answer in PAIRS]
    columns = {"encoder_text": [pair[0] for pair in PAIRS], "decoder_text": [pair[1] for pair in PAIRS]}
    other = [{"question": question, "answer": answer, "id": 5} for question, answer in PAIRS]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, other)), encoding="utf-8")
    fields = {"fields": ("question", "answer")}
    for data in (
        made(named),
        made(columns),
        made(other, **fields),
        made(grain.MapDataset.source(other), **fields),
        made(text_source(path, field=None), **fields),
        made(iter(PAIRS)),
    ):
        assert sorted((words(row[0]), words(row[2])) for row in segments(data)) == expected


def made(rows, **options):
    return supervised_dataset(
        rows, letters, batch_size=1, encoder_length=64, decoder_length=64, num_epochs=1, **options
    )


def test_rows_are_shuffled_anew_each_epoch_unless_they_are_not_to_be():
    def order(epochs, **options):
        data = supervised_dataset(
            PAIRS, letters, batch_size=1, encoder_length=64, decoder_length=64, num_epochs=epochs, **options
        )
        return [words(row[0]) for row in segments(data)]

    questions = [pair[0] for pair in PAIRS]
    assert order(1, shuffle=False) == questions
    twice = order(2)
    assert sorted(twice[:40]) == sorted(twice[40:]) == sorted(questions)
    assert twice[:40] != twice[40:]
    assert order(2) == twice
    assert order(2, seed=1) != twice


def test_position_in_pairs_is_saved_as_json_and_gone_on_from():
    def make():
        return supervised_dataset(
            PAIRS, letters, batch_size=1, encoder_length=64, decoder_length=64, pack=True, pack_buffer=15
        )

    iterator = iter(make())
    for _ in range(20):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator)[1].tolist() for _ in range(20)]
    restored = iter(make())
    restored.set_state(state)
    assert [next(restored)[1].tolist() for _ in range(20)] == expected


@pytest.mark.slow
def test_pairs_tokenized_by_workers_are_the_same(preprocessor):
    options = {"batch_size": 4, "num_epochs": 1, "pack": True}
    ours = [y.tolist() for _, y, _ in supervised_dataset(PAIRS, preprocessor, **options)]
    theirs = [y.tolist() for _, y, _ in supervised_dataset(PAIRS, preprocessor, num_workers=2, **options)]
    assert theirs == ours


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("one string", r"must be \(input, target\), have fields, or be a conversation. The row: 'one string'"),
        (("a", "b", "c"), "The row: "),
        ({"question": "a"}, "lacks 'encoder_text' and 'decoder_text'; it has question"),
        (("a", 5), "The target must be a string"),
        (("", "b"), "The input is empty"),
        ((CHAT[:1], "b"), "`chat=True`"),
        (("a" * 70, "b"), "The input takes 70 tokens .* encoder_length=64"),
        (("a", "b" * 64), "the target 65, <eos> included"),
        (CHAT[:3], "end with an answer of the assistant's"),
        (CHAT[1:], "must start with the user"),
    ],
)
def test_a_row_that_is_no_pair_is_told_with_what_is_wrong(row, message):
    with pytest.raises(ValueError, match=message):
        list(made([row]))


def test_a_prompt_too_long_for_the_preprocessor_is_told_or_cut_as_it_says(tokenizer):
    pairs = [("why " * 99, "since")]
    strict = T5GemmaSeq2SeqLMPreprocessor(tokenizer, 16, 16)
    with pytest.raises(ValueError, match=r"encoder_sequence_length=16.*The row: "):
        list(supervised_dataset(pairs, strict, batch_size=1, num_epochs=1))
    cutting = T5GemmaSeq2SeqLMPreprocessor(tokenizer, 16, 16, truncate="right")
    ((inputs, _, _),) = segments(supervised_dataset(pairs, cutting, batch_size=1, num_epochs=1))
    assert len(inputs) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_length": None}, "`encoder_length` must be a positive integer. Received: encoder_length=None"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"seed": -1}, "`seed`"),
        ({"num_epochs": 0}, "`num_epochs`"),
        ({"answers": "first"}, "`answers` must be one of last, all"),
        ({"pairs": "rows.jsonl"}, "text_source"),
        ({"pairs": []}, "no rows"),
        ({"pairs": {"encoder_text": ["a"], "decoder_text": []}}, "same number of rows"),
    ],
)
def test_supervised_dataset_with_a_value_out_of_range_names_it(arguments, message):
    defaults = {"pairs": PAIRS, "preprocessor": letters, "batch_size": 1, "encoder_length": 9, "decoder_length": 9}
    with pytest.raises(ValueError, match=message):
        supervised_dataset(**defaults | arguments)
