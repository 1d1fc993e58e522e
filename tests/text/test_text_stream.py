"""Text from ids that come one after the other: whole characters, and in all what the ids spell at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_t5gemma.text.whole_characters import TextStream


def pieces(tokenizer, ids):
    """What each id adds, and at last the rest."""
    stream = TextStream(tokenizer.detokenize)
    return [stream.add([token]) for token in ids] + [stream.finish()]


def test_character_outside_the_vocabulary_is_given_with_its_last_byte(tokenizer):
    ids = tokenizer("a€b").tolist()
    assert [tokenizer.id_to_token(token) for token in ids] == ["a", "<0xE2>", "<0x82>", "<0xAC>", "b"]
    assert pieces(tokenizer, ids) == ["a", "", "", "€", "b", ""]


def test_spaces_stay_with_the_piece_that_has_them(tokenizer):
    text = " Why  is the sky\n\n blue?"
    given = pieces(tokenizer, tokenizer(text).tolist())
    assert "".join(given) == text
    assert given[0].startswith(" ")


@pytest.mark.parametrize(
    ("characters", "kept", "given"),
    [
        ("€", 2, ["", "", "\ufffd\ufffd"]),  # never completed: told at the end
        ("😀", 3, ["", "", "", "\ufffd\ufffd\ufffd"]),
    ],
)
def test_bytes_that_never_become_a_character_are_given_at_the_end(tokenizer, characters, kept, given):
    assert pieces(tokenizer, tokenizer(characters).tolist()[:kept]) == given


def test_bytes_that_cannot_become_a_character_are_given_when_that_is_sure(tokenizer):
    stray = tokenizer.token_to_id("<0xFF>")
    assert pieces(tokenizer, [stray] * 5) == ["", "", "", "\ufffd", "\ufffd", "\ufffd" * 3]


def test_no_ids_give_no_text(tokenizer):
    assert pieces(tokenizer, []) == [""]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_pieces_joined_are_the_text_of_all_ids_at_once(tokenizer, data):
    # Bytes, which are few in text, are half of what is drawn here.
    first_byte = tokenizer.token_to_id("<0x00>")
    some = st.one_of(st.integers(first_byte, first_byte + 255), st.integers(6, tokenizer.vocabulary_size() - 1))
    ids = data.draw(st.lists(some, max_size=12))
    given = pieces(tokenizer, ids)
    assert "".join(given) == (tokenizer.detokenize(ids) if ids else "")
