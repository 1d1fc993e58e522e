"""Rows of preferences to batches: an encoder row per prompt, a decoder row per answer."""

import json

import grain
import numpy as np
import pytest
from helpers.tiny_tokenizer import train_tiny_tokenizer

from keras_t5gemma.data.pipelines.preferences import preference_dataset
from keras_t5gemma.data.sources.open import text_source
from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer

ROWS = [{"prompt": f"ask {i}", "chosen": f"yes {i}", "rejected": f"no {'never ' * (i % 3)}{i}"} for i in range(10)]
UNPAIRED = [{"prompt": f"ask {i // 2}", "completion": f"say {i}", "label": i % 2 == 0} for i in range(8)]
QUESTION = {"role": "user", "content": "Knock knock."}


def says(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return T5GemmaTokenizer(proto=train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))


@pytest.fixture(scope="module")
def plain(tokenizer):
    return T5GemmaSeq2SeqLMPreprocessor(tokenizer, 48, 32)


@pytest.fixture(scope="module")
def chat(tokenizer):
    return T5GemmaSeq2SeqLMPreprocessor(tokenizer, 64, 48, chat=True)


def in_order(rows, preprocessor, **options):
    return preference_dataset(rows, preprocessor, **{"batch_size": 2, "shuffle": False, "num_epochs": 1, **options})


def texts(batch, preprocessor):
    """`(prompt, first answer, second answer)` of each row, with what closes the answers."""
    x, y, _ = batch
    tokenizer = preprocessor.tokenizer

    def answer(ids):
        return tokenizer.detokenize(ids[ids >= 0].tolist()) + "<eos>" * int(tokenizer.end_token_id in ids)

    for row, labels in enumerate(y["labels"]):
        prompt = x["encoder_token_ids"][row][x["encoder_padding_mask"][row] > 0]
        yield [tokenizer.detokenize(prompt.tolist()), *map(answer, labels)]


def first(rows, preprocessor, **options):
    return next(texts(next(iter(in_order(rows, preprocessor, **options))), preprocessor))


def test_batch_has_an_encoder_row_per_prompt_and_a_decoder_row_per_answer(plain):
    x, y, weights = next(iter(in_order(ROWS, plain, encoder_length=20, decoder_length=24)))
    assert x["encoder_token_ids"].shape == x["encoder_padding_mask"].shape == (2, 20)
    assert x["decoder_token_ids"].shape == x["decoder_padding_mask"].shape == y["labels"].shape == (2, 2, 24)
    assert (weights.shape, weights.dtype, weights.tolist()) == ((2,), "float32", [1, 1])
    for name, text in (("chosen", ROWS[0]["chosen"]), ("rejected", ROWS[0]["rejected"])):
        ids = list(plain.tokenizer(text))
        row = ["chosen", "rejected"].index(name)
        assert y["labels"][0, row].tolist() == [*ids, 1, *[-100] * (23 - len(ids))]
        assert x["decoder_token_ids"][0, row].tolist() == [2, *ids, *[0] * (23 - len(ids))]
        assert x["decoder_padding_mask"][0, row].sum() == len(ids) + 1
    prompt = list(plain.tokenizer(ROWS[0]["prompt"]))
    assert x["encoder_token_ids"][0][: len(prompt)].tolist() == prompt


