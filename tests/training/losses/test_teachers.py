"""A teacher is no part of its student; what cannot teach is refused, and nothing is lost."""

import types

import grain
import keras
import keras_hub
import numpy as np
import pytest
from helpers.distilled import batches, student, values
from helpers.peers import tiny_config, tiny_gemma_stack, tiny_keras_gemma
from helpers.tiny import loud_backbone
from keras import ops
from safetensors import safe_open

from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.data.objectives.prefix_lm import PrefixLM
from keras_t5gemma.data.pipelines.dataset import pretraining_dataset
from keras_t5gemma.models.adapted import adapt_gemma2
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.training.checkpointing.callback import TrainingCheckpoint
from keras_t5gemma.training.losses.distillation import Distillation
from keras_t5gemma.training.losses.stored_teacher import StoredTeacher, store_teacher_logits


def small_gemma(vocabulary_size=128):
    return keras_hub.models.GemmaCausalLM(tiny_keras_gemma(tiny_gemma_stack(num_layers=1), vocabulary_size))


class Watcher(keras.callbacks.Callback):
    """What Keras's own checkpoints would save in the middle of an epoch."""

    def on_train_batch_end(self, batch, logs=None):
        self.saved = keras.tree.flatten(self.model.get_state_tree()["non_trainable_variables"])


def test_teacher_is_neither_counted_nor_saved_nor_a_constant(tmp_path):
    teacher, lm = small_gemma(), student(Distillation(None))
    counts = lm.count_params(), len(lm.variables), len(lm.non_trainable_variables)
    lm.compile(optimizer="sgd", loss=Distillation(teacher))
    watcher = Watcher()
    lm.fit(batches(), verbose=0, callbacks=[watcher])
    assert (lm.count_params(), len(lm.variables), len(lm.non_trainable_variables)) == counts
    assert len(watcher.saved) == counts[2]

    # A program that held the teacher's weights as constants would not see that they have changed.
    before = lm.evaluate(batches(), verbose=0)[0]
    teacher.backbone.token_embedding.embeddings.assign(teacher.backbone.token_embedding.embeddings * 0.5)
    after = lm.evaluate(batches(), verbose=0)[0]
    assert abs(after - before) > 1e-3

    lm.save(tmp_path / "lm.keras")
    again = keras.models.load_model(tmp_path / "lm.keras")
    assert again.count_params() == counts[0]
    assert (again.loss.temperature, again.loss.teacher) == (1.0, None)
    with pytest.raises(ValueError, match="no teacher"):
        again.fit(batches(), verbose=0)


def test_batches_with_a_teachers_view_are_checked_as_others_are():
    lm = student(Distillation(bigrams))
    x, y, weights = batches(1)[0]
    for method in (lm.train_on_batch, lm.test_on_batch):
        with pytest.raises(ValueError, match=r"`y` must be in \[0, 128\).*Received: 128 in row 0"):
            method(x, {**y, "labels": np.full_like(y["labels"], 128)}, weights)
        with pytest.raises(ValueError, match="`sample_weight` must have the shape of the labels"):
            method(x, y, weights[:, :3])
    loss = lm.test_on_batch(x, y, weights, return_dict=True)["loss"]
    ignored = np.where(weights == 0, -100, y["labels"])
    without_masks = {name: x[name] for name in ("encoder_token_ids", "decoder_token_ids")}
    assert lm.test_on_batch(without_masks, {**y, "labels": ignored}, return_dict=True)["loss"] == pytest.approx(loss)
    lm.train_on_batch(x, y, weights)
    lm.backbone.enable_lora(2)
    before = values(lm.backbone)
    with pytest.warns(UserWarning, match="The weights to train changed"):
        lm.train_on_batch(x, y, weights)
    moved = [
        weight.path
        for weight, old in zip(lm.backbone.weights, before, strict=True)
        if not np.array_equal(ops.convert_to_numpy(weight), old)
    ]
    assert moved
    assert all("lora" in path for path in moved)


