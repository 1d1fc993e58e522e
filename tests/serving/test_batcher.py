"""Continuous batching: each request gets what `generate` gives for it alone, whoever shares the batch."""

import contextlib
import gc
from concurrent.futures import CancelledError, ThreadPoolExecutor

import keras
import numpy as np
import pytest
from helpers.served import held, varied_lm
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.concurrency import changing

LENGTH = 16  # the decoder's window is 5
SLOTS = 3
# In 16 tokens at most; without a stop id, so that all answers are long.
GREEDY = {"stop_token_ids": None}
PROMPTS = (
    "Why is the sky blue?",
    "knock knock",
    {"encoder_text": "12 apples", "decoder_text": "There were"},
    "Answer the question.",
    "a",
    {"encoder_text": "Translate the text.", "decoder_text": "é"},
)
FEW = PROMPTS[:4]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return varied_lm(tmp_path_factory.mktemp("tokenizer"), 24, LENGTH)


def new_batcher(lm, most_waiting=16):
    """A batcher; JAX finds its programs compiled."""
    return kt.Batcher(lm, slots=SLOTS, buckets=(12, 24), most_waiting=most_waiting, chunk_size=4)


@pytest.fixture(scope="module")
def batcher(lm):
    with new_batcher(lm) as batcher:
        batcher.warm()
        yield batcher


@pytest.fixture(scope="module")
def whole(lm):
    """What `generate` gives for each prompt, greedily."""
    return [lm.generate(prompt, return_log_probs=True, **GREEDY) for prompt in PROMPTS]


def ids(answer):
    return answer.token_ids.tolist()


def generated_ids(outputs):
    return outputs["decoder_token_ids"][outputs["decoder_padding_mask"]].tolist()


def test_greedy_answers_are_those_of_generate_with_fewer_slots_than_requests(batcher, whole):
    handles = [batcher.submit(prompt, return_log_probs=True, **GREEDY) for prompt in PROMPTS]
    for handle, expected in zip(handles, whole, strict=True):
        answer = handle.result(60)
        assert answer.text == expected["text"]
        assert ids(answer) == generated_ids(expected)
        np.testing.assert_allclose(answer.log_probs, expected["log_probs"], atol=2e-4)
        assert (answer.finish_reason, answer.seed) == ("length", None)
        assert "".join(handle) == "".join(handle) == answer.text
    texts = [expected["text"] for expected in whole]
    assert len(set(texts)) > 4
    assert max(len(set(generated_ids(expected))) for expected in whole) > 6


def test_limits_are_those_of_each_request_and_stripped_prompts_are_left_out(lm, batcher, whole):
    limits = [3, 1, 9, 2, 13, 5]
    handles = [
        batcher.submit(prompt, max_new_tokens=most, strip_prompt=True, **GREEDY)
        for prompt, most in zip(PROMPTS, limits, strict=True)
    ]
    for handle, expected, most in zip(handles, whole, limits, strict=True):
        start = LENGTH - int((expected["log_probs"] != 0).sum())
        answer = handle.result(60)
        assert ids(answer) == generated_ids(expected)[start : start + most]
        assert answer.text == lm.preprocessor.tokenizer.detokenize(
            [i for i in ids(answer) if lm.preprocessor.has_text(np.array(i))]
        )
        assert "".join(handle) == answer.text
        assert answer.log_probs is None
    whole_length = batcher.submit(PROMPTS[0], max_length=6, **GREEDY).result(60)
    assert ids(whole_length) == generated_ids(whole[0])[:6]


SAMPLERS = ({"temperature": 1.5}, {"top_k": 5, "temperature": 3.0}, {"top_p": 0.8, "temperature": 2.0})


