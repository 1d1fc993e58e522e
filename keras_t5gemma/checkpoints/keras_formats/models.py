"""keras-hub's Gemma 2 and T5Gemma models in memory, read as if they were Hugging Face checkpoints."""

import functools
from typing import Any

import keras
import keras_hub
import numpy as np

from keras_t5gemma.checkpoints.hugging_face.config import Gemma2Config
from keras_t5gemma.checkpoints.keras_formats.layouts import (
    GEMMA2,
    KERAS_HUB_T5GEMMA,
    AnyConfig,
    Layout,
    expected_tensors,
    stored_shape,
    to_stored,
)
from keras_t5gemma.checkpoints.tensor_source import DTYPES, CheckpointError, TensorSource
from keras_t5gemma.config import T5GemmaConfig, T5GemmaEncoderConfig


class KerasModelTensors(TensorSource):
    """A keras-hub model's weights, under the names and in the layout of a Hugging Face checkpoint.

    Args:
        backbone: a keras-hub backbone.
        layout: the layout of the backbone's class.
        config: the backbone's config.
        title: the model's name in messages.

    Raises:
        CheckpointError: if the model has superfluous variables, e.g. those of LoRA or of quantization.
    """

    def __init__(
        self,
        backbone: keras.Model,
        layout: Layout,
        config: T5GemmaConfig | T5GemmaEncoderConfig | Gemma2Config,
        title: str,
    ):
        self._title = title
        self._variables = {}
        for name, tensor in expected_tensors(config).items():
            place = layout.place(tensor)
            layer = functools.reduce(_child, place.attribute.split("/"), backbone)
            self._variables[name] = layer.weights[place.index], place.letters, tensor.row.stored_letters
        used = {id(variable) for variable, *_ in self._variables.values()}
        if surplus := [variable.path for variable in backbone.weights if id(variable) not in used]:
            raise CheckpointError(
                f"{title}: the variable {surplus[0]} is superfluous. Expected a model without LoRA and not quantized."
            )

    def names(self) -> list[str]:
        """The tensors' names in Hugging Face's checkpoints."""
        return list(self._variables)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape as Hugging Face stores it."""
        variable, letters, stored = self._variables[name]
        return stored_shape(variable.shape, letters, stored)

    def dtype(self, name: str) -> np.dtype:
        """The variable's dtype."""
        dtype = self._variables[name][0].dtype
        return DTYPES["BF16"] if dtype == "bfloat16" else np.dtype(dtype)

    def read(self, name: str) -> np.ndarray:
        """The variable as a numpy array in Hugging Face's layout."""
        variable, letters, stored = self._variables[name]
        return to_stored(np.asarray(keras.ops.convert_to_numpy(variable.value)), letters, stored)

    def where(self, name: str | None = None) -> str:
        """The model's class, and the variable's path."""
        return self._title if name is None else f"{self._title} ({self._variables[name][0].path})"


def read_gemma2(
    model: keras_hub.models.GemmaBackbone | keras_hub.models.GemmaCausalLM,
) -> tuple[Gemma2Config, KerasModelTensors]:
    """Opens a keras-hub Gemma 2 in memory: its config and its tensors.

    Args:
        model: a `keras_hub.models.GemmaBackbone` set up as Gemma 2, or a `GemmaCausalLM` around one.

    Raises:
        CheckpointError: if it is another model, or has settings that Gemma 2's block does not have.
    """
    return _read(model, keras_hub.models.GemmaBackbone, GEMMA2)


def read_t5gemma(
    model: keras_hub.models.T5GemmaBackbone | keras_hub.models.T5GemmaSeq2SeqLM,
) -> tuple[T5GemmaConfig, KerasModelTensors]:
    """Opens keras-hub's own T5Gemma in memory: its config and its tensors.

    The weights of that model are right, though its sliding windows are not.

    Args:
        model: a `keras_hub.models.T5GemmaBackbone`, or a `T5GemmaSeq2SeqLM` around one.

    Raises:
        CheckpointError: if it is another model, or has settings that we do not compute.
    """
    return _read(model, keras_hub.models.T5GemmaBackbone, KERAS_HUB_T5GEMMA)


def _read(model: Any, cls: type, layout: Layout[AnyConfig]) -> tuple[AnyConfig, KerasModelTensors]:
    """Checks the model's class, reads its config, and matches its variables with the layout."""
    backbone = getattr(model, "backbone", model)
    if not isinstance(backbone, cls):
        raise CheckpointError(f"Expected a keras_hub.models.{cls.__name__}. Received: {type(model).__name__}.")
    title = f"keras-hub's {type(backbone).__name__}"
    config = layout.read_config(backbone.get_config(), title)
    return config, KerasModelTensors(backbone, layout, config, title)


def _child(layer: Any, step: str) -> Any:
    """An item of a list of layers, or an attribute of a layer."""
    return layer[int(step)] if step.isdigit() else getattr(layer, step)
