import random

import grain
import keras
import numpy as np
import pytest
from absl import flags

from keras_t5gemma.data.objectives.prefix_lm import PrefixLM
from keras_t5gemma.data.objectives.span_corruption import Denoiser, SpanCorruption
from keras_t5gemma.data.objectives.ul2 import UL2
from keras_t5gemma.data.pipelines.dataset import pretraining_dataset

STREAM = np.arange(200, 1200, dtype="int32")
T5GEMMA2 = UL2(16, 16, mixture="t5gemma2", mode_tokens={"R": 2001, "S": 2002, "X": 2003})


def flat(batch):
    x, y, sample_weight = batch
    return [array.tolist() for array in (*x.values(), y, sample_weight)]


def sources(batch):
    """The window behind each row of a PrefixLM batch."""
    x, y, _ = batch
    return [[*inputs, *labels] for inputs, labels in zip(x["encoder_token_ids"].tolist(), y.tolist(), strict=True)]


def test_batches_of_prefix_lm_have_fixed_shapes_and_the_models_names():
    x, y, sample_weight = pretraining_dataset(STREAM, None, PrefixLM(5, 7), batch_size=3)[0]
    assert {name: (array.shape, array.dtype.name) for name, array in x.items()} == {
        "encoder_token_ids": ((3, 5), "int32"),
        "encoder_padding_mask": ((3, 5), "int32"),
        "decoder_token_ids": ((3, 7), "int32"),
        "decoder_padding_mask": ((3, 7), "int32"),
    }
    assert (y.shape, y.dtype.name) == ((3, 7), "int32")
    assert (sample_weight.shape, sample_weight.dtype.name) == ((3, 7), "float32")


def test_texts_become_one_stream_with_eos_after_each_and_windows_across_them():
    def tokenizer(text):
        return [ord(letter) for letter in text]

    data = pretraining_dataset(["abc", "", "de", "fgh"], tokenizer, PrefixLM(2, 3), batch_size=1, shuffle=False)
    a, b, c, d, e, f, g, h = range(97, 105)
    assert sources(data[0]) + sources(data[1]) == [[a, b, c, 1, d], [e, 1, f, g, h]]
    # The decoder starts from <bos> and learns <eos> where a text ended.
    assert data[0][0]["decoder_token_ids"].tolist() == [[2, c, 1]]


def test_texts_a_tokenizer_already_closed_get_no_second_eos():
    def tokenizer(text):
        return [*map(ord, text), 3]

    tokenizer.end_token_id = 3
    data = pretraining_dataset(iter(["ab", "cd"]), tokenizer, PrefixLM(3, 3), batch_size=1, shuffle=False)
    assert sources(data[0]) == [[97, 98, 3, 99, 100, 3]]


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
def test_ids_without_a_tokenizer_are_documents_or_a_whole_stream(dtype, tmp_path):
    documents = [[5, 6, 7], np.array([8, 9], dtype)]
    stream = np.memmap(tmp_path / "ids", dtype, "w+", shape=(7,))
    stream[:] = [5, 6, 7, 1, 8, 9, 1]
    for texts in (documents, stream):
        data = pretraining_dataset(texts, None, PrefixLM(3, 4), batch_size=1, shuffle=False)
        assert sources(data[0]) == [[5, 6, 7, 1, 8, 9, 1]]


def test_an_epoch_in_order_has_every_id_once():
    data = pretraining_dataset(STREAM, None, PrefixLM(10, 10), batch_size=5, shuffle=False, num_epochs=1)
    assert len(data) == 10
    assert np.concatenate([row for batch in data for row in sources(batch)]).tolist() == STREAM.tolist()


