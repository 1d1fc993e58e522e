"""LoRA on chosen layers, merged again; and training that keeps up with a model that was changed after a `fit`."""

import warnings

import keras
import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from keras import ops

from keras_t5gemma.checkpoints.hugging_face.peft import load_lora, save_lora
from keras_t5gemma.heads.text_classifier import T5GemmaTextClassifier
from keras_t5gemma.heads.text_embedder import T5GemmaTextEmbedder
from keras_t5gemma.heads.token_classifier import T5GemmaTokenClassifier
from keras_t5gemma.layers.lora import lora_layers
from keras_t5gemma.models.encoder import T5GemmaEncoder
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.training.optimizers.factory import optimizer

CONFIG = tiny_config(balanced=False, num_layers=2)
SMALL = tiny_config(balanced=False, num_layers=1)
X = loud_inputs(SMALL, batch=2)
FIT = {"x": X, "y": X["decoder_token_ids"], "sample_weight": X["decoder_padding_mask"], "verbose": 0}
ATTENTION = ("key", "output", "query", "value")


def ranks(backbone):
    return {path: layer.lora_rank for path, layer in lora_layers(backbone).items()}


def trainable(model):
    return [v.path for v in model.trainable_variables]


def arrays(lm):
    return {v.path: ops.convert_to_numpy(v.value).copy() for v in lm.weights}


def changed(lm, before):
    return {path for path, array in arrays(lm).items() if path not in before or (array != before[path]).any()}


@pytest.fixture(scope="module")
def backbone():
    """One model for all targets: its LoRA is merged, while it computes nothing yet, after each test."""
    return loud_backbone(CONFIG)


@pytest.fixture
def clean(backbone):
    yield backbone
    if lora_layers(backbone):
        backbone.merge_lora()