@pytest.mark.parametrize("options", SAMPLERS, ids=["plain", "k", "p"])
def test_seeded_draws_are_those_of_generate_in_any_order_of_arrival(lm, batcher, options):
    sampler = kt.TopKTopPSampler(options.get("top_k"), options.get("top_p"), options["temperature"])
    alone = kt.T5GemmaSeq2SeqLM(lm.backbone, lm.preprocessor, buckets=lm.buckets)
    alone.compile(sampler=sampler)
    expected = [alone.generate(prompt, seed=seed, **GREEDY) for seed, prompt in enumerate(FEW)]
    assert expected[0] != batcher.submit(FEW[0], seed=99, **options, **GREEDY).result(60).text
    for turn in range(3):
        order = np.random.default_rng(turn).permutation(len(FEW))
        # Neighbors with other options.
        other = [batcher.submit("knock", seed=turn, **more, **GREEDY) for more in SAMPLERS[:turn]]
        handles = {i: batcher.submit(FEW[i], seed=int(i), **options, **GREEDY) for i in order}
        assert [handles[i].result(60).text for i in range(len(FEW))] == expected
        assert [handle.result(60).seed for handle in other] == [turn] * len(other)


def test_draws_without_a_seed_differ_and_repeat_under_the_seed_of_the_answer(batcher):
    options = {"temperature": 3.0, **GREEDY}
    answers = [batcher.submit(PROMPTS[0], **options).result(60) for _ in range(2)]
    assert ids(answers[0]) != ids(answers[1])
    for answer in answers:
        assert ids(batcher.submit(PROMPTS[0], seed=answer.seed, **options).result(60)) == ids(answer)


def test_penalties_are_those_of_processors(lm, batcher, whole):
    def presence_and_frequency(logits, sequences):
        positions = ops.arange(sequences.token_ids.shape[1], dtype="int32")
        is_new = (positions < sequences.index) & (positions >= ops.expand_dims(sequences.prompt_lengths, 1))
        one_hot = ops.one_hot(sequences.token_ids, logits.shape[1]) * ops.cast(ops.expand_dims(is_new, 2), "float32")
        counts = ops.sum(one_hot, axis=1)
        return logits - 0.7 * ops.cast(counts > 0, "float32") - 0.4 * counts

    alone = kt.T5GemmaSeq2SeqLM(lm.backbone, lm.preprocessor, buckets=lm.buckets)
    processors = [kt.RepetitionPenalty(1.3), presence_and_frequency]
    expected = [alone.generate(prompt, processors=processors, **GREEDY) for prompt in FEW]
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4}
    handles = [batcher.submit(prompt, **penalties, **GREEDY) for prompt in FEW]
    plain = batcher.submit(PROMPTS[0], **GREEDY)
    assert [handle.result(60).text for handle in handles] == expected
    assert plain.result(60).text == whole[0]["text"] != expected[0]
    one_by_one = [batcher.submit(PROMPTS[0], **{k: v}, **GREEDY).result(60).text for k, v in penalties.items()]
    assert whole[0]["text"] not in one_by_one


def test_stop_ids_and_stop_strings_end_an_answer_as_in_generate(lm, batcher, whole):
    row = generated_ids(whole[0])
    stop_id = row[4]
    by_id = batcher.submit(PROMPTS[0], stop_token_ids=(stop_id,)).result(60)
    assert ids(by_id) == row[: row.index(stop_id, 1) + 1]
    assert by_id.finish_reason == "stop"
    prompt, text = max(
        zip(PROMPTS, [expected["text"] for expected in whole], strict=True), key=lambda pair: len(pair[1])
    )
    start = len(prompt["decoder_text"]) if isinstance(prompt, dict) else 0
    middle = (start + len(text)) // 2
    stop = text[middle : middle + 2]
    assert start + 4 < middle
    expected = lm.generate(prompt, stop=["#never#", stop], return_log_probs=True, **GREEDY)
    handle = batcher.submit(prompt, stop=["#never#", stop], return_log_probs=True, **GREEDY)
    answer = handle.result(60)
    assert answer.text == expected["text"] == text[: text.find(stop, start)]
    assert "".join(handle) == answer.text
    assert ids(answer) == generated_ids(expected)
    np.testing.assert_allclose(answer.log_probs, expected["log_probs"][: len(ids(answer))], atol=2e-4)
    assert answer.finish_reason == "stop"


