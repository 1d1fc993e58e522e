"""Whatever Keras's `fit` takes, as texts or as ids: the loss of a plain dict, or one error that says what would fit."""

import warnings

import grain
import keras
import numpy as np
import pytest
from helpers.input_forms import (
    ANSWERS,
    BATCH,
    QUESTIONS,
    Batches,
    batch_encoding,
    collated,
    grain_rows,
    hugging_face,
    hugging_face_dataset,
    lists,
    loader,
    ragged,
    slices,
    texts,
    tf_data,
)
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from keras import ops

import keras_t5gemma as kt


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """Compiled once, with a learning rate of zero: the loss of `fit` is that of the weights as they are."""
    keras.utils.set_random_seed(0)
    tokenizer = kt.T5GemmaTokenizer(proto=train_tiny_tokenizer(tmp_path_factory.mktemp("inputs") / "tokenizer.model"))
    lengths = [max(len(tokenizer(text)) for text in texts) for texts in (QUESTIONS, ANSWERS)]
    preprocessor = kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, lengths[0], lengths[1] + 2)
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(tiny_config(num_layers=1), vocabulary_size=512), preprocessor)
    lm.compile(optimizer=keras.optimizers.SGD(0.0))
    return lm


@pytest.fixture(scope="module")
def arrays(lm):
    """`(x, y, sample_weight)` of all rows."""
    return lm.preprocessor({"encoder_text": list(QUESTIONS), "decoder_text": list(ANSWERS)})


@pytest.fixture(scope="module")
def expected(lm, arrays):
    """`(loss, accuracy, logits)` of a plain dict."""
    x, y, weights = arrays
    loss, accuracy = lm.evaluate(x, y, sample_weight=weights, batch_size=BATCH, verbose=0)
    return loss, accuracy, lm.predict(x, batch_size=BATCH, verbose=0)


