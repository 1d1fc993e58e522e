"""A run on preferences by a recipe: its reference, its metrics, and that it goes on to the bit."""

import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers.preferred import rows
from safetensors.numpy import load_file

import keras_t5gemma as kt
from keras_t5gemma.recipes.reading import RecipeError, read_recipe
from keras_t5gemma.recipes.run import run_recipe
from keras_t5gemma.training.callbacks.log_file import read_log

PREFERRED = {
    "data": {"sources": ["pairs.jsonl"], "validation": ["held_out.jsonl"], "pair_fields": ["prompt", "chosen"]},
    "objective": {"mixture": [], "name": "supervised", "encoder_length": 16, "decoder_length": 16},
    "training": {"steps": 6, "evaluate_every": 4, "save_every": 2},
    "evaluation": {"prompts": ["held_out.jsonl"], "metrics": ["f1"], "every": 4, "limit": 2, "best": "val_loss"},
    "output": {"folder": "preferred", "average_last": 0},
}


def recipe(preference=(), **sections):
    """A recipe with changed sections; None leaves a section out."""
    changes = {section: sections.pop(section, {}) for section in PREFERRED}
    merged = {name: {**keys, **changes[name]} for name, keys in PREFERRED.items() if changes[name] is not None}
    return read_recipe("tiny", **merged, **sections, preference={"loss": "dpo", "beta": 0.5, **dict(preference)})


@pytest.fixture(scope="module")
def files(here):
    for name, numbers in (("pairs", range(12)), ("held_out", range(12, 16))):
        text = "".join(json.dumps(row) + "\n" for row in rows(numbers))
        (here / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return here


def test_run_that_was_stopped_goes_on_with_the_same_reference_to_the_same_model(files):
    whole = run_recipe(recipe())
    log = read_log("preferred")
    assert {"rewards/accuracies", "rewards/margins", "val_loss", "val_loss/preferences"} < set(log)
    assert log["loss"][1][0] == pytest.approx(np.log(2), abs=0.2)
    assert log["rewards/margins"][1][-1] > log["rewards/margins"][1][0]
    stored = kt.ReferenceLogProbs("preferred/reference")
    assert len(stored) == 2 * 16
    assert log["val_f1"][0] == log["val_loss"][0] == [4]  # not in the rows of steps 2 and 6
    shutil.copytree("preferred", "preferred_again")
    shutil.rmtree("preferred_again/model")
    for step in (4, 6):
        shutil.rmtree(f"preferred_again/checkpoints/step_{step:08d}")
    again = run_recipe(recipe(output={"folder": "preferred_again"}))
    tolerance = 0 if keras.backend.backend() == "jax" else 1e-5
    for column in ("loss", "val_f1", "val_loss"):
        np.testing.assert_allclose(read_log("preferred_again")[column], log[column], rtol=tolerance)
    last, best = (Path("checkpoints") / f"step_{step:08d}" / "model" for step in (6, 4))
    for folder, other in ((whole.parent / last, again.parent / last), (whole, again), (whole, whole.parent / best)):
        found = load_file(other / "model.safetensors")
        for name, value in load_file(folder / "model.safetensors").items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"preference": {"loss": "ppo"}}, r"\[preference\] loss: expected one of"),
        ({"preference": {"loss": "orpo", "reference": "precomputed"}}, "loss='orpo' reads no reference"),
        ({"preference": {"reference": "lora_off"}}, "needs \\[model\\] lora_rank"),
        ({"objective": {"name": "prefixlm"}}, 'needs \\[objective\\] name = "supervised"'),
        ({"data": {"pack": True}}, r"\[data\] pack: a row holds one prompt"),
        ({"evaluation": None}, r"\[data\] pair_fields: .* not preferences"),
        ({"training": {"z_loss": 0.1}}, "are of the loss of tokens"),
        ({"distillation": {"teacher": "gemma2"}}, "are two losses"),
        ({"hardware": {"processes": 2, "mesh": [2]}}, "several processes cannot compute it beforehand"),
    ],
)
def test_keys_that_do_not_go_together_are_named(files, changed, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**changed)


def test_option_of_another_loss_is_named(files):
    with pytest.raises(ValueError, match=r"\[preference\]: `gamma` is an option of simpo"):
        run_recipe(recipe({"gamma": 1.0}, output={"folder": "refused"}))
