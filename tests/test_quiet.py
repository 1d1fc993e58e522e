"""Ordinary use prints nothing that nobody asked for, on any backend: see `quiet_use`."""

import re

import keras
from helpers import pages
from helpers.launch import finish, output, start
from helpers.stand_ins import write_stand_ins

# What other libraries say of themselves, and this package has no way to call otherwise. Each pattern is a whole line.
NOT_OURS = {
    r"[IWE]0000 .* \d+ (cuda_platform|cudart_stub|port|cpu_feature_guard|cpu_utils)\.cc:\d+\] .*": "TensorFlow or JAX "
    "looks at the machine when it first computes",
    r"E0000 .* util\.cc:\d+\] oneDNN supports DT_INT32 only .*": "TensorFlow on some CPUs, in a product of integers",
    r"\S*/keras/src/\S+: DeprecationWarning: __array__ implementation doesn't accept .*": "Keras, of its own accord, "
    "when it saves and quantizes; Python hides it unless asked",
    r"  return np\.array\(.*\)": "the line of that one",
}


def test_ordinary_use_prints_nothing(tmp_path):
    (tmp_path / "models").mkdir()
    folders = write_stand_ins(tmp_path / "models", [(pages.ROOT / "README.md").read_text(encoding="utf-8")])
    (tmp_path / "out").mkdir()
    program = pages.ROOT / "tests" / "helpers" / "quiet_use.py"
    # "default" shows what Python hides in libraries, once per place.
    process = start(
        program,
        tmp_path / "out",
        *(f"{name}={folder}" for name, folder in folders.items()),
        PYTHONWARNINGS="default",
        KERAS_BACKEND=keras.config.backend(),
    )
    finish(process)
    printed = output(process).partition("begins\n")[2]
    assert printed.endswith("ends\n"), printed
    lines = printed.removesuffix("ends\n").splitlines()
    unasked = [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in NOT_OURS)]
    assert not unasked, "\n".join(unasked)