def bigrams(inputs):
    return ops.one_hot(inputs["token_ids"], 128, dtype="float32")


def test_run_with_a_teacher_goes_on_from_its_checkpoint_which_holds_no_teacher(tmp_path):
    def run(folder, epochs):
        keras.utils.set_random_seed(0)
        lm = student(Distillation(small_gemma(), hard_weight=0.2))
        checkpoint = TrainingCheckpoint(tmp_path / folder, save_every=2)
        data = checkpoint.data(batches(1).repeat(2))
        lm.fit(data, steps_per_epoch=1, epochs=epochs, verbose=0, shuffle=False, callbacks=[checkpoint])
        return values(lm)

    whole = run("whole", 2)
    run("stopped", 1)
    for got, expected in zip(run("stopped", 2), whole, strict=True):
        np.testing.assert_allclose(got, expected, atol=0 if keras.config.backend() == "jax" else 1e-6)
    names = []
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        with safe_open(path, "np") as file:
            names += file.keys()
    assert names
    # keras-hub's name for a Gemma's layers.
    assert not [name for name in names if "decoder_block" in name]


def test_student_adapted_from_its_teacher_learns_from_it():
    """They began with the same arrays, which a step on JAX may hand over only once."""
    teacher = small_gemma()
    lm = T5GemmaSeq2SeqLM(adapt_gemma2(teacher))
    lm.compile(optimizer="sgd", loss=Distillation(teacher), accumulation_steps=2)
    assert np.isfinite(lm.fit(batches(), verbose=0).history["loss"][0])
    assert np.isfinite(ops.convert_to_numpy(teacher.backbone.token_embedding.embeddings)).all()


def test_teacher_with_another_vocabulary_is_refused_and_nothing_is_lost():
    with pytest.raises(ValueError, match=r"vocabulary, of 128 tokens.*a teacher with 64"):
        student(Distillation(small_gemma(64)))
    # Of a function it is seen when it is called.
    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    mask = keras.Input((None,), dtype="int32", name="padding_mask")
    outputs = keras.layers.Embedding(128, 64)(token_ids) * ops.cast(mask, "float32")[..., None]
    teacher = keras.Model({"token_ids": token_ids, "padding_mask": mask}, outputs)
    lm = student(Distillation(teacher))
    before = values(lm) + values(teacher)
    with pytest.raises(ValueError, match="a teacher with 64"):
        lm.fit(batches(), verbose=0)
    for got, expected in zip(values(lm) + values(teacher), before, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_tokenizers_that_differ_are_refused_by_the_first_id():
    def tokenizer(*pieces):
        return types.SimpleNamespace(proto=b"", get_vocabulary=lambda: list(pieces))

    loss = Distillation(small_gemma())
    loss.teacher.tokenizer = tokenizer("<pad>", "a", "b")
    loss.check_student(128, tokenizer("<pad>", "a", "b"))
    loss.check_student(128, None)
    with pytest.raises(ValueError, match="differ from id 1 on"):
        loss.check_student(128, tokenizer("<pad>", "c", "b"))
    with pytest.raises(ValueError, match=r"3 \(teacher\) and 2 tokens that differ from id 2 on"):
        loss.check_student(128, tokenizer("<pad>", "a"))


def test_batches_without_a_view_are_refused_and_the_message_says_what_to_do():
    data = pretraining_dataset([list(range(60, 90))], None, PrefixLM(4, 4), batch_size=1, num_epochs=1)
    lm = student(Distillation(small_gemma()))
    with pytest.raises(ValueError, match=r"Wrap the dataset in `distillation_dataset`.*Received: labels alone"):
        lm.fit(data, verbose=0)


def test_compile_refuses_what_cannot_be_distilled_into():
    loss = Distillation(small_gemma())
    with pytest.raises(ValueError, match="metrics of your own"):
        student(loss, weighted_metrics=["accuracy"])
    lm = T5GemmaSeq2SeqLM(loud_backbone(tiny_config(num_layers=1)))
    lm.backbone.decoder.token_embedding.quantize("int8")
    with pytest.raises(ValueError, match="quantized"):
        lm.compile(loss=loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": "gemma2_2b_en"}, "`teacher` must be.*Received: str"),
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"hard_weight": 1.5}, r"`hard_weight` must be in \[0, 1\]"),
    ],
)
def test_argument_out_of_range_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**arguments)


