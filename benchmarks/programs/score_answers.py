"""Many answers to one document, in one call of `score` and in a call for each, in turn.

    score_answers.py ANSWERS TOKENS SINGLES REPEATS

Prints `[[s for all answers in one call, per repeat], [s per single call, all repeats]]`.
"""

import json
import sys
import time

import numpy as np

import keras_t5gemma as kt

V = 32_000


def main():
    answers, tokens, singles, repeats = map(int, sys.argv[1:])
    lm = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone("s", "s", vocabulary_size=V))
    generator = np.random.default_rng(0)
    document = {"encoder_token_ids": generator.integers(3, V, (1, tokens))}
    targets = [generator.integers(3, V, length).tolist() for length in generator.integers(2, 13, answers)]

    def seconds(group):
        start = time.perf_counter()
        lm.score(document, [group])
        return time.perf_counter() - start

    seconds(targets), seconds(targets[:1])  # compiles
    together, alone = [], []
    for repeat in range(repeats):
        together.append(seconds(targets))
        alone += [seconds([targets[(repeat * singles + i) % answers]]) for i in range(singles)]
    print(json.dumps([together, alone]))


if __name__ == "__main__":
    main()
