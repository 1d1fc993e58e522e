"""lm-evaluation-harness as a client: its model for chats over HTTP."""

import importlib.util
import json

import lm_eval
import pytest
from lm_eval.models import api_models
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from tqdm.asyncio import tqdm_asyncio

TASK = """
task: questions
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["{stop}", "#never#"]
  max_gen_toks: 9
metric_list:
  - metric: exact_match
"""
QUESTIONS = ("Why is the sky?", "knock", "12 apples")


@pytest.fixture
def retries(monkeypatch):
    """Requests are sent once if `tenacity` is not there, which the harness does not install by itself.

    Its module then misses that name, and those that it imports after it.
    """
    if importlib.util.find_spec("tenacity"):
        return
    monkeypatch.setattr(api_models, "find_spec", lambda name: name)
    monkeypatch.setattr(api_models, "tqdm", tqdm, raising=False)
    monkeypatch.setattr(api_models, "tqdm_asyncio", tqdm_asyncio, raising=False)
    monkeypatch.setattr(api_models, "RetryError", ArithmeticError, raising=False)
    for name in ("stop_after_attempt", "wait_exponential"):
        monkeypatch.setattr(api_models, name, lambda *_, **__: None, raising=False)
    monkeypatch.setattr(api_models, "retry", lambda **_: lambda function: function, raising=False)


@pytest.mark.usefixtures("retries")
@pytest.mark.parametrize("concurrent", [1, 3])
def test_chats_of_the_harness_are_answered_as_by_generate(server, lm, tmp_path, monkeypatch, concurrent):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-the-tests")
    whole = [lm.generate(question, max_new_tokens=9) for question in QUESTIONS]
    stop = whole[1][1:3]
    expected = [text.partition(stop)[0] for text in whole]
    answers = [expected[0], expected[1], "another"]
    rows = tmp_path / "rows.jsonl"
    pairs = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, answers, strict=True)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    task = TASK.format(rows=rows, stop=stop.replace("\\", "\\\\").replace('"', '\\"'))
    (tmp_path / "questions.yaml").write_text(task, encoding="utf-8")
    results = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args={"base_url": f"{server.url}/v1/chat/completions", "model": "tiny", "num_concurrent": concurrent},
        tasks=["questions"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    found = {sample["doc_id"]: sample["resps"][0][0] for sample in results["samples"]["questions"]}
    assert [found[i] for i in range(3)] == expected
    assert results["results"]["questions"]["exact_match,none"] == pytest.approx(2 / 3)