def stored(folder, **kwargs):
    """Stored logits of a function, which is quicker to make than a Gemma."""
    return store_teacher_logits(batches(1), bigrams, folder, **kwargs)


def test_stored_logits_keep_the_batches_and_the_largest_with_their_probabilities(tmp_path):
    teacher = stored(tmp_path / "a", top_k=3, steps=1)
    data = teacher.batches()
    assert isinstance(data, grain.MapDataset)
    assert len(data) == 1
    (x, y, weights), (live_x, live_y, live_weights) = data[0], batches(1)[0]
    for got, expected in ((x, live_x), ({"w": weights}, {"w": live_weights})):
        for name, array in expected.items():
            np.testing.assert_array_equal(got[name], array)
    np.testing.assert_array_equal(y["labels"], live_y["labels"])
    assert y["teacher_top_ids"].shape == y["teacher_top_logits"].shape == (2, 8, 3)
    places = np.maximum(live_y["teacher_positions"], 0)
    np.testing.assert_array_equal(
        y["teacher_top_ids"][..., 0], np.take_along_axis(live_y["teacher_token_ids"], places, axis=1)
    )
    np.testing.assert_allclose(y["teacher_top_logits"], np.broadcast_to([1.0, 0.0, 0.0], (2, 8, 3)))
    np.testing.assert_allclose(y["teacher_log_sums"], np.log(np.e + 127), rtol=1e-6)


def test_stored_logits_that_do_not_fit_are_refused(tmp_path):
    teacher = stored(tmp_path / "a", top_k=2, temperature=2.0)
    with pytest.raises(ValueError, match=r"`temperature` must be 2\.0"):
        Distillation(teacher)
    lm = T5GemmaSeq2SeqLM(loud_backbone(tiny_config(num_layers=1, vocabulary_size=64)))
    with pytest.raises(ValueError, match=r"of 64 tokens.*a teacher with 128"):
        lm.compile(loss=Distillation(teacher, temperature=2.0))
    with pytest.raises(ValueError, match=r"Pass `fit` its `batches\(\)`"):
        Distillation(teacher, temperature=2.0).labels_of({"labels": 1, "teacher_positions": 2})
    with pytest.raises(ValueError, match=r"`store_teacher_logits` has written.*nothing"):
        StoredTeacher(tmp_path / "nothing")


def test_storing_refuses_what_it_cannot_store_and_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="`top_k`"):
        stored(tmp_path / "a", top_k=0)
    with pytest.raises(ValueError, match="`temperature`"):
        stored(tmp_path / "a", temperature=-1.0)
    with pytest.raises(ValueError, match=r"must have 9 batches to write\. Received: 2"):
        stored(tmp_path / "a", steps=9)
    with pytest.raises(ValueError, match="`steps` must say"):
        store_teacher_logits(batches(1).repeat(), small_gemma, tmp_path / "a")
    data = pretraining_dataset([list(range(60, 90))], None, PrefixLM(4, 4), batch_size=1, num_epochs=1)
    for wrong in (data, [1, 2]):
        with pytest.raises(ValueError, match="`data` must be a `distillation_dataset`"):
            store_teacher_logits(wrong, small_gemma, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    stored(tmp_path / "a")
    with pytest.raises(CheckpointError, match="exists already"):
        stored(tmp_path / "a")
