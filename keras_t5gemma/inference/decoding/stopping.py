"""The end of generated sequences: stop ids, and the mask of the positions up to them."""

from keras import ops


def is_stop(token_ids, stop_token_ids):
    """Whether each id is a stop id: bool, with the shape of `token_ids`; all False if there are no stop ids."""
    stops = ops.zeros_like(token_ids, dtype="bool")
    for stop in stop_token_ids or ():
        stops = ops.logical_or(stops, ops.equal(token_ids, stop))
    return stops


def output_mask(token_ids, prompt_mask, stop_token_ids, limits=None):
    """The mask of the positions of generated sequences that belong to the result.

    With 1 as stop id, `P` a prompt's position and `.` anything:

        prompt  P P . . . .
        ids     2 7 9 1 4 0
        mask    1 1 1 1 0 0

    Args:
        token_ids: int [B, L].
        prompt_mask: bool [B, L], True at prompt tokens; stop ids in the prompt do not count.
        stop_token_ids: ids, or None to keep every position.
        limits: int [B], the maximum length of each row in tokens; L if None.

    Returns:
        bool [B, L], True up to and including the first stop id after the prompt.
    """
    stops = ops.logical_and(is_stop(token_ids, stop_token_ids), ops.logical_not(prompt_mask))
    stops = ops.cast(stops, "int32")
    mask = ops.equal(ops.cumsum(stops, axis=1) - stops, 0)
    if limits is None:
        return mask
    return ops.logical_and(mask, ops.arange(mask.shape[1], dtype="int32") < ops.expand_dims(limits, 1))
