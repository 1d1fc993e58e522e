"""Texts from files and elsewhere: the same documents, shared out, and a position that can be gone on from."""

import gzip
import json
import random
import subprocess
import sys

import datasets
import grain
import numpy as np
import pyarrow.parquet
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

import keras_t5gemma.data.sources.rows
from keras_t5gemma.data.objectives.prefix_lm import PrefixLM
from keras_t5gemma.data.pipelines.dataset import pretraining_dataset
from keras_t5gemma.data.sources.open import text_source

TEXTS = [f"text {i} " + "x" * (i * 7 % 23) + "ä" for i in range(120)]
STREAMS = ("text", "paragraphs", "jsonl", "jsonl.gz", "jsonl.zst", "streamed datasets", "function", "iterable")
RANDOM_ACCESS = ("parquet", "array_record", "datasets", "sequence")


def tokenizer(text):
    return [300 + byte for byte in text.encode()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The texts in every format, in two files each, written once: readers' threads may outlive their test."""
    folder = tmp_path_factory.mktemp("texts")
    halves = {"a": TEXTS[:70], "b": TEXTS[70:]}
    for name, texts in halves.items():
        lines = "\n".join(json.dumps({"text": text, "n": 1}) for text in texts).encode()
        (folder / f"{name}.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        (folder / f"{name}.md").write_text("\n\n".join(f"{text}\nsecond line" for text in texts), encoding="utf-8")
        (folder / f"{name}.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines))
        writer = ArrayRecordWriter(str(folder / f"{name}.array_record"), "group_size:1")
        for text in texts:
            writer.write(text.encode())
        writer.close()
        frames = [zstandard.ZstdCompressor().compress(part) for part in (lines[:1000], lines[1000:])]
        (folder / f"{name}.jsonl.zst").write_bytes(b"".join(frames))
    parquet_files(folder)
    return folder


def parquet_files(folder, texts=TEXTS):
    for name, part in (("a", texts[:70]), ("b", texts[70:])):
        table = pyarrow.table({"n": list(range(len(part))), "text": part})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=20)
    return folder / "*.parquet"


def hugging_face(streamed):
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    return dataset.to_iterable_dataset(num_shards=3) if streamed else dataset


def source(kind, folder, **options):
    if kind == "text":
        return text_source(folder / "*.txt", **options)
    if kind == "paragraphs":
        return text_source(folder / "*.md", sample_by="paragraph", **options)
    data = {
        "jsonl": lambda: [folder / "a.jsonl", folder / "b.jsonl"],
        "jsonl.gz": lambda: str(folder / "*.jsonl.gz"),
        "jsonl.zst": lambda: folder / "*.jsonl.zst",
        "parquet": lambda: folder / "*.parquet",
        "array_record": lambda: folder / "*.array_record",
        "datasets": lambda: hugging_face(streamed=False),
        "streamed datasets": lambda: hugging_face(streamed=True),
        "sequence": lambda: [{"text": text} for text in TEXTS],
        "function": lambda: lambda: ({"text": text} for text in TEXTS),
        "iterable": lambda: dict.fromkeys(TEXTS).keys(),
    }[kind]()
    return text_source(data, **options)


def texts_of(kind):
    return [f"{text}\nsecond line" for text in TEXTS] if kind == "paragraphs" else TEXTS


@pytest.mark.parametrize("kind", STREAMS + RANDOM_ACCESS)
def test_source_gives_every_text_once_and_in_order(kind, folder):
    data = source(kind, folder)
    assert list(data) == texts_of(kind)
    assert isinstance(data, grain.MapDataset if kind in RANDOM_ACCESS else grain.IterDataset)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", STREAMS + RANDOM_ACCESS)
def test_shares_of_a_source_have_every_text_once_between_them(kind, count, folder):
    shares = [list(source(kind, folder, shard_index=i, shard_count=count)) for i in range(count)]
    assert all(shares)
    assert sorted(text for share in shares for text in share) == sorted(texts_of(kind))


def flat(batch):
    x, y, sample_weight = batch
    return [array.tolist() for array in (*x.values(), y, sample_weight)]


@pytest.mark.parametrize("documents", ["joined", "whole"])
@pytest.mark.parametrize("kind", STREAMS + RANDOM_ACCESS)
def test_position_in_a_source_is_saved_as_json_and_gone_on_from_to_the_very_next_example(kind, documents, folder):
    def make():
        return pretraining_dataset(
            source(kind, folder),
            tokenizer,
            PrefixLM(24, 24),
            batch_size=2,
            num_epochs=2,
            documents=documents,
            pack=documents == "whole",
            shuffle_buffer=30,
            pack_buffer=20,
        )

    expected = [flat(batch) for batch in make()]
    # At the start, in the middle of a buffer, in the second epoch, and at the end.
    for cut in (0, 11, len(expected) * 2 // 3, len(expected)):
        iterator = iter(make())
        for _ in range(cut):
            next(iterator)
        restored = iter(make())
        next(restored)
        restored.set_state(json.loads(json.dumps(iterator.get_state())))
        assert [flat(batch) for batch in restored] == expected[cut:]
        if cut < len(expected):
            assert flat(next(iterator)) == expected[cut]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "function", "streamed datasets"])
def test_data_read_and_tokenized_by_worker_processes_is_the_same(kind, folder):
    data = source(kind, folder)
    options = {"batch_size": 2, "num_epochs": 2, "documents": "whole", "pack": True, "shuffle_buffer": 30}

    def make(workers):
        return pretraining_dataset(data, tokenizer, PrefixLM(24, 24), num_workers=workers, **options)

    assert [flat(batch) for batch in make(2)] == [flat(batch) for batch in make(0)]


def test_epochs_of_a_stream_have_every_text_once_and_are_shuffled_within_the_buffer(folder):
    def order(**options):
        data = pretraining_dataset(
            source("text", folder), tokenizer, PrefixLM(40, 40), batch_size=1, documents="whole", **options
        )
        return [bytes((np.concatenate(row)[:-1] - 300).astype("uint8"))[:8] for row in parts(data)]

    def parts(data):
        for x, y, _ in data:
            yield x["encoder_token_ids"][x["encoder_padding_mask"] > 0], y[x["decoder_padding_mask"] > 0]

    in_order = order(num_epochs=1, shuffle=False)
    assert in_order == [text.encode()[:8] for text in TEXTS]
    twice = order(num_epochs=2, shuffle_buffer=1_000)
    assert sorted(twice) == sorted(in_order * 2)
    assert twice[:120] != in_order
    near = order(num_epochs=1, shuffle_buffer=10)
    assert near != in_order
    assert all(abs(near.index(text) - place) < 10 for place, text in enumerate(in_order))


def test_parquet_is_shuffled_by_row_groups_and_within_them_anew_each_epoch(folder):
    rows = text_source(folder / "*.parquet").shuffle(seed=3)
    epochs = [[rows[i] for i in range(120 * e, 120 * e + 120)] for e in range(2)]
    assert all(sorted(epoch) == sorted(TEXTS) and epoch != TEXTS for epoch in epochs)
    assert epochs[0] != epochs[1]
    # Row groups of 20, and of 10 at a file's end, come one after the other.
    group = {text: (i // 20 if i < 70 else 4 + (i - 70) // 20) for i, text in enumerate(TEXTS)}
    changes = sum(group[a] != group[b] for a, b in zip(epochs[0], epochs[0][1:], strict=False))
    assert changes == 6
    # Any row by its number, in any order.
    order = random.Random(0).sample(range(120), 120)
    assert {i: rows[i] for i in order} == dict(enumerate(epochs[0]))


def test_whole_rows_come_where_no_field_is_named(folder):
    assert next(iter(text_source(folder / "a.jsonl", field=None))) == {"text": TEXTS[0], "n": 1}
    assert text_source(folder / "*.parquet", field=None)[1] == {"text": TEXTS[1], "n": 1}


def test_array_record_with_a_decoder_gives_its_rows(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "rows.array_record"), "group_size:1")
    writer.write(b'{"content": "a text"}')
    writer.close()
    assert list(text_source(tmp_path / "rows.array_record", decode=json.loads, field="content")) == ["a text"]


def test_a_text_file_as_one_document_is_read_as_it_stands(tmp_path):
    (tmp_path / "poem.txt").write_text("one\n\ntwo\nthree\n", encoding="utf-8")
    assert list(text_source(tmp_path / "poem.txt", sample_by="document")) == ["one\n\ntwo\nthree"]
    assert list(text_source(tmp_path / "poem.txt", sample_by="paragraph")) == ["one", "two\nthree"]
    assert list(text_source(tmp_path / "poem.txt")) == ["one", "two", "three"]


def test_a_text_file_larger_than_memory_is_never_read_as_a_whole(tmp_path):
    # 24 MB in 400-byte lines, read with half a megabyte at hand beyond what Python takes for itself.
    with (tmp_path / "large.txt").open("wb") as file:
        for _ in range(60):
            file.write((b"y" * 399 + b"\n") * 1_000)
    code = (
        "import tracemalloc, sys\n"
        "from keras_t5gemma.data.sources.open import text_source\n"
        "rows = iter(text_source(sys.argv[1]))\n"
        "next(rows)\n"
        "tracemalloc.start()\n"
        "count = 1 + sum(1 for _ in rows)\n"
        "print(count, tracemalloc.get_traced_memory()[1] < 500_000)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "large.txt"], capture_output=True, text=True, check=True
    )
    assert result.stdout == "60000 True\n"


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt: no document in it"),
        ("blank.txt", b"\n \n\n", r"blank\.txt: no document in it"),
        ("binary.txt", b"PK\x03\x04\0\0", r"binary\.txt is binary"),
        ("late.txt", b"a\n" * 8000 + b"b\0c\n", r"late\.txt, line 8001 holds a NUL byte"),
        ("latin.txt", b"one\ntwo\ncaf\xe9\n", r"latin\.txt, line 3 is not UTF-8: byte 0xe9"),
        (
            "rows.jsonl",
            b'{"text": "a"}\n\n{"content": "b"}\n',
            r"rows\.jsonl, line 3 has no field 'text'. It has: content",
        ),
        ("rows.jsonl", b'{"text": "a"}\n{"text": 5}\n', r"field 'text' of .*line 2 must be a string. Received: 5"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', r"rows\.jsonl, line 2 is not JSON"),
        ("rows.jsonl", b"[1]\n", r"line 1 must be a string or have fields"),
        (
            "broken.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-9],  # no clock in a test's name
            r"broken\.jsonl\.gz cannot be read after line",
        ),
        ("none.jsonl.gz", b'{"text": "a"}\n', r"none\.jsonl\.gz cannot be read after line 0"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named_with_its_line(name, content, message, tmp_path):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        list(text_source(path))


def test_invalid_utf8_further_down_a_paragraph_is_named_by_its_own_line(tmp_path):
    path = write(tmp_path / "a.txt", b"one\n\ntwo\nthree\nfo\xffur\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 5 is not UTF-8"):
        list(text_source(path, sample_by="paragraph"))


def test_an_array_record_that_is_not_utf8_is_named(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    writer.write(b"caf\xe9")
    writer.close()
    with pytest.raises(ValueError, match=r"Record 0 of .*a\.array_record cannot be decoded"):
        list(text_source(tmp_path / "a.array_record"))


def test_a_broken_zstd_file_and_a_file_that_is_no_parquet_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt\.zst cannot be read after line 0"):
        list(text_source(write(tmp_path / "a.txt.zst", b"no frame")))
    with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file"):
        text_source(write(tmp_path / "a.parquet", b"no file"))


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    with pytest.raises(ValueError, match=r"has no column 'content'. It has: n, text"):
        text_source(parquet_files(tmp_path), field="content")


@pytest.mark.parametrize(("name", "module"), [("a.parquet", "pyarrow.parquet"), ("a.txt.zst", "zstandard")])
def test_a_missing_library_is_named_with_the_extra_that_brings_it(name, module, tmp_path, monkeypatch):
    def missing(wanted):
        assert wanted == module
        raise ImportError(wanted)

    monkeypatch.setattr(keras_t5gemma.data.sources.rows.importlib, "import_module", missing)
    path = write(tmp_path / name, b"x")
    with pytest.raises(ImportError, match=r"pip install 'keras-t5gemma\[data\]'"):
        list(text_source(path))


def test_an_empty_source_is_told_from_one_to_repeat_for_ever(tmp_path):
    with pytest.raises(ValueError, match="no document"):
        pretraining_dataset(text_source(write(tmp_path / "a.txt", b"\n")), tokenizer, PrefixLM(8, 8), batch_size=1)
    for empty in (text_source(lambda: iter(())), grain.MapDataset.source([])):
        with pytest.raises(ValueError, match="no rows"):
            pretraining_dataset(empty, tokenizer, PrefixLM(8, 8), batch_size=1)
    with pytest.raises(ValueError, match="no rows"):
        text_source([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "nowhere/*.txt"}, "There is no file 'nowhere/"),
        ({"data": ["one text", "another"]}, "pass the list of texts to the dataset"),
        ({"data": "."}, "names a folder"),
        ({"data": __file__}, "does not tell its format"),
        ({"data": __file__, "format": "csv"}, "`format` must be one of array_record, jsonl, parquet, text"),
        ({"data": __file__, "format": "text", "sample_by": "word"}, "`sample_by`"),
        ({"data": (text for text in TEXTS)}, "can be iterated only once"),
        ({"data": 5}, "must be paths"),
        ({"data": {"text": TEXTS}}, "must be paths"),
        ({"data": grain.MapDataset.range(3)}, "a Grain dataset already"),
        ({"data": TEXTS, "shard_count": 0}, "`shard_count`"),
        ({"data": TEXTS, "shard_count": 2, "shard_index": 2}, "below shard_count=2"),
        ({"data": TEXTS, "shard_index": -1}, "`shard_index`"),
    ],
)
def test_text_source_with_a_value_out_of_range_names_it(arguments, message):
    with pytest.raises(ValueError, match=message):
        text_source(**arguments)


def test_files_of_several_formats_are_refused(folder):
    with pytest.raises(ValueError, match="must be of one format"):
        text_source([folder / "a.txt", folder / "a.jsonl"])


def test_a_streams_workers_take_turns(folder):
    rows = source("text", folder)
    rows.set_slice(slice(1, None, 3))
    rows.set_slice(slice(1, None, 3))
    assert list(rows) == TEXTS[1::3]
    with pytest.raises(ValueError, match="sequential"):
        rows.set_slice(slice(0, None, 2), sequential_slice=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"documents": "apart"}, "`documents` must be one of joined, whole"),
        ({"texts": np.arange(100), "tokenizer": None, "documents": "whole"}, "cannot take apart"),
        ({"documents": "whole", "num_workers": -1}, "`num_workers`"),
        ({"num_workers": 2}, "`num_workers` must be 0 for texts in memory that are joined"),
        ({"documents": "whole", "shuffle_buffer": 0}, "`shuffle_buffer`"),
    ],
)
def test_pretraining_dataset_with_an_option_out_of_range_names_it(arguments, message):
    defaults = {"texts": TEXTS, "tokenizer": tokenizer, "objective": PrefixLM(8, 8), "batch_size": 1}
    with pytest.raises(ValueError, match=message):
        pretraining_dataset(**defaults | arguments)
