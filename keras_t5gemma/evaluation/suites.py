"""The benchmarks of the paper as tasks of lm-evaluation-harness.

The paper (arXiv 2504.06225, section 4) names its benchmarks, but not the number of examples in the prompt. It compares
with Gemma 2 and follows its protocol, so that number is the one of Gemma 2's report (arXiv 2408.00118, table 13) where
it has the benchmark, and the harness's own elsewhere. Tasks that compare likelihoods are normalized by length in
characters, `acc_norm`, as Gemma 3's report says of Google's scoring, where the harness has that metric.
"""

import dataclasses

_GEMMA2 = "arXiv 2408.00118, table 13"
_HARNESS = "lm-evaluation-harness"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark of a suite.

    Attributes:
        name: the paper's.
        task: the harness's, or None if it has none.
        shots: examples in the prompt; None for the task's own.
        metric: its key in the harness's results, with the filter of answers after the comma.
        source: where the number of examples comes from.
    """

    name: str
    task: str | None
    shots: int | None
    metric: str
    source: str


PRETRAINED = (
    Benchmark("BoolQ", "boolq", 0, "acc,none", _GEMMA2),
    Benchmark("SIQA", "social_iqa", 0, "acc,none", _GEMMA2),
    Benchmark("PIQA", "piqa", 0, "acc_norm,none", _GEMMA2),
    Benchmark("ARC-c", "arc_challenge", 25, "acc_norm,none", _GEMMA2),
    Benchmark("ARC-e", "arc_easy", 0, "acc_norm,none", _GEMMA2),
    Benchmark("MMLU", "mmlu", 5, "acc,none", _GEMMA2),
    Benchmark("MMLU-Pro", "mmlu_pro", None, "exact_match,custom-extract", _HARNESS),
    Benchmark("HellaSwag", "hellaswag", 10, "acc_norm,none", _GEMMA2),
    Benchmark("WinoGrande", "winogrande", 5, "acc,none", _GEMMA2),
    Benchmark("TruthfulQA", "truthfulqa_mc2", None, "acc,none", _HARNESS),
    Benchmark("AGIEval", "agieval_en", 3, "acc,none", f"{_GEMMA2}, which has 3 to 5"),
    Benchmark("BBH", "bbh_cot_fewshot", 3, "exact_match,get-answer", _GEMMA2),
    Benchmark("DROP", "drop", 3, "f1,none", _GEMMA2),
    Benchmark("GPQA", "gpqa_main_zeroshot", None, "acc_norm,none", _HARNESS),
    Benchmark("GSM8K", "gsm8k", 5, "exact_match,flexible-extract", _GEMMA2),
    Benchmark("HumanEval", "humaneval", 0, "pass@1,none", _GEMMA2),
    Benchmark("LAMBADA", "lambada_openai", None, "acc,none", _HARNESS),
    Benchmark("MATH-500", "minerva_math500", None, "exact_match,none", _HARNESS),
    Benchmark("MBPP", "mbpp", 3, "pass_at_1,none", _GEMMA2),
    Benchmark("NQ", "nq_open", 5, "exact_match,remove_whitespace", _GEMMA2),
    Benchmark("TriviaQA", "triviaqa", 5, "exact_match,remove_whitespace", _GEMMA2),
    Benchmark("WMT23", None, None, "", _HARNESS),
)
INSTRUCTION_TUNED = (
    Benchmark("GSM8K", "gsm8k", 5, "exact_match,flexible-extract", _GEMMA2),
    Benchmark("MMLU", "mmlu", 5, "acc,none", _GEMMA2),
    Benchmark("MMLU-Pro", "mmlu_pro", None, "exact_match,custom-extract", _HARNESS),
    Benchmark("MBPP", "mbpp_instruct", 3, "pass_at_1,extract_code", _GEMMA2),
    Benchmark("HumanEval", "humaneval", 0, "pass@1,none", _GEMMA2),
    Benchmark("MATH-500", "minerva_math500", None, "exact_match,none", _HARNESS),
    Benchmark("BBH", "bbh_cot_fewshot", 3, "exact_match,get-answer", _GEMMA2),
    Benchmark("GPQA Diamond", "gpqa_diamond_cot_zeroshot", None, "exact_match,flexible-extract", _HARNESS),
    Benchmark("WMT23", None, None, "", _HARNESS),
    Benchmark("MGSM", "mgsm_direct", None, "exact_match,flexible-extract", _HARNESS),
)
# A name for `evaluate(lm, "pt")` and `--suite pt`.
SUITES = {"pt": PRETRAINED, "it": INSTRUCTION_TUNED}
# Tasks that run code which the model wrote.
CODE_TASKS = ("humaneval", "mbpp")


def runs_code(task: object) -> bool:
    """Whether a task, by its name, runs code of the model."""
    return isinstance(task, str) and task.startswith(CODE_TASKS)


def benchmark_of(task: str) -> Benchmark | None:
    """The benchmark that a task of the harness measures, or None."""
    rows = (row for suite in SUITES.values() for row in suite)
    return next((row for row in rows if row.task == task), None)
