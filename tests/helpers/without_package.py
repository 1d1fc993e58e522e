"""Scripts in a process that has neither this package nor PyTorch: what a user of an exported folder runs."""

import json
import os
import subprocess
import sys

_BLOCKED = ("keras_t5gemma", "keras_hub", "torch", "transformers", "jax")
_START = f"""
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {_BLOCKED}:
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Blocked())
"""


def run(script, **values):
    """Runs a script, whose `values` are a dict, and returns what it assigns to `result`.

    Args:
        script: Python. It cannot import this package.
        **values: what JSON can hold.
    """
    code = f"{_START}\nimport json\nvalues = json.loads(sys.argv[1])\n{script}\nprint('RESULT', json.dumps(result))"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "KERAS_BACKEND")}
    environment = {**environment, "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-c", code, json.dumps(values)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1].removeprefix("RESULT "))
