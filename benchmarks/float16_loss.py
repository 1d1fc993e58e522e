"""Gradients of the chunked loss in float16 compared with float32, at the size of Gemma's vocabulary.

    KERAS_BACKEND=jax python benchmarks/float16_loss.py [--pieces 256000] [--tokens 4096] [--width 64]

An error is the norm of the difference, relative to the norm of float32's gradient. The loss has the initial scale of
`LossScaleOptimizer`. tests/training/losses/test_float16_loss.py asserts the same for a vocabulary of 32,000.
"""

import argparse
import sys
from pathlib import Path

import record

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "training" / "losses"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=256_000)
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--width", type=int, default=64)
    record.add_options(parser)
    options = parser.parse_args()
    import keras
    from test_float16_loss import errors

    of_hidden, of_table = errors(options.pieces, 4, options.tokens // 4, width=options.width)
    print(
        f"{keras.config.backend()}: {options.pieces:,} pieces, {options.tokens:,} tokens, width {options.width}: "
        f"hidden states {of_hidden:.3%}, table {of_table:.3%}"
    )
    row = {
        "topic": "Float16",
        "backend": keras.config.backend(),
        "pieces": options.pieces,
        "tokens": options.tokens,
        "width": options.width,
        "hidden_states_percent": 100 * float(of_hidden),
        "table_percent": 100 * float(of_table),
    }
    record.record(options, [row])


if __name__ == "__main__":
    main()
