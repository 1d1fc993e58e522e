"""`evaluate` from end to end, on tasks in local files, and what it refuses."""

import json
import re
from pathlib import Path

import keras
import lm_eval
import pytest
from helpers.copying import write_tasks
from typer.testing import CliRunner

import keras_t5gemma as kt
from keras_t5gemma.cli import app
from keras_t5gemma.evaluation import human_eval, published
from keras_t5gemma.evaluation.benchmarks import suite_scores
from keras_t5gemma.evaluation.plan import plan
from keras_t5gemma.evaluation.suites import SUITES

ROOT = Path(__file__).parents[2]
TASKS = Path(lm_eval.__file__).parent / "tasks"
QUICK = {"bootstrap_iters": 0}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return folder, write_tasks(folder)


@pytest.fixture(scope="module")
def preset(copying, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preset") / "copying"
    kt.export_to_hugging_face(copying, folder)
    return folder


def mmlu_questions():
    """MMLU's questions among the harness's prompts: five of each of 57 subjects, but for three."""
    prompts = json.loads((TASKS / "mmlu/flan_cot_fewshot/_cot_prompts.json").read_text(encoding="utf-8"))
    found = []
    for text in prompts.values():
        for part in text.split("\n\nQ: ")[1:]:
            question, _, rest = part.partition("\n(A) ")
            choices = re.split(r" \([BCD]\) ", rest.partition("\nA: ")[0])
            found.append({"question": question, "choices": choices, "answer": re.findall(r"\(([ABCD])\)", rest)[-1]})
    return found


def test_model_that_has_learned_the_tasks_is_right_in_each_kind(copying, tasks):
    folder, names = tasks
    results = kt.evaluate(copying, names, include_path=folder, batch_size=5, **QUICK)
    scores = {
        name: next(x for key, x in numbers.items() if key in ("acc,none", "exact_match,none"))
        for name, numbers in results["results"].items()
    }
    assert scores == {"copy_choice": 1.0, "copy_text": 1.0, "copy_likely": 1.0}
    facts = results["keras_t5gemma"]
    assert (facts["keras_t5gemma"], facts["backend"]) == (kt.__version__, keras.config.backend())
    assert (facts["dtype"], facts["quantization"], facts["truncated_contexts"]) == ("float32", None, 0)
    assert results["n-samples"]["copy_choice"] == {"original": 24, "effective": 24}


def test_examples_in_the_prompt_are_cut_on_the_left_and_counted(copying, tasks):
    folder, _ = tasks
    scores = {}
    for side in ("left", "right"):
        harness = kt.HarnessLM(copying, max_length=9, truncate=side)
        with pytest.warns(UserWarning, match=f"more than max_length=9 tokens and were cut on the {side}"):
            results = kt.evaluate(harness, "copy_text", include_path=folder, num_fewshot=2, **QUICK)
        # Contexts that are the same once they are cut are answered once.
        assert results["keras_t5gemma"]["truncated_contexts"] == 24 if side == "left" else 0 < harness.truncated < 24
        scores[side] = results["results"]["copy_text"]["exact_match,none"]
    # What is asked last remains: twice as many are right as by a guess among eight words, or without the question.
    assert scores["left"] > 2 * max(scores["right"], 1 / 8)


def test_questions_of_mmlu_are_asked_as_they_are_written(copying):
    import datasets

    questions = mmlu_questions()
    assert len(questions) == 282
    task = {
        "task": "mmlu_of_the_prompts",
        "custom_dataset": lambda **_: datasets.DatasetDict({"test": datasets.Dataset.from_list(questions)}),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\n"
        "Answer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
    }
    results = kt.evaluate(copying, [task], limit=4, **QUICK)
    ((context, continuation), *_) = results["samples"]["mmlu_of_the_prompts"][0]["arguments"]
    assert context == (
        "Statement 1 | Every element of a group generates a cyclic subgroup of the group. Statement 2 | The symmetric "
        "group S_10 has 10 elements.\nA. True, True\nB. False, False\nC. True, False\nD. False, True\nAnswer:"
    )
    assert continuation == " A"
    assert results["results"]["mmlu_of_the_prompts"]["acc,none"] in (0.0, 0.25, 0.5, 0.75, 1.0)


def test_chat_puts_contexts_into_turns(copying, tasks):
    folder, _ = tasks
    options = {"include_path": folder, "limit": 2, "system_instruction": "Be short.", **QUICK}
    results = kt.evaluate(copying, "copy_text", chat=True, **options)
    context = results["samples"]["copy_text"][0]["arguments"][0][0]
    assert context == ("<start_of_turn>user\nBe short.\n\ncopy red:<end_of_turn>\n<start_of_turn>model\n")
    assert results["keras_t5gemma"]["chat"] is True


def test_human_eval_runs_code_only_if_that_is_allowed(copying, monkeypatch):
    with pytest.raises(ValueError, match=r"humaneval: this runs code .* run_code=True"):
        kt.evaluate(copying, ["humaneval"])
    solutions = [problem["canonical_solution"] for problem in human_eval.read_problems(2)]
    monkeypatch.setattr(kt.HarnessLM, "generated", lambda self, pairs: [solutions[0], "    pass\n"])
    results = kt.evaluate(copying, ["humaneval"], limit=2, run_code=True)
    assert results["results"]["humaneval"]["pass@1,none"] == 0.5
    assert results["n-samples"]["humaneval"] == {"original": 164, "effective": 2}


def test_command_prints_writes_and_compares(preset, tasks, tmp_path):
    folder, _ = tasks
    out = tmp_path / "results.json"
    arguments = ["--tasks", "copy_choice,copy_text", "--include-path", folder, "--out", out, "--compare"]
    result = CliRunner().invoke(
        app, ["evaluate", str(preset), *map(str, arguments), "--backend", keras.config.backend()]
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"copy_text .* exact_match .* 1\.0000", result.output)
    assert "No number is published for these tasks" in result.output
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["results"]["copy_choice"]["acc,none"] == 1.0
    assert written["keras_t5gemma"]["preset"] == str(preset)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --tasks or --suite"),
        (["--suite", "pt", "--tasks", "boolq"], "Give --tasks or --suite"),
        (["--suite", "pre"], "`--suite` must be one of pt, it"),
        (["--tasks", "humaneval"], "run_code=True (--run-code)"),
        (["--tasks", "copy_text", "--out", "no/such.json"], "the folder of --out, does not exist"),
        (["--tasks", "copy_text", "--include-path", "no_folder"], "Not found: no_folder"),
        (["--suite", "it", "--num-fewshot", "3"], "A suite has a number of examples per task"),
    ],
)
def test_command_refuses_what_it_cannot_do_before_a_model_is_loaded(arguments, message):
    result = CliRunner().invoke(app, ["evaluate", "no_model", *arguments])
    assert result.exit_code == 1
    assert message in result.output


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_limit_that_measures_nothing_is_refused(limit, copying):
    with pytest.raises(ValueError, match="`limit` must be a positive integer, a share below 1"):
        kt.evaluate(copying, ["arc_easy"], limit=limit, include_path=TASKS / "arc")


