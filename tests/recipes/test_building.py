"""Every key of a recipe reaches what it is about."""

import json

import keras
import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone

from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.recipes.components import compiled_model, held_out_batches, training_data
from keras_t5gemma.recipes.devices import distribution
from keras_t5gemma.recipes.objective_section import make_objective
from keras_t5gemma.recipes.reading import RecipeError, read_recipe, recipe_path, to_toml
from keras_t5gemma.training.losses.distillation import Distillation


def changed(**sections):
    return read_recipe("tiny", **sections)


def first_batch(recipe, lm):
    return next(iter(training_data(recipe, lm.preprocessor, make_objective(recipe.objective), 0)))


def test_model_and_its_compilation_are_as_the_recipe_says(here):
    lm = compiled_model(
        changed(
            model={"dtype": "mixed_bfloat16", "rematerialize": True, "encoder_attention": "causal", "lora_rank": 2},
            optimizer={"weight_decay": 0.3, "beta_2": 0.9, "clip_norm": 0.5, "warmup_steps": 3, "decay_steps": 30},
            training={"accumulation_steps": 2, "z_loss": 0.25, "label_smoothing": 0.125},
            output={"average_last": 0},
        )
    )
    config = lm.backbone.config
    assert (lm.backbone.dtype_policy.name, config.encoder_attention) == ("mixed_bfloat16", "causal")
    assert lm.backbone.rematerialize
    assert all("lora" in variable.path for variable in lm.backbone.trainable_variables)
    assert lm.get_compile_config()["accumulation_steps"] == 2
    assert (lm.loss.z_loss, lm.loss.label_smoothing) == (0.25, 0.125)
    found = lm.optimizer.get_config()
    assert (found["weight_decay"], found["beta_2"], found["global_clipnorm"]) == (0.3, 0.9, 0.5)
    schedule = lm.optimizer.get_config()["learning_rate"]["config"]
    assert (schedule["warmup_steps"], schedule["steps"], schedule["peak"]) == (3, 30, 0.01)


def test_teacher_of_a_recipe_reads_every_batch_held_out_ones_too(here):
    recipe = changed(
        model={"rematerialize": False}, distillation={"teacher": "gemma2", "temperature": 2.0, "hard_weight": 0.25}
    )
    lm = compiled_model(recipe)
    assert isinstance(lm.loss, Distillation)
    assert (lm.loss.temperature, lm.loss.hard_weight) == (2.0, 0.25)
    held_out = held_out_batches(recipe, lm.preprocessor, make_objective(recipe.objective), 0)
    for _, y, weights in (first_batch(recipe, lm), *(batches[0] for batches, _ in held_out.values())):
        assert y["teacher_token_ids"].shape == (4, 32)
        assert y["labels"].shape == weights.shape == (4, 16)


def test_pairs_of_a_recipe_have_the_fields_and_the_lengths_it_says(here):
    rows = [{"q": f"{i} + 1 =", "a": f"{i + 1}"} for i in range(8)]
    (here / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = changed(
        data={"sources": "pairs.jsonl", "validation": "pairs.jsonl", "pair_fields": ["q", "a"]},
        objective={"name": "supervised", "mixture": [], "encoder_length": 24, "decoder_length": 8},
    )
    lm = compiled_model(recipe)
    x, _, weights = first_batch(recipe, lm)
    assert (x["encoder_token_ids"].shape, weights.shape) == ((4, 24), (4, 8))
    texts = [lm.preprocessor.tokenizer.detokenize(ids[ids > 3]) for ids in np.asarray(x["encoder_token_ids"])]
    assert set(texts) <= {row["q"] for row in rows}
    (batches, _) = held_out_batches(recipe, lm.preprocessor, None, 0)["supervised"]
    assert len(batches) == 2


def test_packed_documents_of_a_recipe_number_the_examples_of_a_row(here):
    recipe = changed(
        data={"pack": True, "documents": "whole", "pack_buffer": 8},
        objective={"encoder_length": 128, "decoder_length": 128},
    )
    x, *_ = first_batch(recipe, compiled_model(recipe))
    assert x["encoder_padding_mask"].max() > 1


def test_mesh_on_another_backend_than_jax_is_refused(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(ValueError, match="only on JAX"):
        distribution(changed(hardware={"mesh": [4]}).hardware)


def test_preset_without_a_tokenizer_is_refused_with_how_to_save_one(here):
    backbone = loud_backbone(tiny_config(num_layers=1))
    T5GemmaSeq2SeqLM(backbone).save_to_preset(str(here / "bare"))
    recipe = changed(model={"preset": "bare", "adapt": []})
    with pytest.raises(ValueError, match=r"\[model\] preset: expected a preset with a tokenizer.*preset='bare'"):
        compiled_model(recipe)


def test_number_of_processes_is_what_the_environment_says_if_asked(tmp_path, monkeypatch):
    path = tmp_path / "recipe.toml"
    hardware = '\n[hardware]\nmesh = [4]\nprocesses = "auto"\n'
    path.write_text(recipe_path("tiny").read_text(encoding="utf-8") + hardware, encoding="utf-8")
    monkeypatch.delenv("KERAS_DISTRIBUTION_NUM_PROCESSES", raising=False)
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    with pytest.raises(
        RecipeError, match=r"\[hardware\] processes: .*KERAS_DISTRIBUTION_NUM_PROCESSES.* state the number"
    ):
        read_recipe(path)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t5gemma-0.t5gemma,t5gemma-1.t5gemma")
    assert read_recipe(path).hardware.processes == 2
    monkeypatch.setenv("KERAS_DISTRIBUTION_NUM_PROCESSES", "4")
    assert read_recipe(path).hardware.processes == 4
    assert "processes = 4" in to_toml(read_recipe(path))
    monkeypatch.setenv("KERAS_DISTRIBUTION_NUM_PROCESSES", "three")
    with pytest.raises(RecipeError, match="Received: 'three'"):
        read_recipe(path)
