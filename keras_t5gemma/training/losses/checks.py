"""Checks of the loss that a model is compiled with."""

import keras

_BY_NAME = ("sparse_categorical_crossentropy", "categorical_crossentropy", "SparseCategoricalCrossentropy")
_CLASSES = keras.losses.SparseCategoricalCrossentropy, keras.losses.CategoricalCrossentropy


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
            f"`loss` must take logits, which are the model's outputs. Leave it out for the mean over target tokens, or "
            f"pass `keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="
            f'"mean_with_sample_weight")`. Received: {name}, which takes probabilities.'
        )
