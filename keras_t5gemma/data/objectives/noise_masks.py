"""Noise masks: the places of corrupted spans in a sequence, and the inputs and targets of a mask."""

import numpy as np

# Attempts to draw spans around protected tokens, before further spans are opened.
_MAX_DRAWS = 8


def random_mask(length: int, noise: int, spans: int, rng: np.random.Generator) -> np.ndarray:
    """Draws corrupted spans at random places.

    The corrupted and the kept tokens are each cut into `spans` parts of at least one token. The parts alternate,
    starting with a kept one, so the sequence starts kept and ends corrupted (T5's `random_spans_noise_mask`).

    Args:
        length: L.
        noise: number of corrupted tokens, at least `spans`.
        spans: number of corrupted spans, at most L - noise.
        rng: a `numpy.random.Generator`.

    Returns:
        bool [L], True on corrupted tokens.
    """
    if noise == length:
        return np.ones(length, bool)
    parts = np.empty(2 * spans, int)
    parts[0::2] = _random_parts(length - noise, spans, rng)
    parts[1::2] = _random_parts(noise, spans, rng)
    return np.repeat(np.arange(2 * spans) % 2 == 1, parts)


def mask_around(protected: np.ndarray, noise: int, spans: int, max_spans: int, rng: np.random.Generator) -> np.ndarray:
    """Draws corrupted spans that lie between protected tokens.

    Spans are drawn as if the protected tokens were not there. A span on both sides of a protected token keeps its
    longest piece, and this piece and the other spans grow by the size of its other pieces, so that the numbers of
    tokens and spans do not change. `P` is protected, `x` corrupted:

        drawn without P      . . x x x x . . x x          6 corrupted in 2 spans
        with P back          . . x P x x x . . x x        a span on both sides
        repaired             . . . P x x x x . x x        its longest piece, grown by one

    If the spans cannot grow enough, new ones are drawn, and then a span may keep any of its pieces. If every attempt
    fails, because protected tokens lie too close together, further spans are opened, up to `max_spans`. Only if there
    is no room for these either are fewer than `noise` tokens corrupted.

    Args:
        protected: bool [L], not all True.
        noise: number of corrupted tokens, at least `spans`.
        spans: number of corrupted spans.
        max_spans: the maximum number of spans.
        rng: a `numpy.random.Generator`.

    Returns:
        bool [L], False wherever `protected` is True.
    """
    free = np.flatnonzero(~protected)
    noise = min(noise, max(len(free) - 1, 1))
    spans = min(spans, noise, max(len(free) - noise, 1))
    mask, missing = np.zeros(len(protected), bool), noise
    for draw in range(_MAX_DRAWS):
        mask = np.zeros(len(protected), bool)
        mask[free] = random_mask(len(free), noise, spans, rng)
        missing = _repair(mask, protected, spans, rng, keep_longest=draw == 0)
        if not missing:
            return mask
    _open_spans(mask, protected, max_spans - spans, missing)
    return mask


def span_bounds(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of a mask's runs of True, two int arrays [number of runs]."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return edges[0::2], edges[1::2]


def corrupt(ids: np.ndarray, mask: np.ndarray, sentinels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits a sequence into inputs and targets by its noise mask.

    >>> corrupt(np.array([51, 52, 53, 54]), np.array([False, True, True, False]), np.array([7, 8]))
    (array([51,  7, 54]), array([ 7, 52, 53]))

    Args:
        ids: [L].
        mask: bool [L], True on corrupted ids.
        sentinels: at least one id per span of the mask.

    Returns:
        `(inputs, targets)`: each span is a sentinel in the inputs, and this sentinel and the span in the targets.
    """
    starts = np.flatnonzero(mask[1:] > mask[:-1]) + 1
    if mask[0]:
        starts = np.append(0, starts)
    sentinels = sentinels[: len(starts)]
    with_holes = ids.copy()
    with_holes[starts] = sentinels
    keep = ~mask
    keep[starts] = True
    noise = ids[mask]
    # A sentinel stands before the noise of its span, and after the noise and the sentinels of the spans before it.
    is_noise = np.ones(len(noise) + len(starts), bool)
    places = np.cumsum(mask)[starts] - 1 + np.arange(len(starts))
    is_noise[places] = False
    targets = np.empty(len(is_noise), ids.dtype)
    targets[places] = sentinels
    targets[is_noise] = noise
    return with_holes[keep], targets


def _random_parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray | int:
    """Cuts `total` into `parts` lengths of at least 1, an int array [parts]. All such cuts are equally likely."""
    if parts == 1:
        return total
    cuts = np.empty(parts + 1, int)
    cuts[0], cuts[-1] = 0, total
    cuts[1:-1] = rng.choice(total - 1, parts - 1, replace=False, shuffle=False)
    cuts[1:-1].sort()
    cuts[1:-1] += 1
    return cuts[1:] - cuts[:-1]


def _grow(mask: np.ndarray, protected: np.ndarray, start: int, end: int, limit: int) -> int:
    """Grows a span by up to `limit` tokens beside it, and leaves a kept token before the next span.

    Returns:
        The number of tokens by which the span has grown.
    """
    remaining = limit
    while remaining and end < len(mask) and not protected[end] and not mask[end + 1 : end + 2].any():
        mask[end] = True
        end, remaining = end + 1, remaining - 1
    while remaining and start > 1 and not protected[start - 1] and not mask[start - 2]:
        start, remaining = start - 1, remaining - 1
        mask[start] = True
    return limit - remaining


def _repair(
    mask: np.ndarray, protected: np.ndarray, spans: int, rng: np.random.Generator, *, keep_longest: bool
) -> int:
    """Reduces each span that protected tokens divide to one piece, and grows all spans by the removed tokens.

    The longest piece is the usual choice, but it may have no room to grow. Without `keep_longest`, it is a random one.

    Returns:
        The number of tokens for which there was no room.
    """
    starts, ends = span_bounds(mask)
    if len(starts) == spans:
        return 0
    rank = np.cumsum(~protected)  # of each token among the tokens that are not protected
    pieces, missing = [], 0
    for piece in zip(starts.tolist(), ends.tolist(), strict=True):
        # If no unprotected token lies between this piece and the last one, both are pieces of one span.
        if pieces and rank[piece[0]] == rank[pieces[-1][1] - 1] + 1:
            removed, pieces[-1] = pieces[-1], piece
            if removed[1] - removed[0] > piece[1] - piece[0] if keep_longest else rng.random() < 0.5:
                removed, pieces[-1] = piece, removed
            mask[slice(*removed)] = False
            missing += removed[1] - removed[0]
            # The remaining piece also stands for the removed one: the span may go on behind it.
            rank[pieces[-1][1] - 1] = rank[piece[1] - 1]
        else:
            pieces.append(piece)
    for i in rng.permutation(len(pieces)):
        if missing:
            start, end = pieces[i]
            missing -= _grow(mask, protected, start, end, missing)
    return missing


def _open_spans(mask: np.ndarray, protected: np.ndarray, max_new: int, missing: int) -> None:
    """Opens up to `max_new` further spans of `missing` tokens in total, the longest possible ones first."""
    for _ in range(max_new):
        room = ~(mask | protected)
        # A span beside a corrupted token would merge with its span, and the sequence starts with a kept token.
        room[0] = False
        room[1:] &= ~mask[:-1]
        room[:-1] &= ~mask[1:]
        starts, ends = span_bounds(room)
        if not missing or not len(starts):
            return
        longest = np.argmax(ends - starts)
        size = min(missing, ends[longest] - starts[longest])
        mask[starts[longest] : starts[longest] + size] = True
        missing -= size
