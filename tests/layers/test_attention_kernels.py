"""Attention by kernels of accelerators, run on a CPU: what is asked of them, and that the numbers are the plain ones.

What a kernel itself computes on its machine is the test marked `gpu`.
"""

import functools

import keras
import numpy as np
import pytest
from attention_cases import CASES, both

from keras_t5gemma.layers import attention_kernels as kernels

BACKEND = keras.config.backend()
KERNELS = {
    # The first has its numbers from a definition of its own, the second runs block by block as on the chip.
    "jax": {
        "tokamax": functools.partial(kernels.tokamax, implementation="xla"),
        "splash": functools.partial(kernels.splash, interpret=True),
    },
    "torch": {"flex": kernels.flex},
}.get(BACKEND, {})
pytestmark = pytest.mark.skipif(
    BACKEND == "tensorflow", reason="no library gives TensorFlow an attention kernel with soft caps"
)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_is_that_of_the_plain_one_and_gradients_are_where_the_library_has_them(case, name):
    if case.get("start") and name != "flex":
        pytest.skip("JAX's kernels begin with the first key, and are not asked: see the test of `kernel`")
    if case.get("dtype") == "float16" and name == "splash":
        pytest.skip("TPUs have no float16")
    # PyTorch: "FlexAttention does not support backward on CPU".
    gradients = name != "flex"
    found, expected = both(case, lambda _, *rest: KERNELS[name](*rest), gradients)
    rounding = {"bfloat16": 2e-2, "float16": 2e-3}.get(case.get("dtype"), 2e-6)
    for got, value, tolerance in zip(found, expected, [rounding] + 3 * [3 * rounding], strict=False):
        assert np.abs(value).max() > 0
        np.testing.assert_allclose(got, value, rtol=tolerance, atol=tolerance * np.abs(value).max())