IN_MEMORY = {"batch_size": BATCH}
# Each gives data, and what beside them `evaluate` is told.
SOURCES = {
    "dict of texts": lambda arrays: (texts(), IN_MEMORY),
    "arrays of texts": lambda arrays: ({name: np.array(column) for name, column in texts().items()}, IN_MEMORY),
    "PyDataset of texts": lambda arrays: (Batches(slices(texts())), {}),
    "PyDataset of ids": lambda arrays: (Batches(slices(arrays)), {}),
    "generator of texts": lambda arrays: ((batch for batch in slices(texts())), {}),
    "generator of ids": lambda arrays: ((batch for batch in slices(arrays)), {}),
    "generator of (x,)": lambda arrays: (((batch,) for batch in slices(arrays[0])), {}),
    "DataLoader of texts": lambda arrays: (loader(texts()), {}),
    "DataLoader of ids": lambda arrays: (loader(arrays), {}),
    "tf.data of texts": lambda arrays: (tf_data(texts()), {}),
    "tf.data of ids": lambda arrays: (tf_data(arrays), {}),
    "ragged": lambda arrays: (ragged(arrays), {}),
    "Grain of texts": lambda arrays: (grain_rows({name: np.array(column) for name, column in texts().items()}), {}),
    "Grain of ids": lambda arrays: (grain_rows(arrays), {}),
    "Grain iterator": lambda arrays: (grain_rows(arrays).to_iter_dataset(), {}),
    "datasets of texts": lambda arrays: (hugging_face_dataset(texts()), IN_MEMORY),
    "datasets of ids": lambda arrays: (hugging_face_dataset(hugging_face(arrays)), IN_MEMORY),
    "datasets, streamed": lambda arrays: (hugging_face_dataset(texts()).to_iterable_dataset(), IN_MEMORY),
    "dict without masks": lambda arrays: ({name: arrays[0][name] for name in lists(arrays)[0]}, IN_MEMORY),
    "lists": lambda arrays: (lists(arrays)[0], {"y": lists(arrays)[1], **IN_MEMORY}),
    "BatchEncoding": lambda arrays: (batch_encoding(arrays), IN_MEMORY),
    "collator": lambda arrays: (Batches(list(collated(arrays))), {}),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_any_data_give_the_loss_of_a_plain_dict(lm, arrays, expected, source):
    """In `fit`, `evaluate` and `predict`, the last and smaller batch included, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        data, beside = source(arrays)
        found = lm.evaluate(data, **beside, verbose=0)
        np.testing.assert_allclose(found, expected[:2], rtol=1e-5)
        data, beside = source(arrays)
        history = lm.fit(data, **beside, verbose=0).history
        np.testing.assert_allclose([history["loss"][0], history["accuracy"][0]], expected[:2], rtol=1e-5)
        data, beside = source(arrays)
        beside = {name: value for name, value in beside.items() if name != "y"}
        logits = lm.predict(data, **beside, verbose=0)
    assert logits.shape == expected[2].shape
    keep = arrays[2] != 0
    np.testing.assert_allclose(logits[keep], expected[2][keep], rtol=1e-4, atol=1e-4)


def test_mean_loss_is_over_tokens_however_batches_are_cut(lm, arrays, expected):
    """Batches of 4, 4 and 2 rows with different numbers of target tokens, and one of all rows."""
    x, y, weights = arrays
    whole = lm.test_on_batch(x, y, weights, return_dict=True)
    lm.reset_metrics()
    assert float(whole["loss"]) == pytest.approx(expected[0], rel=1e-5)
    logits = ops.convert_to_tensor(expected[2])
    assert float(kt.VocabularyCrossEntropy()(y, logits, weights)) == pytest.approx(expected[0], rel=1e-5)


def spoiled(arrays, ids, weight):
    """Labels with some that are not to count."""
    x, y, weights = arrays
    y, weights = y.copy(), weights.copy()
    padding = weights == 0
    y[padding], weights[padding] = ids, weight
    return x, y, weights


@pytest.mark.parametrize(
    ("ids", "weight"),
    [(-100, 1.0), (-100, None), (515, 0.0), (-7, 0.0)],
    ids=["-100", "unweighted", "beyond", "negative"],
)
def test_labels_that_do_not_count_change_nothing(lm, arrays, expected, ids, weight):
    """In `evaluate`, in `fit`, and in a step without either; smoothed, and in parts, see `test_losses`."""
    x, y, weights = spoiled(arrays, ids, 1.0 if weight is None else weight)
    weights = None if weight is None else weights
    assert lm.evaluate(x, y, sample_weight=weights, batch_size=BATCH, verbose=0)[0] == pytest.approx(
        expected[0], rel=1e-5
    )
    assert lm.evaluate(Batches(slices((x, y) if weights is None else (x, y, weights))), verbose=0)[0] == pytest.approx(
        expected[0], rel=1e-5
    )
    loss = lm.fit(x, y, sample_weight=weights, batch_size=BATCH, verbose=0).history["loss"][0]
    assert loss == pytest.approx(expected[0], rel=1e-5)
    logs = lm.test_on_batch(x, y, weights, return_dict=True)
    lm.reset_metrics()
    assert float(logs["loss"]) == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("kind", ["ids", "texts", "tf.data"])
def test_weights_per_row_leave_rows_out(lm, arrays, kind):
    """Zeros are not the loss of ones."""
    x, y, weights = arrays
    rows = np.arange(len(y)) % 2
    expected = lm.evaluate(x, y, sample_weight=weights * rows[:, None], batch_size=BATCH, verbose=0)[0]
    if kind == "ids":
        found = lm.evaluate(x, y, sample_weight=rows, batch_size=BATCH, verbose=0)[0]
    elif kind == "texts":
        found = lm.evaluate(texts(), sample_weight=rows, batch_size=BATCH, verbose=0)[0]
    else:
        import tensorflow as tf

        found = lm.evaluate(
            tf.data.Dataset.from_tensor_slices((texts(), rows, rows))
            .map(lambda x, _, rows: (x, None, rows))
            .batch(BATCH),
            verbose=0,
        )[0]
    assert found == pytest.approx(expected, rel=1e-5)


def bad(arrays, **changes):
    x, y, weights = arrays
    given = {**x, "y": y, "weights": weights, **changes}
    y, weights = given.pop("y"), given.pop("weights")
    return given, y, weights


BAD = {
    "label beyond": ({"y": lambda a: np.where(a[2] > 0, 515, a[1])}, r"`y` must be in \[0, 512\).*515 in row 0"),
    "label negative": ({"y": lambda a: np.where(a[2] > 0, -1, a[1])}, r"`y` must be in \[0, 512\).*-1 in row 0"),
    "labels longer": ({"y": lambda a: np.pad(a[1], ((0, 0), (0, 1)))}, r"`y` must hold a label for each position"),
    "labels of floats": ({"y": lambda a: a[1] * 0.5}, "`y` must hold integers"),
    "weights longer": ({"weights": lambda a: np.ones((len(a[1]), 3))}, "`sample_weight` must have the shape"),
    "ids beyond": ({"encoder_token_ids": lambda a: a[0]["encoder_token_ids"] + 600}, r"`encoder_token_ids` must be in"),
    "decoder ids negative": (
        {"decoder_token_ids": lambda a: a[0]["decoder_token_ids"] - 9},
        "`decoder_token_ids` must be",
    ),
    "mask shorter": (
        {"decoder_padding_mask": lambda a: a[0]["decoder_padding_mask"][:, 1:]},
        "`decoder_padding_mask` must",
    ),
    "unknown key": ({"token_ids": lambda a: a[1]}, "encoder_token_ids.*decoder_padding_mask.*Received.*token_ids"),
}


@pytest.mark.parametrize("way", ["dict", "PyDataset", "tf.data", "batch"])
@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_one_error_that_says_what_would(lm, arrays, changes, message, way):
    x, y, weights = bad(arrays, **{name: change(arrays) for name, change in changes.items()})
    calls = {
        "dict": lambda: lm.fit(x, y, sample_weight=weights, batch_size=BATCH, verbose=0),
        "PyDataset": lambda: lm.evaluate(Batches(slices((x, y, weights))), verbose=0),
        "tf.data": lambda: lm.evaluate(tf_data((x, y, weights)), verbose=0),
        "batch": lambda: lm.train_on_batch(x, y, weights),
    }
    with pytest.raises(Exception, match=f"(?s){message}"):
        calls[way]()


def test_ids_out_of_range_in_predict_are_an_error(lm, arrays):
    x = {**arrays[0], "encoder_token_ids": arrays[0]["encoder_token_ids"] + 600}
    for data in (x, Batches(slices(x))):
        with pytest.raises(ValueError, match="`encoder_token_ids` must be in"):
            lm.predict(data, verbose=0)


@pytest.mark.parametrize(
    "data",
    [[1, 2], "text", np.zeros((2, 3)), 5, {"input": [[1]]}, {"input": [1]}, ["a", "b"], None],
    ids=lambda data: type(data).__name__,
)
def test_what_is_not_understood_shows_the_form(lm, data):
    names = "encoder_text.*encoder_token_ids.*decoder_token_ids.*encoder_padding_mask.*decoder_padding_mask"
    for call in (lm.fit, lm.evaluate, lm.predict):
        with pytest.raises(ValueError, match=f"(?s){names}.*Received"):
            call(data, verbose=0)


def endless(arrays):
    """Data that never end, and the same as what cannot be known to."""
    batches = slices(arrays)
    rows = grain.MapDataset.source(batches).repeat(None)
    return {"Grain": rows, "Grain iterator": rows.to_iter_dataset(), "tf.data": tf_data(arrays).repeat()}


@pytest.mark.parametrize("name", ["Grain", "Grain iterator", "tf.data"])
def test_data_without_end_need_a_number_of_steps(lm, arrays, expected, name):
    with pytest.raises(ValueError, match=r"never end: pass `steps_per_epoch`"):
        lm.fit(endless(arrays)[name], verbose=0)
    with pytest.raises(ValueError, match=r"never end: pass `steps`"):
        lm.evaluate(endless(arrays)[name], verbose=0)
    with pytest.raises(ValueError, match=r"never end: pass `validation_steps`"):
        lm.fit(*arrays[:2], validation_data=endless(arrays)[name], verbose=0)
    history = lm.fit(endless(arrays)[name], steps_per_epoch=3, epochs=2, verbose=0).history["loss"]
    np.testing.assert_allclose(history, [expected[0]] * 2, rtol=1e-5)


class Steps(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append(0)

    def on_train_batch_end(self, batch, logs=None):
        self.seen[-1] += 1


def test_batches_are_read_once_an_epoch_and_epochs_are_as_long_as_asked_for(lm, arrays):
    class Counting(Batches):
        read = epochs = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

        def on_epoch_end(self):
            self.epochs += 1

    data, steps = Counting(slices(arrays)), Steps()
    lm.fit(data, epochs=3, callbacks=[steps], verbose=0)
    assert steps.seen == [3, 3, 3]
    if keras.config.backend() != "tensorflow":  # which reads ahead
        assert (data.read, data.epochs) == (9, 2)  # the last pass ends with the run
    steps = Steps()
    lm.fit(Batches(slices(arrays)), epochs=2, steps_per_epoch=4, callbacks=[steps], verbose=0)
    assert steps.seen == [4, 4]
    with pytest.raises(ValueError, match="A generator can be gone through once, and is to be 2 times"):
        lm.fit((batch for batch in slices(arrays)), epochs=2, verbose=0)
    steps = Steps()
    with pytest.warns(UserWarning, match=r"The data ended after 1 of 2 steps of epoch 2") as caught:
        lm.fit((batch for batch in slices(arrays)), epochs=2, steps_per_epoch=2, callbacks=[steps], verbose=0)
    assert steps.seen == [2, 1]
    assert not [warning for warning in caught if "ran out" in str(warning.message)]
    assert {warning.filename for warning in caught if "The data ended" in str(warning.message)} == {__file__}


def test_held_out_data_come_in_any_form(lm, arrays, expected):
    x, y, weights = arrays
    for held_out in (Batches(slices(arrays)), (x, y, weights), texts(), (texts(), None, np.ones(len(y)))):
        history = lm.fit(x, y, sample_weight=weights, batch_size=BATCH, epochs=2, validation_data=held_out, verbose=0)
        np.testing.assert_allclose(history.history["val_loss"], [expected[0]] * 2, rtol=1e-5)


def test_datasets_of_pairs_keep_the_last_smaller_batch(lm, expected):
    pairs = list(zip(QUESTIONS, ANSWERS, strict=True))
    options = {"batch_size": BATCH, "num_epochs": 1, "shuffle": False}
    data = kt.supervised_dataset(pairs, lm.preprocessor, **options)
    assert [len(batch[1]) for batch in data] == [4, 4, 2]
    assert lm.evaluate(data, verbose=0)[0] == pytest.approx(expected[0], rel=1e-5)
    dropped = kt.supervised_dataset(pairs, lm.preprocessor, **options, drop_remainder=True)
    assert [len(batch[1]) for batch in dropped] == [4, 4]
    objective = kt.PrefixLM(8, 8)
    joined = kt.pretraining_dataset(QUESTIONS, lm.preprocessor.tokenizer, objective, **options)
    dropped = kt.pretraining_dataset(QUESTIONS, lm.preprocessor.tokenizer, objective, **options, drop_remainder=True)
    assert [len(batch[1]) for batch in joined][:-1] == [len(batch[1]) for batch in dropped] == [4] * len(dropped)
    assert len(joined) == len(dropped) + 1


def test_an_ordinary_run_prints_and_warns_nothing(lm, arrays, capfd, caplog):
    """By Keras, Grain, absl and numpy, with the filters that Python has by default."""
    x, y, weights = arrays
    pairs = list(zip(QUESTIONS, ANSWERS, strict=True))
    pairs = kt.supervised_dataset(pairs, lm.preprocessor, batch_size=BATCH, num_epochs=1)
    lm.fit(x, y, sample_weight=weights, batch_size=BATCH, verbose=0)  # TensorFlow logs what it compiles
    capfd.readouterr()
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("always")
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        for data in (texts(), x, pairs, tf_data(arrays), grain_rows(arrays), Batches(slices(arrays))):
            lm.fit(data, verbose=0)
            lm.evaluate(data, verbose=0)
            lm.predict(data, verbose=0)
    assert [str(warning.message) for warning in caught] == []
    assert [record.getMessage() for record in caplog.records if record.levelname != "DEBUG"] == []
    assert "".join(capfd.readouterr()) == ""


def test_faults_of_a_users_data_are_errors_that_name_them(lm):
    ids = {"encoder_token_ids": np.full((2, 4), 5), "decoder_token_ids": np.full((2, 3), 6)}
    with pytest.raises(ValueError, match=r"`sample_weight` must hold finite numbers.*row 1"):
        lm.evaluate(ids, sample_weight=[1.0, np.nan], verbose=0)
    collator = {"input_ids": ids["encoder_token_ids"], "labels": np.array([[-5, 6, 7]] * 2)}
    with pytest.raises(ValueError, match=r"`labels` must be.*Received: -5 in row 0, position 0"):
        lm.evaluate(collator, verbose=0)
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape of `input_ids`"):
        lm.evaluate({**collator, "labels": ids["decoder_token_ids"], "attention_mask": np.ones((2, 3), int)}, verbose=0)
    endless = grain.MapDataset.source([ids]).repeat().batch(1)
    with pytest.raises(ValueError, match="never end"):
        lm.fit(endless, verbose=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'dtyp'"):
        kt.T5GemmaBackbone("s", dtyp="bfloat16")


def test_mask_of_floats_is_one_of_integers(lm):
    ids = np.array([[5, 6, 7, 8]] * 2)
    mask = np.array([[1.0, 1.0, 1.0, 0.0]] * 2, "float32")
    asked = {"input_ids": ids, "attention_mask": mask, "labels": np.full((2, 3), 6)}
    whole = {**asked, "attention_mask": mask.astype("int32")}
    unmasked = {name: value for name, value in asked.items() if name != "attention_mask"}
    assert lm.evaluate(asked, verbose=0) == lm.evaluate(whole, verbose=0) != lm.evaluate(unmasked, verbose=0)
    with pytest.raises(ValueError, match="must hold integers"):
        lm.evaluate(asked | {"attention_mask": mask / 2}, verbose=0)
