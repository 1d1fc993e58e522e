"""Parts of a batch whose rows the loss compares with each other; `accumulation` says how their steps run."""

from keras import ops

from keras_t5gemma.training.steps.accumulation import cut_rows

# The key of y under which a model that `compares_rows` gets the gradients of its outputs.
GRADIENTS = "gradients_of_outputs"


def loss_of_outputs(model, outputs, y, sample_weight):
    """The loss of a batch whose rows are compared, from the outputs of all of them. It is counted in the metrics."""
    loss = model.compute_loss(y=y, y_pred=outputs, sample_weight=sample_weight, training=True)
    model.track_own_loss(loss)
    return loss


def with_gradients(parts, count, gradients):
    """The parts of a batch whose rows are compared, as they run for the second time.

    Args:
        parts: `(x, y, sample_weight)`, cut.
        count: n.
        gradients: those of the loss with respect to the outputs, [B, ...].

    Returns:
        `(parts, shares)`: `compute_loss` gets the gradients instead of labels.
    """
    gradients = cut_rows(gradients * ops.cast(count, gradients.dtype), count)
    return (parts[0], {GRADIENTS: gradients}, None), ops.ones((count,), "float32") / ops.cast(count, "float32")


def random_states(model):
    """The variables of a model that are the states of its random generators."""
    weights = {id(variable) for variable in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights]