def test_misspelled_argument_is_refused_with_a_suggestion():
    with pytest.raises(TypeError, match=r"'numfewshot'\. Did you mean 'num_fewshot'\?"):
        kt.evaluate("t5gemma_s_s_ul2", ["arc_easy"], numfewshot=3)


def test_unknown_task_is_refused_with_a_suggestion(monkeypatch):
    # Instead of the 14,000 tasks of the harness, whose files take long to read.
    whole = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path, include_defaults=True: whole(include_path=TASKS / "arc", include_defaults=False),
    )
    with pytest.raises(ValueError, match=r"'arc_esy' is not a task.*Did you mean 'arc_easy'\?"):
        plan(["arc_esy"])


def test_task_whose_data_is_on_a_hub_fails_with_what_helps(copying):
    with pytest.raises(ConnectionError, match=r"A task needs data from a hub: .*use tasks of local files"):
        kt.evaluate(copying, ["arc_easy"], include_path=TASKS / "arc", **QUICK)


def test_tasks_of_the_suites_are_the_harness_own():
    folders = [
        "super_glue/boolq", "siqa", "piqa", "arc", "mmlu/default", "mmlu_pro", "hellaswag", "winogrande", "truthfulqa",
        "agieval", "bbh/cot_fewshot", "drop", "gpqa", "gsm8k", "lambada", "minerva_math", "mbpp", "nq_open", "triviaqa",
        "mgsm/direct",
    ]  # fmt: skip
    manager = lm_eval.tasks.TaskManager(include_path=[TASKS / name for name in folders], include_defaults=False)
    names = {row.task for suite in SUITES.values() for row in suite if row.task} - {human_eval.NAME}
    assert names <= set(manager.all_tasks)
    assert [len(suite) for suite in SUITES.values()] == [22, 10]


def test_suite_leaves_out_what_it_cannot_run_and_says_so(monkeypatch):
    monkeypatch.setattr("keras_t5gemma.evaluation.plan._task_manager", lambda tasks, paths: None)
    with pytest.warns(UserWarning, match="Left out of the suite 'pt': WMT23: .*; HumanEval: it runs code"):
        planned = plan("pt")
    assert planned.groups[25] == ["arc_challenge"]
    assert not planned.has_human_eval
    with pytest.warns(UserWarning, match="WMT23: lm-evaluation-harness has no such task"):
        assert plan("pt", run_code=True).has_human_eval


def test_scores_of_a_suite_are_percent_with_a_mean():
    results = {
        "gsm8k": {"exact_match,flexible-extract": 0.5},
        "mgsm_direct_de": {"exact_match,flexible-extract": 0.2},
        "mgsm_direct_en": {"exact_match,flexible-extract": 0.4},
    }
    assert suite_scores(SUITES["it"], results) == pytest.approx({"GSM8K": 50.0, "MGSM": 30.0, "mean of 2": 40.0})


def test_published_numbers_stand_beside_ones_own():
    results = {"results": {"arc_easy": {"acc_norm,none": 0.5}, "mine": {"acc,none": 1.0}}, "n-shot": {"arc_easy": 0}}
    (row,) = published.comparison(results, "pt")
    assert (row["benchmark"], row["ours"], row["shots"]) == ("ARC-e", 50.0, 0)
    assert row["published"] == {"Gemma 2 2B": 80.6, "Gemma 2 9B": 88.0}


def test_means_of_the_published_numbers_are_the_published_means():
    rows = [row for row in published.NUMBERS if row.source == published.GEMMA2]
    for model, mean in published.numbers_of("mean of these 17").items():
        values = [row.value for row in rows if row.model == model][:17]
        assert sum(values) / 17 == pytest.approx(mean, abs=0.05)


def test_page_of_published_numbers_is_made_of_them():
    assert (ROOT / "docs" / "paper.md").read_text(encoding="utf-8") == published.page()
