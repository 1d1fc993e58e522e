import json

import grain
import keras
import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from hypothesis import given
from hypothesis import strategies as st

from keras_t5gemma.data.objectives.by_name import objective
from keras_t5gemma.data.objectives.example import Example, SpecialIds, model_arrays
from keras_t5gemma.data.objectives.prefix_lm import PrefixLM
from keras_t5gemma.data.objectives.span_corruption import Denoiser, SpanCorruption
from keras_t5gemma.data.pipelines.dataset import pretraining_dataset
from keras_t5gemma.data.pipelines.packing import example_lengths, pack, packed_arrays

SENTINELS = range(10_000, 10_900)


def example(inputs, targets, complete=True):
    return Example(np.array(inputs, "int32"), np.array(targets, "int32"), complete)


def documents(count, longest, seed=0, shortest=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(200, 300, length) for length in rng.integers(shortest, longest + 1, count)]


def test_pack_on_the_docstrings_example_gives_its_rows():
    rows = pack([(3, 1), (2, 2), (5, 1), (1, 1)], capacity=(6, 3))
    assert [row.tolist() for row in rows] == [[2, 3], [1, 0]]


def test_packed_arrays_on_the_docstrings_example_are_its():
    rows = [example([51, 52], [61]), example([53], [62, 63])]
    x, y, sample_weight = packed_arrays(rows, encoder_length=4, decoder_length=6)
    assert {name: array.tolist() for name, array in x.items()} == {
        "encoder_token_ids": [51, 52, 53, 0],
        "encoder_padding_mask": [1, 1, 2, 0],
        "decoder_token_ids": [2, 61, 2, 62, 63, 0],
        "decoder_padding_mask": [1, 1, 2, 2, 2, 0],
    }
    assert y.tolist() == [61, 1, 62, 63, 1, 0]
    assert sample_weight.tolist() == [1, 1, 1, 1, 1, 0]
    assert {array.dtype.name for array in (*x.values(), y)} == {"int32"}
    assert sample_weight.dtype.name == "float32"


def test_packed_arrays_of_one_example_are_its_model_arrays():
    one = example([51, 52, 7], [7, 53])
    special = SpecialIds(pad=9, eos=8, bos=6)
    alone, packed = model_arrays(one, 5, 6, special), packed_arrays([one], 5, 6, special)
    for name, array in alone[0].items():
        assert packed[0][name].tolist() == array.tolist()
    assert [array.tolist() for array in packed[1:]] == [array.tolist() for array in alone[1:]]


def test_packed_arrays_too_short_for_their_examples_refuse_rather_than_trim():
    with pytest.raises(ValueError, match=r"2 example\(s\) with 3 inputs and 5 labels do not fit"):
        packed_arrays([example([51, 52], [61]), example([53], [62, 63])], 4, 4)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), max_size=80),
    capacity=st.tuples(st.integers(40, 90), st.integers(30, 90)),
)
def test_pack_of_any_lengths_puts_each_example_in_one_row_that_holds_it_and_is_the_same_again(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [np.sum([lengths[i] for i in row], axis=0) for row in rows]
    assert all((total <= capacity).all() for total in sums)
    # No two rows fit into one, or packing would have put them there.
    for i, one in enumerate(sums):
        assert not any((one + other <= capacity).all() for other in sums[i + 1 :])
    assert [row.tolist() for row in rows] == [row.tolist() for row in pack(lengths, capacity)]


def test_pack_fills_rows_to_the_last_place_where_lengths_allow():
    assert len(pack([(1, 1)] * 512, (512, 512))) == 1
    assert len(pack([(171, 171), (171, 171), (170, 170)] * 5, (512, 512))) == 5


def test_pack_of_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"\(6, 3\). Received: lengths \(7, 1\) of example 1"):
        pack([(1, 1), (7, 1)], (6, 3))


@pytest.mark.parametrize("name", ["prefixlm", "span_corruption", "ul2", "t5gemma2"])
def test_packed_rows_of_whole_documents_of_mixed_length_are_97_percent_full_on_their_fuller_side(name):
    options = {} if name == "prefixlm" else {"sentinels": SENTINELS}
    data = pretraining_dataset(
        documents(6_000, 900), None, objective(name, 512, 512, **options), batch_size=8, documents="whole", pack=True
    )
    fill = []
    for _, (x, _, _) in zip(range(120), data, strict=False):
        fill.append([(x[f"{side}_padding_mask"] > 0).mean(axis=1) for side in ("encoder", "decoder")])
    fill = np.concatenate(fill, axis=1)
    assert fill.max(axis=0).mean() >= 0.97
    if name in ("span_corruption", "ul2"):  # whose targets are the shorter side
        assert fill[0].mean() >= 0.97