def test_cancelled_requests_end_at_once_and_make_room(batcher, whole, monkeypatch):
    with held(batcher, monkeypatch) as wait:
        running = [batcher.submit(prompt, **GREEDY) for prompt in PROMPTS[:SLOTS]]
        wait()
        waiting = [batcher.submit(prompt, **GREEDY) for prompt in PROMPTS[SLOTS:]]
        assert all(handle.cancel() for handle in (*running[:2], *waiting[1:]))
        assert not running[0].cancel()
        for handle in (running[0], waiting[-1]):
            with pytest.raises(CancelledError):
                handle.result(0)
    left = running[2], waiting[0]
    assert [handle.result(60).text for handle in left] == [whole[2]["text"], whole[3]["text"]]
    assert not left[0].cancel()
    with pytest.raises(CancelledError):
        list(running[0])
    assert batcher.submit(PROMPTS[4], **GREEDY).result(60).text == whole[4]["text"]
    assert (batcher.waiting, batcher.running) in ((0, 0), (0, 1))


def test_full_queue_is_an_error_until_there_is_room(lm, monkeypatch):
    with new_batcher(lm, most_waiting=2) as small:
        with held(small, monkeypatch) as wait:
            first = small.submit("a", max_new_tokens=2)
            wait()
            handles = [small.submit("a", max_new_tokens=2) for _ in range(4)]
            assert (small.waiting, small.running) == (4, 1)  # two slots are free
            with pytest.raises(kt.QueueFull, match="4 requests wait for one of 3 slots"):
                small.submit("a")
            with pytest.raises(TimeoutError, match=r"0\.01 seconds"):
                first.result(0.01)
            handles[0].cancel()
            handles[0] = small.submit("a", max_new_tokens=2)
        assert len({handle.result(60).text for handle in (first, *handles)}) == 1


def test_close_answers_what_is_open_or_fails_it_within_its_time(lm, whole, monkeypatch):
    batcher = new_batcher(lm)
    handles = [batcher.submit(prompt, **GREEDY) for prompt in PROMPTS]
    batcher.close()
    assert [handle.result(0).text for handle in handles] == [expected["text"] for expected in whole]
    with pytest.raises(kt.BatcherClosed):
        batcher.submit("a")
    batcher.close()

    batcher = new_batcher(lm)
    with held(batcher, monkeypatch) as wait:
        handles = [batcher.submit(prompt, **GREEDY) for prompt in PROMPTS]
        wait()
        batcher.close(timeout=0.05)
        for handle in handles:
            with pytest.raises(kt.BatcherClosed, match="no time left"):
                handle.result(0)
    thread = batcher._thread._thread
    thread.join(60)
    assert not thread.is_alive()

    thread = None
    with pytest.raises(KeyError), new_batcher(lm) as batcher:
        thread = batcher.submit("a"), batcher._thread._thread
        raise KeyError
    thread[1].join(60)
    assert thread[0].done


def test_forgotten_batcher_ends_its_thread(lm):
    batcher = new_batcher(lm)
    batcher.submit("a", max_new_tokens=1).result(60)
    thread = batcher._thread._thread
    del batcher
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("program", ["insert", "advance"])
def test_error_of_the_model_fails_the_requests_in_slots_and_later_ones_are_answered(
    batcher, whole, monkeypatch, program
):
    programs = batcher._thread._programs

    def broken(*_, **__):
        raise ZeroDivisionError("broken")

    with held(batcher, monkeypatch) as wait:
        running = batcher.submit(PROMPTS[0], **GREEDY)
        wait()
    running.result(60)
    with monkeypatch.context() as patch:
        patch.setattr(programs, program, broken)
        failed = [batcher.submit(prompt, **GREEDY) for prompt in PROMPTS]
        for handle in failed:
            with pytest.raises(ZeroDivisionError, match="broken"):
                handle.result(60)
            with pytest.raises(ZeroDivisionError):
                list(handle)
    assert batcher.submit(PROMPTS[0], **GREEDY).result(60).text == whole[0]["text"]