def test_a_shuffled_epoch_has_the_same_windows_in_another_order_and_the_next_has_others():
    ordered = pretraining_dataset(STREAM, None, PrefixLM(10, 10), batch_size=5, shuffle=False, num_epochs=1)
    shuffled = pretraining_dataset(STREAM, None, PrefixLM(10, 10), batch_size=5, num_epochs=2)
    in_order = [row for batch in ordered for row in sources(batch)]
    rows = [row for batch in shuffled for row in sources(batch)]
    assert rows[:50] != in_order
    assert sorted(rows[:50]) == in_order
    # The second epoch starts elsewhere in the stream, and has every id once, too.
    assert not {row[0] for row in rows[50:]} & {row[0] for row in in_order}
    assert sorted(np.concatenate(rows[50:])) == STREAM.tolist()


def test_ids_too_few_for_another_deal_come_up_in_another_epoch():
    stream = np.arange(200, 1230)
    data = pretraining_dataset(stream, None, PrefixLM(100, 100), batch_size=1, num_epochs=3)
    epochs = [{i for batch in data[5 * e : 5 * e + 5] for i in sources(batch)[0]} for e in range(3)]
    assert [len(epoch) for epoch in epochs] == [1000] * 3
    assert set.union(*epochs) == set(stream.tolist())


def test_a_mixture_is_dealt_in_its_exact_proportions():
    data = pretraining_dataset(STREAM, None, T5GEMMA2, batch_size=8, shuffle=False, num_epochs=1)
    for batch in data:
        modes = batch[0]["encoder_token_ids"][:, 0].tolist()
        assert [modes.count(mode) for mode in (2001, 2002, 2003)] == [1, 4, 3]
    orders = {tuple(batch[0]["encoder_token_ids"][:, 0]) for batch in data}
    assert len(orders) > 1


def test_a_mixtures_windows_follow_each_other_without_gap_or_overlap():
    data = pretraining_dataset(STREAM, None, T5GEMMA2, batch_size=8, shuffle=False, num_epochs=1)
    deal = sum(part.raw_length * weight for part, weight in T5GEMMA2.parts)
    for number, batch in enumerate(data):
        ids = np.concatenate([batch[0]["encoder_token_ids"], batch[1]], axis=1)
        seen = sorted(ids[(ids >= 200) & (ids < 2000)])
        assert seen == STREAM[number * deal : (number + 1) * deal].tolist()


def test_a_stream_shorter_than_a_deal_is_gone_around_once_more():
    data = pretraining_dataset(STREAM[:40], None, T5GEMMA2, batch_size=8, shuffle=False, num_epochs=1)
    assert len(data) == 1
    ids = np.concatenate([data[0][0]["encoder_token_ids"], data[0][1]], axis=1)
    assert set(STREAM[:40]) <= set(ids.ravel().tolist())


def test_span_corruption_targets_end_in_eos_within_the_decoders_length():
    objective = SpanCorruption(Denoiser(3, 0.5), 16, 16)
    _, y, sample_weight = pretraining_dataset(STREAM, None, objective, batch_size=8)[0]
    last = sample_weight.sum(axis=1).astype(int) - 1
    assert (y[np.arange(8), last] == 1).all()


