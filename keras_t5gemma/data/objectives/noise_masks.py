"""Where the corrupted spans of a sequence lie, and the inputs and targets that follow from them."""

import numpy as np

# How often spans are drawn around protected tokens before more of them are opened.
_DRAWS = 8


def random_mask(length, noise, spans, rng):
    """Spans at random: which of `length` tokens are corrupted.

    Corrupted and kept tokens are each cut into `spans` parts, none empty, and interleaved from a kept part on: the
    sequence starts kept and ends corrupted (T5's `random_spans_noise_mask`).

    Args:
        length: L.
        noise: corrupted tokens, at least `spans`.
        spans: corrupted spans; at most L - noise.
        rng: a `numpy.random.Generator`.

    Returns:
        bool [L].
    """
    if noise == length:
        return np.ones(length, bool)
    parts = np.empty(2 * spans, int)
    parts[0::2] = _random_parts(length - noise, spans, rng)
    parts[1::2] = _random_parts(noise, spans, rng)
    return np.repeat(np.arange(2 * spans) % 2 == 1, parts)


def mask_around(protected, noise, spans, max_spans, rng):
    """The same where some tokens may not be corrupted: spans lie between them.

    Spans are drawn as if the protected tokens were not there. One that turns out to lie on both sides of such a token
    keeps its longest piece, and it and the others grow by what the rest held, so that tokens and spans stay as many as
    asked for. `P` is protected, `x` corrupted:

        drawn without P      . . x x x x . . x x          6 corrupted in 2 spans
        with P back          . . x P x x x . . x x        a span on both sides
        repaired             . . . P x x x x . x x        its longest piece, grown by one

    Where that does not work out, spans are drawn anew, and keep any of their pieces. Only where it never does, because
    protected tokens lie too close, are further spans opened, up to `max_spans`, and only where there is no room for
    those either is less corrupted than asked for.

    Args:
        protected: bool [L], not all True.
        noise: corrupted tokens, at least `spans`.
        spans: corrupted spans.
        max_spans: the most spans there may be.
        rng: a `numpy.random.Generator`.

    Returns:
        bool [L], False wherever `protected` is True.
    """
    free = np.flatnonzero(~protected)
    noise = min(noise, max(len(free) - 1, 1))
    spans = min(spans, noise, max(len(free) - noise, 1))
    for draw in range(_DRAWS):
        mask = np.zeros(len(protected), bool)
        mask[free] = random_mask(len(free), noise, spans, rng)
        missing = _repair(mask, protected, spans, rng, keep_longest=draw == 0)
        if not missing:
            return mask
    _open_spans(mask, protected, max_spans - spans, missing)
    return mask


def span_bounds(mask):
    """Starts and ends of a mask's runs of True, two int arrays [number of runs]."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return edges[0::2], edges[1::2]


def corrupt(ids, mask, sentinels):
    """Inputs and targets of a sequence.

    >>> corrupt(np.array([51, 52, 53, 54]), np.array([False, True, True, False]), np.array([7, 8]))
    (array([51, 7, 54]), array([7, 52, 53]))

    Args:
        ids: [L].
        mask: bool [L], which are corrupted.
        sentinels: at least as many ids as the mask has spans.

    Returns:
        `(inputs, targets)`: each span is a sentinel in the inputs, and that sentinel and the span in the targets.
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
    # A sentinel stands before the noise of its span, behind that of the spans before and their sentinels.
    is_noise = np.ones(len(noise) + len(starts), bool)
    places = np.cumsum(mask)[starts] - 1 + np.arange(len(starts))
    is_noise[places] = False
    targets = np.empty(len(is_noise), ids.dtype)
    targets[places] = sentinels
    targets[is_noise] = noise
    return with_holes[keep], targets


def _random_parts(total, parts, rng):
    """`total` cut into `parts` lengths of at least 1; every such cut is equally likely."""
    if parts == 1:
        return total
    cuts = np.empty(parts + 1, int)
    cuts[0], cuts[-1] = 0, total
    cuts[1:-1] = rng.choice(total - 1, parts - 1, replace=False, shuffle=False)
    cuts[1:-1].sort()
    cuts[1:-1] += 1
    return cuts[1:] - cuts[:-1]


def _grow(mask, protected, start, end, most):
    """Grows a span by up to `most` kept tokens beside it, one kept before the next span; returns by how many."""
    before = most
    while most and end < len(mask) and not protected[end] and not mask[end + 1 : end + 2].any():
        mask[end] = True
        end, most = end + 1, most - 1
    while most and start > 1 and not protected[start - 1] and not mask[start - 2]:
        start, most = start - 1, most - 1
        mask[start] = True
    return before - most


def _repair(mask, protected, spans, rng, *, keep_longest):
    """Takes all but one piece out of each span with protected tokens in it, and grows spans by as much.

    The longest piece is the one to keep, but may have no room to grow: then any other may do.

    Returns:
        How many tokens there was no room for.
    """
    starts, ends = span_bounds(mask)
    if len(starts) == spans:
        return 0
    place = np.cumsum(~protected)
    kept, missing = [], 0
    for piece in zip(starts.tolist(), ends.tolist(), strict=True):
        # The piece goes on with the span before where no unprotected token lies between them.
        if kept and place[piece[0]] == place[kept[-1][1] - 1] + 1:
            out, kept[-1] = kept[-1], piece
            if out[1] - out[0] > piece[1] - piece[0] if keep_longest else rng.random() < 0.5:
                out, kept[-1] = piece, out
            mask[slice(*out)] = False
            missing += out[1] - out[0]
            # As long as its span goes on, what is kept stands for all of it.
            place[kept[-1][1] - 1] = place[piece[1] - 1]
        else:
            kept.append(piece)
    for i in rng.permutation(len(kept)):
        if missing:
            missing -= _grow(mask, protected, *kept[i], missing)
    return missing


def _open_spans(mask, protected, most, missing):
    """Opens up to `most` further spans of `missing` tokens in all, the longest that there is room for first."""
    for _ in range(most):
        room = ~(mask | protected)
        # A neighbour that is corrupted would make one span of two, and the sequence starts kept.
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
