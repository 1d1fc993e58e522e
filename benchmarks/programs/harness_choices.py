"""Multiple choice by lm-evaluation-harness: `HarnessLM` and the harness's own `HFLM`, in turn, on PyTorch.

    harness_choices.py CONTEXTS OPTIONS TOKENS BATCH REPEATS

Both models have the same weights and requests. Prints `[number of requests, [s of HarnessLM, per repeat], [s of HFLM,
per repeat], largest difference of log-likelihoods in nats, number of requests that differ in is_greedy]`.
"""

import json
import sys
import tempfile
import time

import numpy as np
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import keras_t5gemma as kt
from keras_t5gemma.demo.corpus import standard_library_corpus

V = 32_000
PIECES = 4096  # of the tokenizer; the model's other rows are never read


def requests(texts, tokenizer, contexts, options, tokens):
    """`(context, continuation)` as a task of multiple choice makes them: the context again for each of its options."""
    generator = np.random.default_rng(0)
    ids = [i for text in texts for i in tokenizer(text)]
    pairs = []
    for start in generator.integers(0, len(ids) - tokens, contexts):
        # A tenth longer or shorter, as texts are.
        length = int(tokens * generator.uniform(0.9, 1.1))
        context = f"{tokenizer.detokenize(ids[start : start + length])}\nAnswer:"
        words = generator.choice(context.split(), (options, 6))
        pairs += [(context, " " + " ".join(row[: generator.integers(1, 7)])) for row in words]
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def main():
    contexts, options, tokens, batch, repeats = map(int, sys.argv[1:])
    texts = standard_library_corpus().train
    tokenizer = kt.T5GemmaTokenizer(proto=kt.train_tokenizer(texts, PIECES))
    preprocessor = kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer)
    lm = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone("s", "s", vocabulary_size=V), preprocessor)
    with tempfile.TemporaryDirectory() as folder:
        kt.export_to_hugging_face(lm, f"{folder}/model")
        peer = HFLM(
            pretrained=transformers.AutoModelForSeq2SeqLM.from_pretrained(f"{folder}/model"),
            tokenizer=transformers.AutoTokenizer.from_pretrained(f"{folder}/model"),
            backend="seq2seq",
            batch_size=batch,
            max_length=8192,
        )
    ours = kt.HarnessLM(lm, batch_size=batch, max_length=8192)
    asked = requests(texts, tokenizer, contexts, options, tokens)

    def timed(function):
        start = time.perf_counter()
        return function(), time.perf_counter() - start

    def of_ours(part=asked):
        return ours.loglikelihood(part)

    def of_peer(part=asked):
        return peer.loglikelihood(part, disable_tqdm=True)

    of_ours(asked[:options]), of_peer(asked[:options])  # first calls allocate
    seconds, peers_seconds = [], []
    for _ in range(repeats):
        found, once = timed(of_ours)
        seconds.append(once)
        expected, once = timed(of_peer)
        peers_seconds.append(once)
    difference = max(abs(x - y) for (x, _), (y, _) in zip(found, expected, strict=True))
    unequal = sum(x != y for (_, x), (_, y) in zip(found, expected, strict=True))
    print(json.dumps([len(asked), seconds, peers_seconds, difference, unequal]))


if __name__ == "__main__":
    main()
