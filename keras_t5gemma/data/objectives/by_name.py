"""`objective`, which makes an objective by its name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from keras_t5gemma.data.objectives.prefix_lm import PrefixLM
from keras_t5gemma.data.objectives.span_corruption import Denoiser, SpanCorruption
from keras_t5gemma.data.objectives.ul2 import MIXTURES, UL2
from keras_t5gemma.suggestions import check_choice

# Name -> function of (encoder_length, decoder_length, **options) that makes the objective.
RECIPES: dict[str, Callable[..., PrefixLM | SpanCorruption | UL2]] = {
    "prefixlm": PrefixLM,
    # T5's own (arXiv 1910.10683, section 3.3.4): 15% in spans of 3.
    "span_corruption": partial(SpanCorruption, Denoiser(3, 0.15)),
    **{name: partial(UL2, mixture=name) for name in MIXTURES},
}


def objective(name: str, encoder_length: int, decoder_length: int, **options: Any) -> PrefixLM | SpanCorruption | UL2:
    """Makes an objective by its name.

    >>> objective("t5gemma2", 512, 512) == UL2(512, 512, mixture="t5gemma2")
    True

    Args:
        name: "prefixlm", "span_corruption", "ul2" or "t5gemma2".
        encoder_length: S.
        decoder_length: T.
        **options: further arguments of `PrefixLM`, `SpanCorruption` or `UL2`, such as `sentinels` or `mode_tokens`.

    Returns:
        A `PrefixLM`, `SpanCorruption` or `UL2`.

    Raises:
        ValueError: if the name is unknown or an argument is out of range.
    """
    check_choice(name, "name", sorted(RECIPES))
    return RECIPES[name](encoder_length, decoder_length, **options)