TARGETS = {
    "default": (
        (2,),
        {
            f"{s}/layer_{i}/{a}/{n}": 2
            for s, i, a, n in [
                (s, i, a, n)
                for s in ("encoder", "decoder")
                for i in (0, 1)
                for a in ("self_attention", "cross_attention")
                for n in ("query", "value")
                if (s, a) != ("encoder", "cross_attention")
            ]
        },
    ),
    "names": ((2, ["gate"]), {f"{s}/layer_{i}/feed_forward/gate": 2 for s in ("encoder", "decoder") for i in (0, 1)}),
    "one name": ((2, "down"), {f"{s}/layer_{i}/feed_forward/down": 2 for s in ("encoder", "decoder") for i in (0, 1)}),
    "cross-attention": (
        (3, ["decoder/*/cross_attention/*"]),
        {f"decoder/layer_{i}/cross_attention/{n}": 3 for i in (0, 1) for n in ATTENTION},
    ),
    "last layer": (
        (2, "*/layer_1/self_attention/*"),
        {f"{s}/layer_1/self_attention/{n}": 2 for s in ("encoder", "decoder") for n in ATTENTION},
    ),
    "a rank a pattern": (
        ({"decoder/layer_[1-9]/feed_forward/up": 4, "decoder/*/up": 1, "encoder/*/self_attention/key": 3},),
        {
            "decoder/layer_1/feed_forward/up": 4,
            "decoder/layer_0/feed_forward/up": 1,
            "encoder/layer_0/self_attention/key": 3,
            "encoder/layer_1/self_attention/key": 3,
        },
    ),
    "an embedding by its path": ((2, ["encoder/token_embedding"]), {"encoder/token_embedding": 2}),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_the_layers_that_train(name, clean):
    arguments, expected = TARGETS[name]
    clean.enable_lora(*arguments)
    assert ranks(clean) == expected
    assert {path.rpartition("/")[0] for path in trainable(clean)} == set(expected)
    assert all("/lora_" in path for path in trainable(clean))


def test_encoder_alone_is_its_matrices_and_not_its_table(clean):
    clean.enable_lora(2, "encoder/*")
    assert len(ranks(clean)) == 2 * 7
    assert all(path.startswith("encoder/layer_") for path in ranks(clean))


REFUSED = {
    "a name of transformers'": ((2, ["q_proj"]), "'q_proj' matches no layer.*query.*decoder/\\*/cross_attention"),
    "one of several": ((2, ["query", "decoder/*/cross_atention/*"]), "cross_atention.*matches no layer"),
    "a pattern in a dict": (({"encoder/layer_9/*": 2},), "layer_9"),
    "nothing": ((2, []), "no targets"),
    "a pattern behind one that takes all": (({"*": 2, "*/query": 4},), "Put '\\*/query' before"),
    "a rank of 0": ((0,), "rank"),
    "a rank of 0 in a dict": (({"query": 0},), "rank\\['query'\\]"),
    "a dict and targets": (({"query": 2}, ["query"]), "target_layer_names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_targets_that_mean_nothing_are_refused_and_change_nothing(name, clean):
    arguments, message = REFUSED[name]
    before = trainable(clean)
    with pytest.raises(ValueError, match=message):
        clean.enable_lora(*arguments)
    assert trainable(clean) == before
    assert not lora_layers(clean)


def test_second_lora_is_refused(clean):
    clean.enable_lora(2)
    before = trainable(clean)
    with pytest.raises(ValueError, match="merge_lora"):
        clean.enable_lora(2, "gate")
    assert trainable(clean) == before


def test_a_rank_a_pattern_comes_back_from_an_adapter(tmp_path, clean):
    clean.enable_lora({"decoder/*/cross_attention/*": 4, "query": 2}, lora_alpha=6)
    expected = ranks(clean)
    save_lora(clean, tmp_path / "adapter")
    clean.merge_lora()
    load_lora(clean, tmp_path / "adapter")
    assert ranks(clean) == expected
    assert {layer.lora_alpha for layer in lora_layers(clean).values()} == {6}


def test_merge_without_lora_says_how_to_have_some(clean):
    with pytest.raises(ValueError, match="enable_lora"):
        clean.merge_lora()


@pytest.fixture(scope="module")
def lm():
    model = T5GemmaSeq2SeqLM(loud_backbone(SMALL))
    model.compile(optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    model.fit(**FIT)
    return model


def test_fit_goes_on_with_its_optimizer_where_nothing_changed(lm):
    before = lm.optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lm.fit(**FIT)
    assert lm.optimizer is before
    assert int(ops.convert_to_numpy(lm.optimizer.iterations)) == 2


def test_lora_frozen_parts_merged_lora_and_int8_after_a_fit_train_and_predict_what_they_say(lm):
    """Each change after the one before, and a `fit` after each, without `compile`."""
    all_paths, logits = trainable(lm), lm.predict_on_batch(X)

    lm.backbone.enable_lora(2, lora_alpha=4)
    before = arrays(lm)
    with pytest.warns(UserWarning, match="new optimizer"):
        lm.fit(**FIT)
        lm.fit(**FIT)
    assert changed(lm, before) == set(trainable(lm))
    assert len(lm.optimizer.variables) == 2 + len(trainable(lm))
    with_lora = lm.predict_on_batch(X)
    assert np.abs(with_lora - logits).max() > 1e-3

    lm.backbone.merge_lora()
    assert trainable(lm) == all_paths
    np.testing.assert_allclose(lm.predict_on_batch(X), with_lora, atol=1e-4 * np.abs(with_lora).max())

    lm.backbone.encoder.trainable = False
    before = arrays(lm)
    with pytest.warns(UserWarning, match="new optimizer"):
        lm.fit(**FIT)
    assert changed(lm, before) == {path for path in all_paths if path.startswith("decoder/")}

    lm.quantize("int8")
    before = arrays(lm)
    with pytest.warns(UserWarning, match="new optimizer"):
        lm.train_on_batch(X, FIT["y"], sample_weight=FIT["sample_weight"])
    assert changed(lm, before) == {path for path in all_paths if path.startswith("decoder/") and "/scale" in path}
    with pytest.raises(ValueError, match="no LoRA to merge"):
        lm.backbone.merge_lora()
    lm.backbone.enable_lora(2, "gate")
    with pytest.raises(ValueError, match="save_lora"):
        lm.backbone.merge_lora()

    lm.trainable = False
    with pytest.raises(ValueError, match="no trainable weights"):
        lm.fit(**FIT)


def test_new_optimizer_excludes_the_same_weights_from_decay():
    lm = T5GemmaSeq2SeqLM(loud_backbone(SMALL))
    lm.compile(optimizer=optimizer("adamw", learning_rate=1e-3, steps=10, warmup_steps=1, no_decay=("scale", "kernel")))
    lm.optimizer.build(lm.trainable_variables)
    lm.backbone.encoder.trainable = False
    with pytest.warns(UserWarning, match="new optimizer"):
        lm._refresh(trains=True)
    lm.optimizer.build(lm.trainable_variables)
    decays = {v.path for v in lm.trainable_variables if lm.optimizer._use_weight_decay(v)}
    assert decays == {"decoder/token_embedding/embeddings"}


def test_optimizer_that_cannot_be_made_again_says_to_compile():
    class Own(keras.optimizers.SGD):
        def __init__(self, secret):
            super().__init__(0.1)

    lm = T5GemmaSeq2SeqLM(loud_backbone(SMALL))
    lm.compile(optimizer=Own("secret"))
    lm.optimizer.build(lm.trainable_variables)
    lm.backbone.enable_lora(2)
    with pytest.raises(ValueError, match="Call `compile` again"):
        lm.fit(**FIT)


@pytest.mark.parametrize(
    "task",
    [
        T5GemmaSeq2SeqLM,
        T5GemmaTextEmbedder,
        lambda backbone: T5GemmaTextClassifier(backbone, num_classes=2),
        lambda backbone: T5GemmaTokenClassifier(backbone, num_classes=2),
    ],
)
def test_lora_of_a_task_is_lora_of_its_backbone(task):
    backbone = loud_backbone(SMALL)
    model = task(backbone if task is T5GemmaSeq2SeqLM else T5GemmaEncoder(**SMALL.encoder_alone().to_dict()))
    before = trainable(model)
    model.enable_lora(2, "encoder/*", lora_alpha=4)
    assert set(ranks(model.backbone).values()) == {2}
    assert not any(path.startswith("decoder") for path in ranks(model.backbone))
    model.merge_lora()
    assert not ranks(model.backbone)
    assert trainable(model) == before
