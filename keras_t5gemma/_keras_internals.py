"""What this package uses of Keras that Keras does not promise, with the versions it was checked with: 3.15.1."""


def synchronize_training_state(model):
    """Gives a model's variables their values back in the middle of a `fit`, an `evaluate` or a `predict` on JAX.

    There Keras takes the values out of the variables for the time of a loop, so that each step can overwrite those of
    the one before, and `Callback.model` alone puts them back. Once they are back, the next step takes them from the
    variables again, so that memory is as before. On other backends variables always have their values.

    Args:
        model: a `keras.Model`.
    """
    synchronize = getattr(model, "jax_state_sync", None)  # of JAX's trainer alone
    if synchronize is not None:
        synchronize()