def test_an_example_depends_on_seed_epoch_and_index_alone():
    data = pretraining_dataset(STREAM, None, T5GEMMA2, batch_size=4, seed=3, num_epochs=3)
    expected = [flat(batch) for batch in data]
    assert len(expected) == len(data)
    again = pretraining_dataset(STREAM, None, T5GEMMA2, batch_size=4, seed=3, num_epochs=3)
    order = random.Random(0).sample(range(len(data)), len(data))
    assert {i: flat(again[i]) for i in order} == dict(enumerate(expected))
    for threads in (0, 7):
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8)
        assert [flat(batch) for batch in again.to_iter_dataset(options)] == expected
    shares = [[flat(batch) for batch in again[share::3]] for share in range(3)]
    assert [shares[i % 3][i // 3] for i in range(len(data))] == expected


def test_an_example_made_in_a_worker_process_is_the_same():
    data = pretraining_dataset(STREAM, None, T5GEMMA2, batch_size=4, seed=3, num_epochs=1)
    expected = [flat(batch) for batch in data]
    flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags when it starts a worker.
    workers = data.to_iter_dataset().mp_prefetch(grain.MultiprocessingOptions(num_workers=2))
    assert [flat(batch) for batch in workers] == expected


def test_another_seed_gives_other_examples_and_so_does_another_epoch():
    objective = SpanCorruption(Denoiser(3, 0.5), 16, 16)
    one, other = (
        pretraining_dataset(STREAM, None, objective, batch_size=1, seed=seed, shuffle=False, num_epochs=2)
        for seed in (0, 1)
    )
    assert flat(one[0]) != flat(other[0])
    same_place = sum(flat(one[i]) == flat(one[len(one) // 2 + i]) for i in range(len(one) // 2))
    assert same_place == 0


def test_the_position_can_be_saved_and_gone_on_from():
    data = pretraining_dataset(STREAM, None, T5GEMMA2, batch_size=4)
    iterator = iter(data)
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    expected = [flat(next(iterator)) for _ in range(3)]
    restored = iter(data)
    restored.set_state(state)
    assert [flat(next(restored)) for _ in range(3)] == expected
    assert [flat(data[5:][i]) for i in range(3)] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "one text"}, "not a single string"),
        ({"texts": ["a", 5]}, r"`texts`\[1\] must be a string"),
        ({"texts": ["a"], "tokenizer": None}, r"`texts`\[0\] must be a sequence of ids"),
        ({"tokenizer": lambda text: [[1, 2]]}, "1-D integer ids"),
        ({"texts": ["abcdefg"]}, "8 tokens, fewer than the 10"),
        ({"texts": []}, "0 tokens, fewer"),
        ({"batch_size": 0}, "`batch_size`"),
        (
            {"batch_size": 4, "num_epochs": 1, "drop_remainder": True},
            "make 3 examples, so 1 epochs do not fill one batch",
        ),
        ({"seed": -1}, "`seed`"),
        ({"num_epochs": 0}, "`num_epochs`"),
    ],
)
def test_pretraining_dataset_with_a_value_out_of_range_names_it(arguments, message):
    defaults = {
        "texts": ["a text of some thirty characters"],
        "tokenizer": lambda text: [ord(letter) for letter in text],
        "objective": PrefixLM(5, 5),
        "batch_size": 1,
    }
    with pytest.raises(ValueError, match=message):
        pretraining_dataset(**defaults | arguments)


def test_fit_and_evaluate_take_the_dataset():
    ids = keras.Input((8,), dtype="int32", name="decoder_token_ids")
    encoder_ids = keras.Input((8,), dtype="int32", name="encoder_token_ids")
    embed = keras.layers.Embedding(300, 16)
    context = keras.layers.GlobalAveragePooling1D()(embed(encoder_ids))
    hidden = keras.layers.Add()([embed(ids), keras.layers.RepeatVector(8)(context)])
    inputs = {"encoder_token_ids": encoder_ids, "decoder_token_ids": ids}
    for name in ("encoder_padding_mask", "decoder_padding_mask"):
        inputs[name] = keras.Input((8,), dtype="int32", name=name)
    model = keras.Model(inputs, keras.layers.Dense(300)(hidden))
    model.compile(keras.optimizers.Adam(0.03), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    # A text a model can learn by heart: each id is followed by the next.
    stream = np.tile(np.arange(200, 220), 100)
    objective = PrefixLM(8, 8)
    held_out = pretraining_dataset(stream, None, objective, batch_size=8, shuffle=False, num_epochs=1)
    before = model.evaluate(held_out, verbose=0)
    train = pretraining_dataset(stream, None, objective, batch_size=8)
    history = model.fit(train, steps_per_epoch=30, epochs=2, validation_data=held_out, verbose=0).history
    assert history["val_loss"][-1] < 0.5 * before
    assert model.evaluate(held_out, verbose=0) == pytest.approx(history["val_loss"][-1])
