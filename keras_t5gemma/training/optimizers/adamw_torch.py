"""AdamW's step on PyTorch: its fused kernel."""

from keras_t5gemma.training.optimizers.low_precision import is_bfloat16
from keras_t5gemma.training.optimizers.stochastic_rounding import nearest_bfloat16, random_bits, stochastic_round

# Elements per chunk of a bfloat16 weight: float32 copies of a table of 256,000 x 2,304 would take ten gigabytes.
CHUNK = 2**24


def update(optimizer, grads, variables, learning_rate):
    """Updates all variables in place.

    Args:
        optimizer: an `AdamW`, within its update.
        grads: one per variable: float32 for float32 variables, any dtype for bfloat16 ones.
        variables: `keras.Variable`s.
        learning_rate: a scalar.
    """
    import torch

    learning_rate = float(learning_rate)
    pairs = list(zip(grads, variables, strict=True))
    float32_pairs = [pair for pair in pairs if not is_bfloat16(pair[1])]
    with torch.no_grad():
        for decay in {optimizer.decay_of(variable) for _, variable in float32_pairs}:
            group = [(grad, variable) for grad, variable in float32_pairs if optimizer.decay_of(variable) == decay]
            indices = [optimizer._get_variable_index(variable) for _, variable in group]
            _kernel(
                optimizer,
                [variable.value for _, variable in group],
                [grad.contiguous() for grad, _ in group],
                [optimizer._momentums[index].value for index in indices],
                [optimizer._velocities[index].value for index in indices],
                learning_rate,
                decay,
            )
        for grad, variable in pairs:
            if is_bfloat16(variable):
                _update_in_chunks(optimizer, grad, variable, learning_rate)


def _update_in_chunks(optimizer, grad, variable, learning_rate):
    """Updates one bfloat16 variable, chunk by chunk in float32.

    Args:
        optimizer: as for `update`.
        grad: its gradient, any float dtype.
        variable: a `keras.Variable`.
        learning_rate: a float.
    """
    index = optimizer._get_variable_index(variable)
    master = optimizer._master_weights[index]
    states = [variable, optimizer._momentums[index], optimizer._velocities[index]]
    # Tensors in bfloat16 are rounded stochastically, except a weight with a float32 copy: see below.
    keys = [optimizer.key_of(state) if is_bfloat16(state) else None for state in states]
    flat = [state.value.view(-1) for state in states]
    grad = grad.reshape(-1)
    flat_master = None if master is None else master.value.view(-1)
    for start in range(0, len(grad), CHUNK):
        chunk = slice(start, start + CHUNK)
        gradient = grad[chunk].float()
        if optimizer._clip_scale is not None:
            gradient = gradient * optimizer._clip_scale
        values = [tensor[chunk].float() for tensor in flat]  # the tensor itself if it is float32
        if master is not None:
            copy = flat_master[chunk]
            values[0] = copy.where(nearest_bfloat16(copy) == values[0], values[0])
        _kernel(optimizer, values[:1], [gradient], values[1:2], values[2:], learning_rate, optimizer.decay_of(variable))
        if master is not None:
            flat_master[chunk] = values[0]
            flat[0][chunk] = nearest_bfloat16(values[0])
        for tensor, value, key in list(zip(flat, values, keys, strict=True))[0 if master is None else 1 :]:
            if key is not None:
                tensor[chunk] = stochastic_round(value, random_bits(value.shape, key, start))


def _kernel(optimizer, values, grads, momentums, velocities, learning_rate, decay):
    """PyTorch's fused AdamW, with epsilon as in Keras; updates values and moments in place.

    Args:
        optimizer: as for `update`.
        values: float32 tensors.
        grads: float32 tensors, one per value.
        momentums: first moments, one per value.
        velocities: second moments, one per value.
        learning_rate: a float.
        decay: the weight decay, relative to the learning rate.
    """
    import torch
    from torch.optim.adamw import adamw

    step = float(optimizer.iterations)
    # Keras adds epsilon to the root before the bias is corrected, PyTorch after.
    correction = 1 - optimizer.beta_2 ** (step + 1)
    adamw(
        values,
        grads,
        momentums,
        velocities,
        [],
        # PyTorch counts the step itself, as float32 on the weights' device.
        [torch.full((), step, device=value.device) for value in values],
        fused=True,
        amsgrad=False,
        beta1=optimizer.beta_1,
        beta2=optimizer.beta_2,
        lr=learning_rate,
        weight_decay=decay,
        eps=optimizer.epsilon / correction**0.5,
        maximize=False,
    )
