import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from keras_t5gemma.data.objectives.example import Example, SpecialIds, model_arrays


def as_lists(arrays):
    x, y, sample_weight = arrays
    return {**x, "y": y, "sample_weight": sample_weight}


def test_model_arrays_on_the_docstrings_example_are_its():
    example = Example(inputs=np.array([51, 52, 7]), targets=np.array([7, 53]), complete=True)
    arrays = as_lists(model_arrays(example, encoder_length=4, decoder_length=5))
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "encoder_token_ids": [51, 52, 7, 0],
        "encoder_padding_mask": [1, 1, 1, 0],
        "decoder_token_ids": [2, 7, 53, 0, 0],
        "decoder_padding_mask": [1, 1, 1, 0, 0],
        "y": [7, 53, 1, 0, 0],
        "sample_weight": [1, 1, 1, 0, 0],
    }
    assert {name: array.dtype.name for name, array in arrays.items()} == dict.fromkeys(arrays, "int32") | {
        "sample_weight": "float32"
    }


def test_model_arrays_of_targets_that_go_on_end_without_eos():
    example = Example(inputs=np.array([51]), targets=np.array([52, 53]), complete=False)
    arrays = as_lists(model_arrays(example, encoder_length=1, decoder_length=2))
    assert arrays["y"].tolist() == [52, 53]
    assert arrays["decoder_token_ids"].tolist() == [2, 52]


def test_model_arrays_with_a_tokenizers_ids_use_them():
    tokenizer = SimpleNamespace(pad_token_id=9, end_token_id=8, start_token_id=7)
    example = Example(inputs=np.array([51]), targets=np.array([52]), complete=True)
    arrays = as_lists(model_arrays(example, 2, 3, SpecialIds.of(tokenizer)))
    assert arrays["encoder_token_ids"].tolist() == [51, 9]
    assert arrays["decoder_token_ids"].tolist() == [7, 52, 9]
    assert arrays["y"].tolist() == [52, 8, 9]


def test_special_ids_of_something_without_any_are_gemmas():
    assert SpecialIds.of(str.split) == SpecialIds(pad=0, eos=1, bos=2)


@pytest.mark.parametrize("lengths", [(2, 3), (3, 2)])
def test_model_arrays_too_short_for_the_example_refuse_rather_than_trim(lengths):
    example = Example(inputs=np.array([51, 52, 7]), targets=np.array([7, 53]), complete=True)
    with pytest.raises(ValueError, match="3 inputs and 3 labels does not fit"):
        model_arrays(example, *lengths)


def test_importing_an_objective_imports_neither_keras_nor_grain():
    code = (
        "import sys, keras_t5gemma.data.objectives.ul2, keras_t5gemma.data.objectives.prefix_lm\n"
        "print(sorted({'keras', 'tensorflow', 'jax', 'torch', 'grain'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
