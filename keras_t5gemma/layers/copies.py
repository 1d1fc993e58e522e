"""The error for copying a model layer by layer."""


def part_of_a_model(layer):
    """The error of a layer that has no config of its own, because its model makes it.

    `keras.models.clone_model` asks each layer of a functional model for its config, and makes a `keras.Model` of the
    copies, which has no `generate`. The model's own class has no say in it.

    Args:
        layer: a `keras.layers.Layer`.

    Returns:
        A `NotImplementedError`.
    """
    return NotImplementedError(
        f"{type(layer).__name__} is part of a model and cannot be copied alone, as `keras.models.clone_model` does it. "
        f"Copy the whole model: `copy.deepcopy(model)` has its weights, its tokenizer and what it was compiled with. "
        f"For one with new weights: `kt.T5GemmaBackbone.from_config(backbone.get_config())`, and around it "
        f"`kt.T5GemmaSeq2SeqLM(new_backbone, model.preprocessor)`."
    )
