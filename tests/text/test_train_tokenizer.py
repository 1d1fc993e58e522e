"""A vocabulary of one's own with Gemma's layout."""

import pytest
import sentencepiece
from helpers.tiny_tokenizer import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_t5gemma.text.train_tokenizer import train_tokenizer

MODEL = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer(TEXTS, 512))


def pieces(text):
    return [MODEL.id_to_piece(i) for i in MODEL.encode(text)]


@pytest.mark.parametrize(
    ("token_id", "piece"),
    [
        (0, "<pad>"),
        (1, "<eos>"),
        (2, "<bos>"),
        (3, "<unk>"),
        (4, "<mask>"),
        (5, "<2mass>"),
        (6, "[@BOS@]"),
        (7, "<unused0>"),
        (105, "<unused98>"),
        (106, "<start_of_turn>"),
        (107, "<end_of_turn>"),
        (108, "\n"),
        (138, "\n" * 31),
        (139, "<0x00>"),
        (394, "<0xFF>"),
    ],
)
def test_trained_vocabulary_has_gemmas_id_for_special_piece(token_id, piece):
    assert MODEL.id_to_piece(token_id) == piece


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_trained_vocabulary_round_trips_any_text(text):
    # U+2581 is SentencePiece's own sign for a space; Gemma reads it back as one too.
    assert MODEL.decode(MODEL.encode(text)) == text.replace("\u2581", " ")


def test_trained_vocabulary_keeps_newlines_digits_and_unknown_characters_apart():
    assert pieces("\n\n7 ") == ["\n\n", "7", "▁"]
    assert pieces("12") == ["1", "2"]
    assert pieces("漢") == ["<0xE6>", "<0xBC>", "<0xA2>"]


def test_trained_vocabulary_reads_turns_and_sentinels_as_one_piece_but_not_eos():
    assert pieces("<start_of_turn><unused7>") == ["<start_of_turn>", "<unused7>"]
    assert "<eos>" not in pieces("<eos>")


def test_trained_vocabulary_of_the_same_texts_is_the_same():
    assert train_tokenizer(TEXTS, 450) == train_tokenizer(iter(TEXTS), 450)


def test_trained_vocabulary_learns_from_lines_of_any_length():
    model = train_tokenizer(["hello " * 2_000], 410)
    assert "▁hello" in [sentencepiece.SentencePieceProcessor(model_proto=model).id_to_piece(i) for i in range(410)]


def test_training_with_a_path_writes_the_same_model_and_nothing_else(tmp_path):
    model = train_tokenizer(TEXTS, 450, tmp_path / "tokenizer.model")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"tokenizer.model": model}


@pytest.mark.parametrize(
    ("texts", "vocabulary_size", "message"),
    [
        ([], 500, "nothing to train on"),
        (["", "\n"], 500, "nothing to train on"),
        (["abc"], 300, "vocabulary_size=300.*smaller than required_chars"),
        (["abc"], 5_000, "vocabulary_size=5000.*too high"),
        ("abc", 500, "wrap it in a list"),
        (["abc", 3], 500, r"texts\[1\]=3"),
    ],
)
def test_training_that_cannot_work_is_refused_and_writes_nothing(tmp_path, texts, vocabulary_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, vocabulary_size, tmp_path / "tokenizer.model")
    assert not list(tmp_path.iterdir())
