"""Raw ids per second that an objective turns into batches on one core, without tokenization.

    python benchmarks/objectives.py [--length 512] [--seconds 2]

Each row is an objective. Its columns are texts joined to windows, documents padded one by one, documents packed into
rows, and the share of the rows' fuller side that packing fills. Ids are counted as inputs. Seconds are the CPU time of
the process, so other work on the machine is not measured.
"""

import argparse
import os
import time
import warnings

import grain
import numpy as np
import record

from keras_t5gemma.data.objectives.by_name import RECIPES, objective
from keras_t5gemma.data.objectives.mixture import Mixture
from keras_t5gemma.data.pipelines.dataset import pretraining_dataset

# Wide enough for any denoiser at any length here: how sentinels run out is not what is measured.
SENTINELS = range(7, 4_000)
# Where text starts: above the sentinels, so that ids are text and only <eos> is protected.
FIRST_TEXT_ID = 5_000


def documents(count, seed=0):
    """Documents of mixed length, log-normal with a median of 400 ids and a mean of 660, as web text has them."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(6, 1, count), 8, 20_000).astype(int)
    return [rng.integers(FIRST_TEXT_ID, 256_000, length, "int32") for length in lengths]


class Counted:
    """An objective that counts the input ids of its parts."""

    def __init__(self, inner):
        self.encoder_length, self.decoder_length = inner.encoder_length, inner.decoder_length
        self.ids = 0
        self.parts = tuple((_CountedPart(part, self), weight) for part, weight in inner.parts)


class _CountedPart:
    def __init__(self, part, counter):
        self.part, self.counter = part, counter
        self.raw_length, self.closes_targets = part.raw_length, part.closes_targets

    def __call__(self, ids, rng):
        self.counter.ids += len(ids)
        return self.part(ids, rng)


def measure(inner, texts, seconds, **options):
    """`(raw ids per second, filled share of the rows' fuller side)`."""
    counted = Counted(inner)
    data = pretraining_dataset(texts, None, counted, batch_size=8, **options)
    # Threads would only take turns on one core.
    if isinstance(data, grain.MapDataset):
        data = data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    iterator, masks = iter(data), []
    next(iterator)
    counted.ids, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        x = next(iterator)[0]
        masks.append([(x[f"{side}_padding_mask"] > 0).mean(axis=1) for side in ("encoder", "decoder")])
    elapsed = time.process_time() - start
    return counted.ids / elapsed, np.concatenate(masks, axis=1).max(axis=0).mean()


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, help="Length of encoder and decoder, S and T.")
    parser.add_argument("--seconds", type=float, default=2.0, help="Seconds per measurement.")
    record.add_options(parser)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    warnings.simplefilter("ignore")
    texts = documents(4_000)
    lengths = arguments.length, arguments.length
    objectives = {
        name: objective(name, *lengths, **({} if name == "prefixlm" else {"sentinels": SENTINELS})) for name in RECIPES
    }
    objectives["prefixlm 1 : ul2 3"] = Mixture([(objectives["prefixlm"], 1), (objectives["ul2"], 3)])
    print(f"S = T = {arguments.length}, one core, million raw ids a second")
    print(f"{'':20}{'joined':>10}{'whole':>10}{'packed':>10}{'fill':>10}")
    for name, inner in objectives.items():
        joined, _ = measure(inner, texts, arguments.seconds)
        whole, _ = measure(inner, texts, arguments.seconds, documents="whole")
        packed, fill = measure(inner, texts, arguments.seconds, documents="whole", pack=True)
        print(f"{name:20}{joined / 1e6:10.2f}{whole / 1e6:10.2f}{packed / 1e6:10.2f}{fill:10.1%}")
        row = {
            "topic": "Objectives",
            "backend": None,
            "objective": name,
            "encoder_length": arguments.length,
            "decoder_length": arguments.length,
            "cores": 1,
            "joined_million_ids_per_s": joined / 1e6,
            "whole_million_ids_per_s": whole / 1e6,
            "packed_million_ids_per_s": packed / 1e6,
            "fill_percent": 100 * float(fill),
        }
        record.record(arguments, [row])


if __name__ == "__main__":
    main()