def unpacked(data):
    """`(inputs, decoder inputs, labels)` of each segment, sorted."""
    segments = []
    for x, y, weight in data:
        assert ((x["decoder_padding_mask"] > 0) == (weight == 1)).all()
        for row in range(len(y)):
            encoder, decoder = x["encoder_padding_mask"][row], x["decoder_padding_mask"][row]
            assert encoder.max() == decoder.max()
            for segment in range(1, encoder.max() + 1):
                ids = [x["encoder_token_ids"][row][encoder == segment]]
                ids += [array[row][decoder == segment] for array in (x["decoder_token_ids"], y)]
                segments.append([array.tolist() for array in ids])
    return sorted(segments)


def test_packed_rows_hold_the_very_examples_that_are_not_packed_without_it():
    recipe = objective("ul2", 64, 64)
    texts = documents(100, 150)
    options = {"batch_size": 1, "num_epochs": 1, "documents": "whole", "seed": 3}
    alone = unpacked(pretraining_dataset(texts, None, recipe, **options))
    packed = unpacked(pretraining_dataset(texts, None, recipe, pack=True, pack_buffer=30, **options))
    assert packed == alone
    for _, decoder_ids, labels in packed:
        assert decoder_ids == [2, *labels[:-1]]
        assert labels[-1] == 1


def test_joined_windows_that_do_not_fill_a_row_are_packed_too():
    # 99 sentinels last for 597 ids, 398 inputs: five examples in 2,048 places.
    with pytest.warns(UserWarning, match="only 99 sentinels"):
        recipe = SpanCorruption(Denoiser(3, 0.5), 2048, 2048)
    stream = np.random.default_rng(0).integers(200, 300, 50_000)
    fill = []
    for pack_rows in (False, True):
        data = pretraining_dataset(stream, None, recipe, batch_size=2, num_epochs=1, pack=pack_rows)
        fill.append(np.mean([(x["encoder_padding_mask"] > 0).mean() for x, _, _ in data]))
    assert fill[0] == pytest.approx(398 / 2048)
    assert fill[1] > 0.9


def flat(batch):
    x, y, sample_weight = batch
    return [array.tolist() for array in (*x.values(), y, sample_weight)]


@pytest.mark.parametrize("cut", [0, 1, 7, 23])
def test_position_of_packed_rows_is_saved_as_json_and_gone_on_from_in_the_middle_of_a_buffer(cut):
    def make():
        return pretraining_dataset(
            documents(300, 60), None, PrefixLM(32, 32), batch_size=2, documents="whole", pack=True, pack_buffer=40
        )

    iterator = iter(make())
    for _ in range(cut):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [flat(next(iterator)) for _ in range(30)]
    restored = iter(make())
    for _ in range(3):
        next(restored)
    restored.set_state(state)
    assert [flat(next(restored)) for _ in range(30)] == expected


def test_a_model_reads_examples_in_a_packed_row_as_it_reads_them_alone():
    config = tiny_config(balanced=False)
    backbone = loud_backbone(config)
    rng = np.random.default_rng(0)
    texts = [rng.integers(10, 90, length) for length in (7, 12, 16, 5)]
    options = {"batch_size": 1, "num_epochs": 1, "documents": "whole", "shuffle": False}
    recipe = PrefixLM(12, 12)

    def outputs(pack):
        found = {}
        for x, y, _ in pretraining_dataset(texts, None, recipe, pack=pack, **options):
            hidden = keras.ops.convert_to_numpy(backbone(x)["decoder_sequence_output"])[0]
            segments = x["decoder_padding_mask"][0]
            for segment in range(1, segments.max() + 1):
                found[tuple(y[0][segments == segment])] = hidden[segments == segment]
        return found

    alone, packed = outputs(False), outputs(True)
    assert packed.keys() == alone.keys()
    assert len(packed) == 4
    for labels, hidden in alone.items():
        np.testing.assert_allclose(packed[labels], hidden, atol=1e-4)


def test_example_lengths_count_the_closing_eos():
    assert example_lengths(example([5, 6], [7])) == (2, 2)
    assert example_lengths(example([5, 6], [7], complete=False)) == (2, 1)


@pytest.mark.parametrize("buffer", [0, 1.5])
def test_a_packing_buffer_of_no_examples_is_refused(buffer):
    with pytest.raises(ValueError, match="`pack_buffer`"):
        pretraining_dataset(
            grain.MapDataset.source(documents(9, 9)), None, PrefixLM(8, 8), batch_size=1, pack=True, pack_buffer=buffer
        )
