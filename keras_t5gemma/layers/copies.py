"""What is said to those who copy a model layer by layer."""


def part_of_a_model(layer):
    """The error of a layer that has no config of its own, because it is made by its model.

    `keras.models.clone_model` asks each layer for its config.

    Args:
        layer: a `keras.layers.Layer`.

    Returns:
        A `NotImplementedError`.
    """
    return NotImplementedError(
        f"{type(layer).__name__} is part of a model and cannot be copied by itself. `keras.models.clone_model` copies "
        f"layer by layer, and its copies are plain `Functional` models, without `generate`. Copy the model as a whole: "
        f"`copy = type(model).from_config(model.get_config())`, and `copy.set_weights(model.get_weights())` for its "
        f"weights."
    )
