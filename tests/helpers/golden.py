"""Writes `golden.npz`: a tiny loud T5Gemma's weights, inputs and logits, as `transformers` 5.23 computes them.

    python tests/helpers/golden.py

The file is kept so that all backends are held to the same numbers, and a later `transformers` too.
"""

import sys
from pathlib import Path

import numpy as np

GOLDEN_FILE = Path(__file__).with_name("golden.npz")
INPUT_NAMES = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask")


def golden_config():
    """Unbalanced and loud, small enough for a repository."""
    from helpers.peers import tiny_config

    return tiny_config(balanced=False, num_layers=2, vocabulary_size=64)


def main():
    import torch

    from helpers.peers import hf_logits, hf_t5gemma, loud_inputs

    config = golden_config()
    model = hf_t5gemma(config, seed=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())  # exact in float16, which halves the file
    weights = {name: parameter.detach().half().numpy() for name, parameter in model.named_parameters()}
    inputs = loud_inputs(config, seed=7)
    np.savez_compressed(GOLDEN_FILE, **weights, **inputs, logits=hf_logits(model, inputs))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
