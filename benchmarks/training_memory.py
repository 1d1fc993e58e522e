"""Memory of training per parameter, and the sizes that fit a card: the tables of docs/training.md.

    python benchmarks/training_memory.py

The tables are computed from configurations, not measured. Weights, gradients and the optimizer's state must take at
most 80% of a card. The rest is for the program, and for activations, which `rematerialize` and `accumulation_steps`
make small.
"""

from keras_t5gemma.checkpoints.tensor_table import parameter_count
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.presets import PAIRS, STACKS

CARDS = (16, 24, 40, 80)
STATE_SHARE = 0.8
# LoRA's factors, of rank 8 by default, are less than a hundredth of the weights; each takes 16 bytes in float32.
LORA_SHARE = 0.01
# Title, bytes per parameter of weights, gradients, moments of matrices, moments of embeddings, and float32 copies.
# Adafactor's moments, a row and a column per matrix, are less than a hundredth of a byte.
SETTINGS = (
    ("float32, mixed", "AdamW", 4, 4, 8, 8, 0),
    ("float32, mixed", "Muon", 4, 4, 4, 8, 0),
    ("float32, mixed", "Adafactor", 4, 4, 0, 0, 0),
    ("bfloat16", "AdamW, float32 copies", 2, 2, 8, 8, 4),
    ("bfloat16", "AdamW", 2, 2, 8, 8, 0),
    ("bfloat16", "Muon", 2, 2, 4, 8, 0),
    ("bfloat16", "AdamW, bfloat16 moments", 2, 2, 4, 4, 0),
    ("bfloat16", "Adafactor", 2, 2, 0, 0, 0),
)
# From the most memory to the least; what fits a card is the first that does.
CHOICES = ("AdamW", "AdamW, bfloat16 moments", "Adafactor")


def bytes_per_parameter(setting):
    """The sum for a matrix and for an embedding."""
    _, _, weights, gradients, matrices, embeddings, copies = setting
    return tuple(weights + gradients + moments + copies for moments in (matrices, embeddings))


def optimizer_table():
    """The table of bytes per parameter: one row per dtype and optimizer."""
    lines = [
        "| weights | optimizer | weights | gradients | moments | float32 copies | bytes per parameter |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for setting in SETTINGS:
        dtype, name, weights, gradients, matrices, embeddings, copies = setting
        moments = f"{matrices}" if matrices == embeddings else f"{matrices}, embeddings {embeddings}"
        total = " to ".join(str(size) for size in dict.fromkeys(bytes_per_parameter(setting)))
        lines.append(f"| {dtype} | {name} | {weights} | {gradients} | {moments} | {copies} | {total} |")
    return "\n".join(lines)


def size_table():
    """The table of sizes: one row per published pair, with the state in GiB and the optimizers that fit each card."""
    lines = [
        "| pair | AdamW | Adafactor | LoRA | " + " | ".join(f"{card} GB" for card in CARDS) + " |",
        "| --- | ---: | ---: | ---: |" + " --- |" * len(CARDS),
    ]
    for encoder, decoder in PAIRS:
        count = parameter_count(T5GemmaConfig(STACKS[encoder], STACKS[decoder]))
        needed = {
            name: count * bytes_per_parameter(setting)[0] / 2**30
            for setting in SETTINGS
            if (name := setting[1]) in CHOICES and setting[0] == "bfloat16"
        }
        needed["LoRA"] = count * (2 + LORA_SHARE * 16) / 2**30
        cells = [
            next((name for name in (*CHOICES, "LoRA") if needed[name] <= STATE_SHARE * card), "none") for card in CARDS
        ]
        sizes = " | ".join(f"{needed[name]:.1f}" for name in ("AdamW", "Adafactor", "LoRA"))
        lines.append(f"| `{encoder}_{decoder}` | {sizes} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(optimizer_table(), size_table(), sep="\n\n")
