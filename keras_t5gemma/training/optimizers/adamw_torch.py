"""AdamW's step on PyTorch: its fused kernel."""

from keras_t5gemma.training.optimizers.low_precision import is_bfloat16
from keras_t5gemma.training.optimizers.stochastic_rounding import nearest_bfloat16, random_bits, stochastic_round

# Elements of a bfloat16 weight at a time: float32 copies of a table of 256,000 x 2,304 would take ten gigabytes.
CHUNK = 2**24


def update(optimizer, grads, variables, learning_rate):
    """All variables' steps, in place.

    Args:
        optimizer: an `AdamW`, within its update.
        grads: float32 for float32 variables, any for bfloat16 ones.
        variables: `keras.Variable`s.
        learning_rate: a scalar.
    """
    import torch

    learning_rate = float(learning_rate)
    pairs = list(zip(grads, variables, strict=True))
    whole = [pair for pair in pairs if not is_bfloat16(pair[1])]
    with torch.no_grad():
        for decay in {optimizer.decay_of(variable) for _, variable in whole}:
            chosen = [(grad, variable) for grad, variable in whole if optimizer.decay_of(variable) == decay]
            places = [optimizer._get_variable_index(variable) for _, variable in chosen]
            _kernel(
                optimizer,
                [variable.value for _, variable in chosen],
                [grad.contiguous() for grad, _ in chosen],
                [optimizer._momentums[place].value for place in places],
                [optimizer._velocities[place].value for place in places],
                learning_rate,
                decay,
            )
        for grad, variable in pairs:
            if is_bfloat16(variable):
                _update_in_chunks(optimizer, grad, variable, learning_rate)


def _update_in_chunks(optimizer, grad, variable, learning_rate):
    """One bfloat16 variable's step, some numbers at a time in float32."""
    place = optimizer._get_variable_index(variable)
    master = optimizer._master_weights[place]
    stored = [variable, optimizer._momentums[place], optimizer._velocities[place]]
    # Bits are drawn for what is stored in bfloat16, but for a weight that has a float32 copy.
    keys = [optimizer.key_of(state) if is_bfloat16(state) else None for state in stored]
    flat = [state.value.view(-1) for state in stored]
    grad = grad.reshape(-1)
    copies = None if master is None else master.value.view(-1)
    for start in range(0, len(grad), CHUNK):
        chunk = slice(start, start + CHUNK)
        gradient = grad[chunk].float()
        if optimizer._clip_scale is not None:
            gradient = gradient * optimizer._clip_scale
        values = [tensor[chunk].float() for tensor in flat]  # the tensor itself if it is float32
        if master is not None:
            values[0] = copies[chunk].where(nearest_bfloat16(copies[chunk]) == values[0], values[0])
        _kernel(optimizer, values[:1], [gradient], values[1:2], values[2:], learning_rate, optimizer.decay_of(variable))
        if master is not None:
            copies[chunk] = values[0]
            flat[0][chunk] = nearest_bfloat16(values[0])
        for tensor, value, key in list(zip(flat, values, keys, strict=True))[0 if master is None else 1 :]:
            if key is not None:
                tensor[chunk] = stochastic_round(value, random_bits(value.shape, key, start))


def _kernel(optimizer, values, grads, momentums, velocities, learning_rate, decay):
    """PyTorch's fused AdamW, with Keras's place for epsilon."""
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