def test_lack_of_memory_is_a_memory_error_that_names_the_slots(batcher, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(batcher._thread._programs, "insert", broken)
        with pytest.raises(MemoryError, match=r"3 slots x 24 input tokens x max_length 16 .* keys and values take"):
            batcher.submit("a").result(60)


def test_error_in_the_text_of_one_request_ends_that_one_only(batcher, whole, monkeypatch):
    with held(batcher, monkeypatch) as wait:
        handles = [batcher.submit(prompt, **GREEDY) for prompt in PROMPTS[:2]]
        wait()
        broken = next(answer for answer in batcher._thread._open if answer and answer.handle is handles[0])
        monkeypatch.setattr(broken, "take", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        handles[0].result(60)
    assert handles[1].result(60).text == whole[1]["text"]


def test_request_beside_fit_of_another_thread_is_its_error(lm, batcher, whole):
    with (
        changing(lm, "fit"),
        pytest.raises(RuntimeError, match="cannot run while another thread is in `fit`"),
    ):
        batcher.submit(PROMPTS[0], **GREEDY).result(60)
    assert batcher.submit(PROMPTS[0], **GREEDY).result(60).text == whole[0]["text"]


def test_requests_of_eight_threads_get_what_they_get_alone_and_compile_nothing(batcher):
    def compiled():
        programs = batcher._thread._programs
        count = {"jax": "_cache_size", "tensorflow": "experimental_get_tracing_count"}.get(keras.config.backend())
        kept = programs._start, programs._insert, programs._advance
        return [getattr(program._compiled, count)() for program in kept] if count else None

    def ask(i):
        options = (
            GREEDY,
            {},
            {"temperature": 2.0, "top_k": 9},
            {"temperature": 0.5, "top_p": 0.9, "stop": ["th", "b"]},
        )
        more = {"seed": i, "max_new_tokens": 1 + i % 11, "frequency_penalty": i % 3, "return_log_probs": i % 2 == 0}
        while True:
            with contextlib.suppress(kt.QueueFull):
                return ids(batcher.submit(PROMPTS[i % len(PROMPTS)], **options[i % 4], **more).result(60))

    alone = [ask(i) for i in range(16)]
    # A bucket of prompts each.
    assert compiled() in (None, [1, 2, 1])
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(16))) == alone
    assert compiled() in (None, [1, 2, 1])
    assert len(set(map(tuple, alone))) > 8


def test_requests_leave_nothing_behind(batcher):
    def objects_after(count):
        for handle in [batcher.submit("a", max_new_tokens=2, temperature=1.0, stop="b") for _ in range(count)]:
            handle.result(60)
        gc.collect()
        return len(gc.get_objects())

    before = objects_after(10)
    for _ in range(9):
        after = objects_after(10)
    assert after - before < 90  # not one object a request


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"inputs": ["a", "b"]}, "takes one prompt. Received: 2"),
        ({"inputs": "The quick brown fox jumps over the lazy dog and 5678 plums"}, "encoder_sequence_length=24"),
        ({"inputs": ""}, "empty"),
        ({"max_length": 17}, "max_length=16"),
        ({"max_new_tokens": 16}, "17 tokens"),
        ({"inputs": {"encoder_text": "a", "decoder_text": "The quick brown fox"}, "max_length": 2}, "decoder_text"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": range(10, 19)}, "at most 8. Received: 9"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": "1"}, "presence_penalty"),
        ({"truncate": "middle"}, "truncate"),
    ],
)
def test_bad_option_is_an_error_of_submit(batcher, options, named):
    with pytest.raises(ValueError, match=named):
        batcher.submit(**{"inputs": "a", **options})


def test_encoded_prompt_is_refused(lm, batcher):
    with pytest.raises(ValueError, match="not the result of `encode`"):
        batcher.submit(lm.encode("a"))


@pytest.mark.parametrize(
    "options", [{"slots": 0}, {"buckets": (8, 4)}, {"max_length": 0}, {"most_waiting": 0}, {"chunk_size": 0}]
)
def test_bad_option_is_an_error_of_the_batcher(lm, options):
    with pytest.raises(ValueError, match=next(iter(options)).replace("buckets", "encoder")):
        kt.Batcher(lm, **options)
