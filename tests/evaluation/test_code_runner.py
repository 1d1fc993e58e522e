"""Programs with limits, and HumanEval's own solutions."""

import os

import pytest

from keras_t5gemma.evaluation.code_runner import Limits, runs_to_its_end
from keras_t5gemma.evaluation.human_eval import pass_at_1, program, read_problems, requests

SHORT = Limits(seconds=2)


@pytest.fixture(scope="module")
def problems():
    return read_problems()


def test_there_are_164_problems(problems):
    assert len(problems) == 164
    assert len(read_problems(3)) == 3
    assert len(read_problems(0.5)) == 82


# Spread over the file; one of them imports, one has a helper above its function.
@pytest.mark.parametrize("number", [0, 32, 38, 115, 163])
def test_canonical_solution_passes_and_one_without_its_work_fails(problems, number):
    problem = problems[number]
    assert runs_to_its_end(program(problem, problem["canonical_solution"]))
    assert not runs_to_its_end(program(problem, "    return None\n"))


@pytest.mark.parametrize(
    "text",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "x = bytearray(2 ** 31)",
        "open('large', 'w').write('x' * 10_000_000)",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "import os; os.kill(os.getpid(), 9)",
        "def broken(:",
    ],
)
def test_program_that_does_not_reach_its_end_does_not_pass(text):
    assert not runs_to_its_end(text, SHORT)


def test_program_sees_an_empty_folder_and_nothing_of_the_caller(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    held = os.open(tmp_path / "held", os.O_RDWR | os.O_CREAT)
    os.set_inheritable(held, True)
    try:
        assert runs_to_its_end(
            "import os, sys\n"
            "assert os.listdir('.') == []\n"
            "assert 'SECRET' not in os.environ\n"
            "assert sys.stdin.read() == ''\n"
            f"try:\n    os.fstat({held})\n"
            f"    same = os.path.samestat(os.fstat({held}), os.stat({str(tmp_path / 'held')!r}))\n"
            "except OSError:\n    same = False\n"
            "assert not same\n"
            "print('what is printed does not count')\n"
        )
    finally:
        os.close(held)


class Writer:
    """In place of a `HarnessLM`: answers with the canonical solutions, the first of them spoiled."""

    def __init__(self, problems):
        self.problems = problems

    def generated(self, pairs):
        assert [context for context, _ in pairs] == [problem["prompt"] for problem in self.problems]
        return ["    return 1\n"] + [problem["canonical_solution"] for problem in self.problems[1:]]


def test_pass_at_1_is_the_share_of_problems_solved(problems):
    found = pass_at_1(Writer(problems[:4]), chat=False, limit=4)
    assert found["pass@1"] == 0.75
    assert [sample["passed"] for sample in found["samples"]] == [False, True, True, True]


def test_chat_answers_start_with_the_function(problems):
    ((context, options),) = requests(problems[:1], chat=True)
    turns, _, start = context.rpartition("<start_of_turn>model\n")
    assert start == "```python\n" + problems[0]["prompt"]
    assert problems[0]["prompt"] in turns
    assert "\n```" in options["until"]
