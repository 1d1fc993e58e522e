"""The published sizes, pairs and checkpoints: one row per size, everything else is computed."""

import dataclasses
from typing import Any

from keras_t5gemma.config import StackConfig
from keras_t5gemma.suggestions import did_you_mean

# One row per stack, from the model cards and `config.json` of google/t5gemma-* (2025):
#       layers, hidden, feed-forward, query heads, kv heads, head size
_SIZES = {
    "s": (8, 512, 1024, 8, 8, 64),
    "b": (12, 768, 2048, 12, 12, 64),
    "l": (24, 1024, 2816, 16, 16, 64),
    "ml": (26, 1152, 6912, 4, 4, 256),
    "xl": (24, 2048, 5120, 32, 32, 64),
    "2b": (26, 2304, 9216, 8, 4, 256),
    "9b": (42, 3584, 14336, 16, 8, 256),
}
STACKS = {name: StackConfig(*row) for name, row in _SIZES.items()}
PAIRS = (
    ("s", "s"),
    ("b", "b"),
    ("l", "l"),
    ("ml", "ml"),
    ("xl", "xl"),
    ("2b", "2b"),
    ("9b", "2b"),
    ("9b", "9b"),
)
OBJECTIVES = ("ul2", "prefixlm")


@dataclasses.dataclass(frozen=True)
class Preset:
    """One published checkpoint.

    Attributes:
        encoder: the encoder's size, a key of `STACKS`.
        decoder: the decoder's size, a key of `STACKS`.
        objective: the pretraining objective, one of `OBJECTIVES`.
        instruction_tuned: whether it was tuned on instructions, and so reads prompts in turns.
    """

    encoder: str
    decoder: str
    objective: str
    instruction_tuned: bool

    @property
    def name(self) -> str:
        """The name that `from_preset` takes, e.g. "t5gemma_9b_2b_prefixlm_it"."""
        return f"t5gemma_{self._stem('_')}"

    @property
    def hf_handle(self) -> str:
        """The handle of the checkpoint on Hugging Face, in the format of `transformers`."""
        return f"hf://google/t5gemma-{self._stem('-')}"

    @property
    def kaggle_handle(self) -> str:
        """The handle of the checkpoint on Kaggle, in Keras's format (keras-hub's own T5Gemma)."""
        return f"kaggle://keras/t5-gemma/keras/{self.name}/1"

    def _stem(self, separator: str) -> str:
        parts = [self.encoder, self.decoder, self.objective] + ["it"] * self.instruction_tuned
        return separator.join(parts)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(encoder, decoder, objective, tuned)
        for encoder, decoder in PAIRS
        for objective in OBJECTIVES
        for tuned in (False, True)
    )
}


def stack(size: str | StackConfig | dict[str, Any]) -> StackConfig:
    """The `StackConfig` of a size name, a config or a dict of fields.

    Args:
        size: a key of `STACKS` ("s" .. "9b"), a `StackConfig`, or a dict of its fields.

    Raises:
        ValueError: if the name is unknown or the value is invalid.
    """
    if isinstance(size, StackConfig):
        return size
    if isinstance(size, str):
        if size not in STACKS:
            raise ValueError(
                f"Unknown stack size {size!r}. Known sizes: {', '.join(STACKS)}.{did_you_mean(size, STACKS)}"
            )
        return STACKS[size]
    if isinstance(size, dict):
        return StackConfig.from_dict(size)
    raise ValueError(f"A stack is a size name ({', '.join(STACKS)}), a StackConfig or a dict. Received: {size!r}.")
