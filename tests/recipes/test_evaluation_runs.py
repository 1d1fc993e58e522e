"""`[evaluation]` of a recipe: answers to held-out prompts during a run, and the model of the best checkpoint."""

import io
import json

import numpy as np
import pytest
from keras import ops
from rich.console import Console
from safetensors.numpy import load_file

import keras_t5gemma as kt
from keras_t5gemma.evaluation import text_metrics
from keras_t5gemma.recipes.components import compiled_model
from keras_t5gemma.recipes.prompts import held_out_prompts
from keras_t5gemma.recipes.reading import read_recipe
from keras_t5gemma.recipes.run import run_recipe
from keras_t5gemma.training.callbacks.log_file import read_log

PAIRS = {
    "model": {"lora_rank": 2},
    "data": {"sources": ["sums.jsonl"], "validation": [], "pair_fields": ["q", "a"]},
    "objective": {"mixture": [], "name": "supervised", "encoder_length": 24, "decoder_length": 8},
    "training": {"steps": 6, "evaluate_every": 0, "evaluate_batches": 8, "save_every": 6, "keep": 1},
    "evaluation": {"prompts": ["sums.jsonl"], "every": 2, "limit": 3, "samples": 1},
    "output": {"folder": "measured", "average_last": 0},
}


def recipe(**sections):
    return read_recipe("tiny", **{name: {**keys, **sections.get(name, {})} for name, keys in PAIRS.items()})


@pytest.fixture(scope="module")
def sums(here):
    rows = [{"q": f"{i} + 1 =", "a": f"{i + 1}"} for i in range(8)]
    (here / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return here


def test_run_shows_and_logs_its_metrics_and_writes_the_adapter_of_the_best_checkpoint(sums, monkeypatch):
    asked, values = [], iter([0.25, 0.75, 0.5])

    def scripted(predictions, references):
        asked.append(list(references))
        return next(values)

    monkeypatch.setitem(text_metrics._BY_NAME, "exact_match", lambda _: scripted)
    output = io.StringIO()
    measured = recipe(evaluation={"best": "val_exact_match", "max_new_tokens": 4}, output={"tensorboard": True})
    model = run_recipe(measured, Console(file=output, width=200))
    assert asked == [["1", "2", "3"]] * 3
    assert read_log("measured")["val_exact_match"] == ([2, 4, 6], [0.25, 0.75, 0.5])
    text = output.getvalue()
    assert "step 4, loss" in text and "held out exact_match 0.750" in text
    assert text.count("0 + 1 =") == 3 and "1 + 1 =" not in text  # one sample at each evaluation
    assert "the weights of step 4, where val_exact_match is best: 0.75." in " ".join(text.split())
    (events,) = (sums / "measured" / "tensorboard").iterdir()
    assert b"val_exact_match" in events.read_bytes()
    assert sorted(path.name for path in (sums / "measured" / "checkpoints").iterdir() if path.name[0] != ".") == [
        "step_00000004",
        "step_00000006",
    ]
    lm, base = compiled_model(measured), compiled_model(measured)
    kt.load_training_weights(lm, "measured/checkpoints", step=4)
    kt.load_lora(base, model)
    for weight, found in zip(lm.backbone.trainable_variables, base.backbone.trainable_variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(found), ops.convert_to_numpy(weight), err_msg=weight.path)
    kt.load_training_weights(lm, "measured/checkpoints")
    last = {tuple(ops.convert_to_numpy(weight).ravel()) for weight in lm.backbone.trainable_variables}
    matrices = load_file(model / "adapter_model.safetensors").values()
    assert not any(tuple(matrix.T.ravel()) in last for matrix in matrices)


@pytest.mark.parametrize(
    ("evaluation", "data", "message"),
    [
        ({"prompts": ["none.jsonl"]}, {}, r"\[evaluation\] prompts: There is no file 'none\.jsonl'"),
        ({}, {"pair_fields": ["q", "b"]}, r"\[evaluation\] prompts: .*lacks 'b'.*\[data\] pair_fields.*The row: "),
        ({"prompts": ["corpus.txt"]}, {}, r"\[evaluation\] prompts: A row of `pairs` must be"),
        ({"prompts": ["numbers.jsonl"]}, {}, "An answer must be a text. Received: 2"),
    ],
)
def test_prompts_that_are_no_pairs_are_named(evaluation, data, message, sums):
    (sums / "numbers.jsonl").write_text('{"q": "1 + 1 =", "a": 2}', encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        held_out_prompts(recipe(evaluation=evaluation, data=data))


def test_chats_and_a_limit_give_prompts_and_answers(sums):
    chat = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]
    (sums / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n", encoding="utf-8")
    assert held_out_prompts(recipe(evaluation={"prompts": ["chats.jsonl", "sums.jsonl"], "limit": 2})) == [
        (chat[:1], "2"),
        ("0 + 1 =", "1"),
    ]


def test_prompt_that_the_model_cannot_read_is_named_before_the_first_step(sums):
    (sums / "long.jsonl").write_text(json.dumps({"q": "12 + 34 " * 30, "a": "?"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"\[evaluation\] prompts: .*The prompt: '12 \+ 34"):
        run_recipe(recipe(evaluation={"prompts": ["long.jsonl"]}, output={"folder": "long"}))
    assert not (sums / "long" / "log.csv").exists()
