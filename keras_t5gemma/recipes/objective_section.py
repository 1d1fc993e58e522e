"""Makes the objective of the section `[objective]` of a recipe."""

import warnings
from typing import Any

from keras_t5gemma.data.objectives.by_name import RECIPES, objective
from keras_t5gemma.data.objectives.example import Objective
from keras_t5gemma.data.objectives.mixture import Mixture
from keras_t5gemma.data.objectives.span_corruption import Denoiser
from keras_t5gemma.data.objectives.ul2 import UL2
from keras_t5gemma.recipes.schema import ObjectiveSection
from keras_t5gemma.suggestions import check_choice

SUPERVISED = "supervised"


def make_objective(section: ObjectiveSection) -> Objective | None:
    """Makes the objective of an `ObjectiveSection`.

    Returns:
        A `PrefixLM`, `SpanCorruption`, `UL2` or `Mixture`; None for "supervised", whose data are examples already.

    Raises:
        ValueError: if the section does not describe one objective, or a value is out of range.
    """
    stated = [key for key in ("name", "mixture", "denoisers") if getattr(section, key)]
    if len(stated) != 1:
        raise ValueError(f"it needs one of `name`, `mixture` and `denoisers`. Received: {', '.join(stated) or 'none'}.")
    if section.name == SUPERVISED:
        return None
    lengths = section.lengths
    if section.name:
        return _named(section.name, section)
    if section.mixture:
        return Mixture([(_named(part.name, section), part.weight) for part in section.mixture])
    denoisers = [(Denoiser(entry.mean_span, entry.rate), entry.weight) for entry in section.denoisers]
    return UL2(*lengths, mixture=denoisers, **_options("ul2", section))


def check_objective(section: ObjectiveSection) -> None:
    """Raises the errors of `make_objective`, without its warnings, which come when the run begins."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_objective(section)


def _named(name: str, section: ObjectiveSection) -> Objective:
    if name not in RECIPES:
        check_choice(name, "name", [*sorted(RECIPES), SUPERVISED], others=" (the last not in a mixture)")
    return objective(name, *section.lengths, **_options(name, section))


def _options(name: str, section: ObjectiveSection) -> dict[str, Any]:
    """The keyword arguments of an objective, from the keys that the section states."""
    modes, mode = section.mode_tokens, {"prefixlm": "S", "span_corruption": "R"}.get(name)
    options: dict[str, Any] = {}
    if modes:
        options |= {"mode_tokens": modes} if mode is None else {"mode_token": modes.get(mode)}
    if name != "prefixlm":
        options["too_few_sentinels"] = section.too_few_sentinels
        if section.sentinels:
            first, last = section.sentinels[0], section.sentinels[-1]
            if last <= first:
                raise ValueError(f"`sentinels` must be the first and the last id. Received: {section.sentinels}.")
            options["sentinels"] = range(first, last + 1)
    return options
