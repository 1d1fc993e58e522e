"""Checks of the loss that a model is compiled with."""

import keras

_CLASSES = (
    keras.losses.SparseCategoricalCrossentropy,
    keras.losses.CategoricalCrossentropy,
    keras.losses.BinaryCrossentropy,
)
_BY_NAME = (
    *(cls.__name__ for cls in _CLASSES),
    "sparse_categorical_crossentropy",
    "categorical_crossentropy",
    "binary_crossentropy",
)


def check_reads_logits(loss) -> None:
    """Refuses Keras's cross-entropies of probabilities: the model's outputs are logits.

    Args:
        loss: as for `keras.Model.compile`.

    Raises:
        ValueError: if the loss takes its inputs for probabilities; the message shows the loss of logits.
    """
    is_of_probabilities = isinstance(loss, _CLASSES) and not loss.get_config().get("from_logits")
    if is_of_probabilities or (isinstance(loss, str) and loss in _BY_NAME):
        name = loss if isinstance(loss, str) else type(loss).__name__
        raise ValueError(
            f"`loss` must take logits, which are the model's outputs. Leave it out for the model's own, or pass an "
            f"object with `from_logits=True`, such as `keras.losses.SparseCategoricalCrossentropy(from_logits=True, "
            f'reduction="mean_with_sample_weight")`. Received: {name}, which takes probabilities.'
        )
