"""`tokenizer.json`: the ids and texts of `tokenizers` equal SentencePiece's."""

import io
import json
import random

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import TEXTS

import keras_t5gemma as kt
from keras_t5gemma.checkpoints.hugging_face.fast_tokenizer import fast_tokenizer
from keras_t5gemma.checkpoints.hugging_face.tokenizer import write_tokenizer
from keras_t5gemma.checkpoints.tensor_source import CheckpointError

STRINGS = 10_000
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
# Characters in and outside the vocabulary, joined and combining ones, what looks like a space or like a special piece.
ALPHABET = " \n\t\r▁<>[]@/0x1 漢é🎉ﬁ²\u0301\u200d\u00a0\x00\ufeffetaoinshrdlubn"
# Periodic words, in which one piece can be merged in several ways.
CORPUS = [*TEXTS, *["aaaaaaa abababa aaa babab bab aba abbba nananan"] * 20, "漢字かな交じり文 русский 🎉🎉"]
# As in Gemma's own file, runs of spaces are user-defined.
USER_DEFINED = ["<mask>", "<table>", "<tr>", "<start_of_turn>", *("\n" * n for n in range(1, 6))]
USER_DEFINED += ["▁" * n for n in range(2, 9)]


def trained(**changes):
    """A vocabulary with Gemma's settings, but for the changes."""
    model = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": 420,
        "user_defined_symbols": USER_DEFINED,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "minloglevel": 2,
        **{f"{name}_id": i for i, name in enumerate(("pad", "eos", "bos", "unk"))},
        **{f"{name}_piece": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
        **changes,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **options)
    return model.getvalue()


PROTOS = {"ours": lambda: kt.train_tokenizer(CORPUS, 700), "runs of spaces": trained}


def strings(processor, count):
    """Random strings: pieces of the vocabulary, characters, runs, any Unicode."""
    draw = random.Random(0)
    pieces = [processor.id_to_piece(i) for i in range(4, len(processor))]
    pieces += [piece.replace("▁", " ") for piece in pieces]

    def part():
        kind = draw.random()
        if kind < 0.4:
            return draw.choice(pieces)
        if kind < 0.8:
            return "".join(draw.choices(ALPHABET, k=draw.randint(1, 6)))
        if kind < 0.9:
            return draw.choice((" ", "\n", "▁", "a", "ab", "na")) * draw.randint(1, 70)
        code = draw.randrange(0x110000)
        return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)  # surrogates are not text

    texts = ("".join(part() for _ in range(draw.randint(0, 20))) for _ in range(count))
    return [text for text in texts if not any(token in text for token in CONTROL)]


@pytest.mark.parametrize("name", PROTOS)
def test_ids_and_texts_of_random_strings_equal_sentencepiece(name, tmp_path):
    proto = PROTOS[name]()
    write_tokenizer(tmp_path, proto, False, 1000)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    automatic = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = strings(processor, STRINGS)
    assert len(texts) > 0.99 * STRINGS
    used = set()
    for text in texts:
        ids = processor.encode(text)
        used.update(ids)
        assert fast.encode(text, add_special_tokens=False).ids == ids, text
        assert automatic.encode(text, add_special_tokens=False) == ids, text
        assert fast.decode(ids, skip_special_tokens=False) == processor.decode(ids), text
    expected = {i for i in range(4, len(processor)) if not processor.is_byte(i)}
    assert len(expected - used) < 0.02 * len(expected)
    assert any(map(processor.is_byte, used))


def test_control_pieces_are_special_tokens_to_transformers_and_characters_to_sentencepiece(tmp_path):
    proto = PROTOS["ours"]()
    write_tokenizer(tmp_path, proto, False, 1000)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    automatic = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for i, token in enumerate(CONTROL):
        assert automatic.encode(token, add_special_tokens=False) == [i]
        assert i not in processor.encode(token)
        assert automatic.decode([i], skip_special_tokens=True) == ""


def test_exported_folder_has_a_tokenizer_that_transformers_reads(tmp_path):
    tokenizer = kt.T5GemmaTokenizer(proto=PROTOS["ours"]())
    backbone = loud_backbone(tiny_config(vocabulary_size=700))
    kt.export_to_hugging_face(backbone, tmp_path / "model", tokenizer=tokenizer, chat=True)
    (tmp_path / "model" / "tokenizer.model").unlink()  # what is left is enough
    automatic = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    turns = [{"role": "user", "content": "Why is the sky  blue?"}]
    text = "<start_of_turn>user\nWhy is the sky  blue?<end_of_turn>\n<start_of_turn>model\n"
    ids = automatic.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == np.array(tokenizer(text)).tolist()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 380}, "not BPE"),
        ({"byte_fallback": False, "vocab_size": 164}, "bytes"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes"),
        ({"remove_extra_whitespaces": True}, "normalizes"),
        ({"add_dummy_prefix": True}, "adds a space"),
        ({"treat_whitespace_as_suffix": True}, "suffix"),
    ],
)
def test_vocabulary_that_tokenizers_cannot_express_gets_no_file_and_a_warning(changes, reason, tmp_path):
    proto = trained(**changes)
    assert fast_tokenizer(proto)[0] is None
    with pytest.warns(UserWarning, match=f"No `tokenizer.json` .*{reason}"):
        write_tokenizer(tmp_path, proto, False, 1000)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.model", "tokenizer_config.json"}


@pytest.mark.parametrize("cut", [1, 5, 100, -3])
def test_proto_that_is_cut_off_is_refused(cut):
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        fast_tokenizer(PROTOS["ours"]()[:cut])


def test_file_is_plain_json_in_order_of_ids(tmp_path):
    write_tokenizer(tmp_path, PROTOS["ours"](), False, 1000)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert list(content["model"]["vocab"].values()) == list(range(700))