def test_forms_of_a_row_give_the_same_pair(chat):
    prompt, chosen, rejected = [QUESTION], says("Who is there?"), says("Go away.")
    explicit = {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
    expected = first([explicit] * 2, chat)
    assert "Knock knock." in expected[0]
    assert [expected[1], expected[2]] == ["Who is there?<end_of_turn><eos>", "Go away.<end_of_turn><eos>"]
    for row in (
        {"chosen": [QUESTION, chosen], "rejected": [QUESTION, rejected]},
        {"prompt": "Knock knock.", "chosen": "Who is there?", "rejected": "Go away."},
        {"prompt": "Knock knock.", "chosen": [QUESTION, chosen], "rejected": [QUESTION, rejected]},
        {"prompt": prompt, "chosen": "Who is there?", "rejected": "Go away.", "score": 3},
    ):
        assert first([row] * 2, chat) == expected


def test_texts_without_a_prompt_are_cut_where_they_differ_as_in_trl(plain):
    row = {"chosen": "The sky is blue", "rejected": "The sky is green"}
    theirs = pytest.importorskip("trl").extract_prompt(row)
    assert first([row] * 2, plain) == [theirs["prompt"], theirs["chosen"] + "<eos>", theirs["rejected"] + "<eos>"]


def test_answer_that_is_cut_has_no_end(tokenizer):
    cut = T5GemmaSeq2SeqLMPreprocessor(tokenizer, 48, 6, truncate="right")
    _, y, _ = next(iter(in_order([{"prompt": "a", "chosen": "knock " * 9, "rejected": "no"}] * 2, cut)))
    assert (y["labels"][0, 0] > 1).all()
    assert 1 in y["labels"][0, 1]


def test_unpaired_rows_come_with_an_answer_to_another_prompt_whatever_the_batches(plain):
    def pairs(**options):
        return {
            (prompt, answer): (other, label)
            for batch in preference_dataset(UNPAIRED, plain, num_epochs=1, **options)
            for (prompt, answer, other), label in zip(texts(batch, plain), batch[1]["desirable"].tolist(), strict=True)
        }

    found = pairs(batch_size=2)
    assert len(found) == len(UNPAIRED)
    for row in UNPAIRED:
        other, label = found[row["prompt"], row["completion"] + "<eos>"]
        assert label == row["label"]
        (mismatched,) = [row for row in UNPAIRED if row["completion"] + "<eos>" == other]
        assert mismatched["prompt"] != row["prompt"]
    assert pairs(batch_size=4, seed=3) == found


def test_order_is_shuffled_each_epoch_and_its_position_can_be_saved(plain):
    data = preference_dataset(ROWS, plain, batch_size=2, seed=1)
    iterator = iter(data)
    batches = [next(iterator) for _ in range(3)]
    state = iterator.get_state()
    rest = [next(iterator) for _ in range(7)]
    prompts = [prompt for batch in (*batches, *rest) for prompt, *_ in texts(batch, plain)]
    assert sorted(prompts[:10]) == sorted(prompts[10:]) == sorted(row["prompt"] for row in ROWS)
    assert prompts[:10] != prompts[10:]
    again = iter(data)
    again.set_state(state)
    for batch in rest:
        for one, other in zip(batch[0].values(), next(again)[0].values(), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rows", [ROWS[:4], UNPAIRED])
def test_sources_of_rows_are_the_same_data(plain, rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    expected = [list(texts(batch, plain)) for batch in in_order(rows, plain)]
    for source in (columns, grain.MapDataset.source(rows), text_source(str(path), field=None)):
        assert [list(texts(batch, plain)) for batch in in_order(source, plain)] == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "same", "rejected": "same"}, "`chosen` and `rejected` are the same: .* The row: "),
        ({"chosen": "same", "rejected": "same"}, "are the same"),
        ({"chosen": "yes", "rejected": "no"}, "no common beginning"),
        ({"prompt": "a", "chosen": "yes"}, "lacks 'rejected'; it has prompt, chosen"),
        ({"prompt": "a", "chosen": "yes", "rejected": [says("no")]}, "must both be texts, or both be messages"),
        ({"prompt": "a", "chosen": [QUESTION], "rejected": [says("no")]}, "one message of the assistant"),
        ({"prompt": None, "completion": "b", "label": True}, "lacks 'prompt'"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "lacks 'chosen'; it is None"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "`label` must be true .* Received: 'yes'"),
        ({"prompt": "a", "completion": "b", "label": True}, "have the same prompt"),
        (("a", "b", "c"), "it is a tuple. Rows are dicts"),
        ({"prompt": "a", "chosen": "b", "rejected": "c" * 99}, "`rejected` takes"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "`prompt` is empty"),
    ],
)
def test_invalid_row_is_named(plain, row, message):
    with pytest.raises(ValueError, match=message):
        list(in_order([row, {**row, "prompt": "b"}] if "label" in row and "yes" in row.values() else [row] * 2, plain))


def test_answers_that_are_the_same_once_they_are_cut_are_refused(tokenizer):
    cut = T5GemmaSeq2SeqLMPreprocessor(tokenizer, 48, 2, truncate="right")
    with pytest.raises(ValueError, match="are the same once both are cut to decoder_length"):
        list(in_order([{"prompt": "a", "chosen": "knock knock one", "rejected": "knock knock two"}] * 2, cut))
