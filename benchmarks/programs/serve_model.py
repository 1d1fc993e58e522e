"""A server of a random model: `serve_model.py WAY SIZE SLOTS`. Prints its URL when it is ready; ends with its stdin."""

import collections
import os
import shutil
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import sentencepiece

import keras_t5gemma as kt
from keras_t5gemma.serving.handles import Answer, BatcherClosed, Handle

V, PIECES = 32_000, 4096
BUCKETS, LONGEST = (64, 128, 256), 130
TINY = dict(num_layers=2, hidden_dim=64, intermediate_dim=128, num_query_heads=4, num_key_value_heads=2, head_dim=16)


class Generating:
    """In place of a batcher: answers the requests that wait by one call of `generate`, whose rows end together.

    Args:
        lm: the model.
        most: rows per call.
    """

    def __init__(self, lm, most):
        self._lm, self._most = lm, most
        self._waiting, self._changed, self._is_closed = collections.deque(), threading.Condition(), False
        self._running = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def waiting(self):
        return len(self._waiting)

    @property
    def running(self):
        return self._running

    def submit(self, prompt, *, max_new_tokens, **_):
        handle = Handle()
        with self._changed:
            self._waiting.append((prompt, max_new_tokens, handle))
            self._changed.notify_all()
        return handle

    def warm(self):
        sizes = [size for size in self._lm.buckets.batch if size <= self._most]
        for length in BUCKETS:
            # "a" is one token.
            prompt = " ".join(["a"] * (length - 1))
            for size in sizes:
                self._answer([prompt] * size, [2] * size)

    def close(self, timeout=None):
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout)

    def _answer(self, prompts, limits):
        return self._lm.generate(prompts, max_new_tokens=limits, strip_prompt=True, return_log_probs=True)

    def _run(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    for *_, handle in self._waiting:
                        handle.fail(BatcherClosed("closed"))
                    return
                count = min(self._most, len(self._waiting))
                requests = [self._waiting.popleft() for _ in range(count)]
                self._running = count
            prompts, limits, handles = zip(*requests, strict=True)
            try:
                found = self._answer(list(prompts), list(limits))
            except Exception as error:
                for handle in handles:
                    handle.fail(error)
                continue
            for i, handle in enumerate(handles):
                ids = found["decoder_token_ids"][i][found["decoder_padding_mask"][i] != 0]
                text = found["text"][i]
                length = len(self._lm.preprocessor.tokenizer(prompts[i]))
                handle.finish(Answer(text, ids, None, "length", length, None), [text or " "])
            self._running = 0


class Translating(Generating):
    """The same by CTranslate2, in float32. A call has one limit, so shorter answers are cut from longer ones.

    Args:
        lm: the model.
        most: rows per call.
    """

    def __init__(self, lm, most):
        import ctranslate2

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its model is another one, which takes as long
            folder = Path(tempfile.mkdtemp()) / "model"
            kt.export_ctranslate2(lm, folder)
        self._translator = ctranslate2.Translator(str(folder), intra_threads=os.cpu_count())
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        shutil.rmtree(folder.parent)
        super().__init__(lm, most)

    def warm(self):
        self._answer(["a"], [2])

    def _answer(self, prompts, limits):
        found = self._translator.translate_batch(
            [self._pieces.encode(prompt, out_type=str) for prompt in prompts],
            beam_size=1,
            max_decoding_length=max(limits),
            min_decoding_length=0,
            max_input_length=BUCKETS[-1],
        )
        rows = [result.hypotheses[0][:limit] for result, limit in zip(found, limits, strict=True)]
        ids, mask = np.zeros((2, len(rows), max(limits)), int)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = self._pieces.piece_to_id(row), 1
        texts = [self._pieces.decode_pieces(row) for row in rows]
        return {"decoder_token_ids": ids, "decoder_padding_mask": mask, "text": texts}


def main():
    way, size, slots = sys.argv[1], sys.argv[2], int(sys.argv[3])
    from pydoc_data.topics import topics

    tokenizer = kt.T5GemmaTokenizer(proto=kt.train_tokenizer(list(topics.values()), PIECES))
    preprocessor = kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, BUCKETS[-1], LONGEST, truncate="right")
    stack = "s" if size == "s" else TINY
    rows = tuple(sorted({1, 4, slots}))
    buckets = kt.Buckets(BUCKETS, (LONGEST,), rows)
    lm = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone(stack, stack, vocabulary_size=V), preprocessor, buckets=buckets)
    lm.compile(sampler="greedy")
    np.random.seed(0)
    server = kt.Server(lm, port=0, slots=slots, buckets=BUCKETS, max_length=LONGEST, most_waiting=10_000)
    if way == "ctranslate2":
        server._service.batcher = Translating(lm, slots)
    elif way != "continuous":
        server._service.batcher = Generating(lm, slots if way == "dynamic" else 1)
    server._service.vectors.warm = lambda: None  # nobody asks for vectors
    with server:
        print(server.url, flush=True)
        sys.stdin.read()


main()
