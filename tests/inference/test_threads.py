"""Several threads at one model: each gets what it would get alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import keras_hub
import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.inference import generate as module

CONFIG = tiny_config(balanced=False, num_layers=1)
PROMPT = {name: x for name, x in loud_inputs(CONFIG, batch=1, encoder_length=7).items() if name.startswith("encoder")}
OPTIONS = {"max_length": 13, "stop_token_ids": None}
THREADS = 8


@pytest.fixture(scope="module")
def lm():
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG))
    lm.compile(sampler=kt.TopKTopPSampler(k=30, temperature=2.0, seed=0))
    return lm


def generated(lm, seed):
    return lm.generate(PROMPT, seed=seed, **OPTIONS)["decoder_token_ids"][0].tolist()


def streamed(lm, seed):
    return list(lm.stream(PROMPT, seed=seed, **OPTIONS))


def at_once(calls):
    """What calls give, all begun at the same moment."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_threads_get_what_one_thread_gets_from_the_first_call_on(lm):
    # The first calls of the model: programs are made and compiled by whichever thread comes first.
    together = at_once([lambda seed=seed: generated(lm, seed) for seed in range(THREADS)])
    alone = [generated(lm, seed) for seed in range(THREADS)]
    assert together == alone
    assert len(set(map(tuple, alone))) == THREADS
    for call in (generated, streamed) * 2:
        assert at_once([lambda seed=seed, call=call: call(lm, seed) for seed in range(THREADS)]) == alone
    targets = [[3, 5, 7 + seed] for seed in range(4)]
    scores = at_once([lambda target=target: lm.score(PROMPT, [target])["log_likelihood"] for target in targets])
    np.testing.assert_array_equal(scores, [lm.score(PROMPT, [target])["log_likelihood"] for target in targets])


def test_threads_without_a_seed_share_out_the_samplers_draws(lm):
    state = lm.sampler.variables[0]
    state.assign(ops.convert_to_tensor([5, 0], state.dtype))
    alone = [generated(lm, None) for _ in range(4)]
    state.assign(ops.convert_to_tensor([5, 0], state.dtype))
    assert sorted(at_once([lambda: generated(lm, None)] * 4)) == sorted(alone)
    assert len(set(map(tuple, alone))) == 4


def test_generate_beside_fit_of_another_thread_is_one_error_and_fit_goes_on(lm):
    inputs = loud_inputs(CONFIG, batch=2)
    said, answers = [], []

    def ask():
        for call in (lambda: generated(lm, 1), lm.backbone.get_weights, lambda: lm.predict(inputs)):
            with pytest.raises(RuntimeError, match="cannot run while another thread is in `fit`") as error:
                call()
            said.append(error.value)

    def on_batch(batch, logs):
        answers.append(generated(lm, 1))
        other = threading.Thread(target=ask)
        other.start()
        other.join()

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=on_batch)
    before = generated(lm, 1)
    lm.compile(optimizer=keras.optimizers.SGD(0.0), sampler=lm.sampler)
    lm.fit(inputs, inputs["decoder_token_ids"], batch_size=1, verbose=0, callbacks=[callback])
    assert len(said) == 6
    assert answers == [before] * 2
    assert at_once([lambda: generated(lm, 1)])[0] == before  # afterwards another thread may


def test_fit_waits_for_answers_that_were_begun(lm, monkeypatch):
    inputs, order = loud_inputs(CONFIG, batch=1), []
    running, go_on = threading.Event(), threading.Event()
    program = module.generate_program

    def slow(lm, control):
        running.set()
        go_on.wait()
        return program(lm, control)

    monkeypatch.setattr(module, "generate_program", slow)
    lm.compile(optimizer=keras.optimizers.SGD(0.0), sampler=lm.sampler)
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(lambda: order.append("answer") or generated(lm, 1))
        running.wait()
        fit = pool.submit(lm.fit, inputs, inputs["decoder_token_ids"], verbose=0)
        fit.add_done_callback(lambda _: order.append("fit"))
        assert not fit.done()
        go_on.set()
        assert len(answer.result()) == 13
        fit.result()
    assert order == ["answer", "fit"]


class Counted(keras_hub.samplers.GreedySampler):
    """A sampler of somebody's own with a state of its own: every third token is another one."""

    def __init__(self):
        super().__init__()
        self.count = keras.random.SeedGenerator(0)

    def get_next_token(self, probabilities):
        state = self.count.next()
        return (super().get_next_token(probabilities) + ops.cast(state[1] % 3 == 2, "int32")) % 128


def test_state_of_a_sampler_of_ones_own_is_carried_through_the_loop_and_belongs_to_the_call(lm):
    lm.compile(sampler="greedy")
    greedy = generated(lm, None)
    lm.compile(sampler=Counted())
    counted = [generated(lm, seed) for seed in (None, 4, None)]
    assert counted[0] == counted[1] == counted[2]
    assert counted[0][:3] == greedy[:3]
    assert counted[0][3] == (greedy[3] + 1) % 128
    assert streamed(lm, 4) == counted[0]


def test_each_thread_cuts_its_prompts_as_its_call_says(tmp_path):
    tokenizer = kt.T5GemmaTokenizer(train_tiny_tokenizer(tmp_path / "tokenizer.model"))
    config = tiny_config(balanced=False, num_layers=1, vocabulary_size=512)
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(config, seed=1), kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, 6, 8))
    # So that answers are letters: loud models repeat the start, and tokens of bytes are no text.
    embeddings = lm.backbone.decoder.token_embedding.embeddings
    embeddings.assign(ops.concatenate([ops.zeros_like(embeddings[:400]), embeddings[400:]], axis=0))
    lm.compile(sampler="greedy")
    options = {"stop_token_ids": None, "max_length": 8}
    prompt, ends = "Why did the apples knock on the quick brown fox?", ["left", "right"] * 4
    with pytest.warns(UserWarning, match="1 of 1 prompts"):
        alone = [lm.generate(prompt, truncate=end, **options) for end in ends]
        together = at_once([lambda end=end: lm.generate(prompt, truncate=end, **options) for end in ends])
    assert together == alone
    assert len(set(alone)) == 2
    with pytest.raises(ValueError, match="truncate"):
        lm.generate(prompt)
