"""The error for copying a model layer by layer."""

import typing

if typing.TYPE_CHECKING:
    import keras


def part_of_a_model(layer: "keras.layers.Layer") -> NotImplementedError:
    """The error of a layer that has no config, because its model creates it.

    `keras.models.clone_model` asks each layer of a functional model for its config. It makes a plain `keras.Model` of
    the copies, which has no `generate`. The model's own class cannot change that.

    Args:
        layer: the layer that was asked for its config.

    Returns:
        The error, for the caller to raise.
    """
    return NotImplementedError(
        f"{type(layer).__name__} is part of a model and cannot be copied alone, as `keras.models.clone_model` does it. "
        f"Copy the whole model: `copy.deepcopy(model)` has its weights, its tokenizer and its compile arguments. "
        f"For a model with new weights: `kt.T5GemmaBackbone.from_config(backbone.get_config())`, and around it "
        f"`kt.T5GemmaSeq2SeqLM(new_backbone, model.preprocessor)`."
    )
