"""The next token of each row, by options that are numbers per row: other requests need no other program."""

from keras import ops

from keras_t5gemma.kernels.row_draws import draw_per_row
from keras_t5gemma.serving.rows import Rows

# Rows whose tokens to draw from are among so many likeliest ones need no sorted vocabulary.
CANDIDATES = 128


def penalized(logits, token_ids, index, rows: Rows):
    """Logits in which tokens that a row has already are less likely.

    Args:
        logits: [B, V].
        token_ids: int [B, L], the rows so far.
        index: int [B], the position of the logits.
        rows: the options.

    Returns:
        [B, V]; the logits themselves if no row has a penalty.
    """
    penalties = rows.repetition_penalty != 1, rows.presence_penalty != 0, rows.frequency_penalty != 0

    def apply():
        positions = ops.arange(token_ids.shape[1], dtype="int32")
        is_past = positions < ops.expand_dims(index, 1)
        is_new = ops.logical_and(is_past, positions >= ops.expand_dims(rows.prompt_lengths, 1))
        repetition, presence, frequency = (
            ops.expand_dims(ops.cast(x, logits.dtype), 1)
            for x in (rows.repetition_penalty, rows.presence_penalty, rows.frequency_penalty)
        )
        occurs = _counts(token_ids, is_past, logits.shape[1]) > 0
        weaker = ops.where(logits < 0, logits * repetition, logits / repetition)
        counts = _counts(token_ids, is_new, logits.shape[1])
        present, times = ops.cast(counts > 0, logits.dtype), ops.cast(counts, logits.dtype)
        return ops.where(occurs, weaker, logits) - present * presence - times * frequency

    has_any = ops.logical_or(ops.logical_or(*penalties[:2]), penalties[2])
    return ops.cond(ops.any(has_any), apply, lambda: logits)


def next_tokens(logits, index, rows: Rows):
    """Chooses: int32 [B] from logits [B, V].

    Each row gets what `generate` gives for it alone, with the sampler "greedy" or `TopKTopPSampler`. Each kind of
    choice is computed only if a row needs it, and a row's kind depends on that row alone.

    Args:
        logits: [B, V].
        index: int [B], the position of the tokens.
        rows: the options.
    """
    is_drawn = rows.temperature > 0
    greedy = ops.cast(ops.argmax(logits, axis=-1), "int32")
    drawn = ops.cond(ops.any(is_drawn), lambda: _drawn(logits, index, rows, is_drawn, greedy), lambda: greedy)
    return ops.where(is_drawn, drawn, greedy)


def _drawn(logits, index, rows: Rows, is_drawn, greedy):
    """`next_tokens` of the rows that draw; `greedy` for the others."""
    size = logits.shape[1]
    temperature = ops.where(is_drawn, rows.temperature, ops.ones_like(rows.temperature))
    chances = ops.softmax(ops.cast(logits, "float32") / ops.expand_dims(temperature, 1))
    is_whole = rows.top_k >= size
    is_plain = ops.logical_and(is_drawn, ops.logical_and(is_whole, rows.top_p > 1))
    is_cut = ops.logical_and(is_drawn, ops.logical_not(is_plain))
    narrow = min(CANDIDATES, size)

    def plain():
        return _draw(ops.log(chances), index, rows, ops.where(is_plain, size, 0))

    def from_few():
        kept, ids, reached = _kept(chances, narrow, rows)
        # Without a k, the nucleus may be wider than the candidates.
        fits = ops.logical_or(rows.top_k <= narrow, ops.logical_and(is_whole, reached))
        fits = ops.logical_and(is_cut, fits)
        chosen = _draw(ops.log(kept), index, rows, ops.where(fits, rows.top_k, 0))
        return _of_columns(ids, chosen), fits

    def from_all():
        kept, ids, _ = _kept(chances, size, rows)
        return _of_columns(ids, _draw(ops.log(kept), index, rows, ops.where(is_wide, rows.top_k, 0)))

    few, fits = ops.cond(ops.any(is_cut), from_few, lambda: (greedy, ops.zeros_like(is_cut)))
    is_wide = ops.logical_and(is_cut, ops.logical_not(fits))
    wide = greedy if narrow == size else ops.cond(ops.any(is_wide), from_all, lambda: greedy)
    whole = ops.cond(ops.any(is_plain), plain, lambda: greedy)
    return ops.where(is_plain, whole, ops.where(fits, few, ops.where(is_wide, wide, greedy)))


def _kept(chances, count: int, rows: Rows):
    """The tokens that rows draw from, of the `count` likeliest, as `TopKTopPSampler.candidates` selects them.

    Returns:
        `(chances, ids, reached)`: [B, count], the likeliest first, 0 for tokens that k or p excludes; int32 [B, count];
        and bool [B], whether the chances reach p.
    """
    ranked, ids = ops.top_k(chances, count)
    rank, k = ops.arange(count, dtype="int32"), ops.expand_dims(rows.top_k, 1)
    ranked = ops.where(rank < k, ranked, 0.0)
    total = ops.where(k > count, ops.sum(chances, axis=1, keepdims=True), ops.sum(ranked, axis=1, keepdims=True))
    summed, needed = ops.cumsum(ranked, axis=1), ops.expand_dims(rows.top_p, 1) * total
    is_kept = ops.logical_or(summed - ranked < needed, rank == 0)
    return ops.where(is_kept, ranked, 0.0), ops.cast(ids, "int32"), summed[:, -1] >= needed[:, 0]


def _draw(log_chances, index, rows: Rows, sizes):
    counts = ops.maximum(index - rows.prompt_lengths, 0)
    return draw_per_row(log_chances, rows.starts, counts, ops.cast(sizes, "int32"))


def _of_columns(ids, columns):
    return ops.take_along_axis(ids, ops.expand_dims(columns, 1), axis=1)[:, 0]


def _counts(token_ids, keep, vocabulary_size: int):
    """How often each token occurs in each row [B, L] where `keep` is True: int32 [B, V]."""
    rows, length = token_ids.shape
    places = token_ids + ops.expand_dims(ops.arange(rows, dtype="int32") * vocabulary_size, 1)
    ones = ops.reshape(ops.cast(keep, "int32"), (rows * length,))
    counts = ops.segment_sum(ones, ops.reshape(places, (rows * length,)), num_segments=rows * vocabulary_size)
    return ops.reshape(counts, (rows, vocabulary_size))
