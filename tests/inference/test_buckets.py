"""Buckets: few programs for many shapes, and the results of exact shapes."""

import keras
import keras_hub
import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.inference import buckets as shapes
from keras_t5gemma.inference.decoding import programs
from keras_t5gemma.inference.decoding.chunks import DecodingStream

CONFIG = tiny_config(balanced=False, num_layers=1)
EXACT = kt.Buckets(None, None, None)
WIDE = kt.Buckets((32,), (32,), (8,))
ON_TORCH = keras.config.backend() == "torch"
STOPS = tuple(range(1, 128, 9))


@pytest.fixture(scope="module")
def backbone():
    return loud_backbone(CONFIG)


@pytest.fixture
def lm(backbone):
    return kt.T5GemmaSeq2SeqLM(backbone)


@pytest.fixture
def rounding_everywhere(monkeypatch):
    """As on a backend that compiles, on all of them."""
    monkeypatch.setattr(shapes, "is_compiled", lambda _: True)


def prompts(rows=3, length=11):
    inputs = loud_inputs(CONFIG, batch=rows, encoder_length=length)
    return {name: values for name, values in inputs.items() if name.startswith("encoder")}


@pytest.mark.parametrize(
    ("sizes", "needed", "limit", "size"),
    [
        ((16,), 1, None, 16),
        ((16,), 16, None, 16),
        ((16,), 17, None, 32),
        ((16,), 200, None, 256),
        ((16,), 300, 384, 384),
        ((16,), 3, 10, 10),
        ((16,), 12, 10, 16),  # asked beyond the limit
        ((1,), 5, None, 8),
        ((64, 100, 512), 65, None, 100),
        ((64, 100, 512), 513, None, 1024),
        (None, 13, 20, 13),
    ],
)
def test_size_is_the_smallest_of_a_bucket_that_holds_what_is_needed(sizes, needed, limit, size):
    assert kt.Buckets(encoder=sizes).size("encoder", needed, limit) == size


@pytest.mark.parametrize("sizes", [(), (0,), (16, 16), (32, 16), 16, (1.5,), "16", (True,)])
@pytest.mark.parametrize("axis", ["encoder", "decoder", "batch"])
def test_bad_sizes_are_named(axis, sizes):
    with pytest.raises(ValueError, match=f"`{axis}` must be ascending positive integers"):
        kt.Buckets(**{axis: sizes})


def test_buckets_of_a_model_are_checked_and_outlive_compiling_and_saving(lm, tmp_path):
    with pytest.raises(ValueError, match=r"`buckets` must be a kt\.Buckets. Received: 16"):
        lm.buckets = 16
    lm.buckets = WIDE
    lm.compile(sampler="beam")
    assert lm.buckets == WIDE
    lm.save(tmp_path / "model.keras")
    assert keras.saving.load_model(tmp_path / "model.keras").buckets == WIDE
    assert kt.T5GemmaSeq2SeqLM(lm.backbone, buckets=EXACT).buckets == EXACT
    assert kt.T5GemmaSeq2SeqLM(lm.backbone).buckets == kt.Buckets((16,), (64,), (1,))


def test_rows_that_are_added_are_the_last_one_with_no_room_and_positions_are_padding():
    arrays = {
        "encoder_token_ids": np.array([[5, 6, 7], [8, 9, 0]]),
        "encoder_padding_mask": np.array([[1, 1, 1], [1, 1, 0]]),
        "decoder_token_ids": np.array([[2, 0], [2, 4]]),
        "decoder_padding_mask": np.array([[1, 0], [1, 1]]),
        "limits": np.array([2, 2]),
        "prefill": np.zeros(8),
    }
    got = shapes.rounded(arrays, kt.Buckets((4,), (6,), (3,)), {"decoder": 5})
    assert got["encoder_token_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 0, 0], [8, 9, 0, 0]]
    assert got["encoder_padding_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert got["decoder_token_ids"].tolist() == [[2, 0, 0, 0, 0], [2, 4, 0, 0, 0], [2, 4, 0, 0, 0]]
    assert got["limits"].tolist() == [2, 2, 0]
    assert got["prefill"].shape == (5,)
    scored = {name: x for name, x in arrays.items() if name.startswith("decoder")} | {"labels": np.ones((2, 2))}
    assert shapes.rounded(scored, kt.Buckets((4,), (6,), (2,)), {})["labels"].shape == (2, 4)  # as prompts are
    assert shapes.rounded(arrays, EXACT, {}, multiple=8)["limits"].tolist() == [2, 2] + [0] * 6


def test_shapes_stay_exact_where_nothing_is_compiled(lm):
    arrays = {"encoder_token_ids": np.ones((3, 11), int), "limits": np.ones(3, int)}
    expected = (3, 11) if ON_TORCH else (4, 16)
    assert tuple(shapes.rounded_for(lm, arrays)["encoder_token_ids"].shape) == expected
    lm.compile(run_eagerly=True)
    assert shapes.rounded_for(lm, arrays)["encoder_token_ids"].shape == (3, 11)
    lm.compile(jit_compile=True)
    assert shapes.rounded_for(lm, arrays)["encoder_token_ids"].shape == (4, 16)


def test_limits_of_the_preprocessor_cap_what_is_rounded_up(backbone, tmp_path, rounding_everywhere):
    tokenizer = kt.T5GemmaTokenizer(proto=train_tiny_tokenizer(tmp_path / "tokenizer.model"))
    backbone = loud_backbone(tiny_config(num_layers=1, vocabulary_size=512))
    lm = kt.T5GemmaSeq2SeqLM(backbone, kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, 20, 24))
    arrays = {name: np.ones((3, 17), "int32") for name in ("encoder_token_ids", "decoder_token_ids")}
    assert {name: x.shape for name, x in shapes.rounded_for(lm, arrays).items()} == {
        "encoder_token_ids": (4, 20),
        "decoder_token_ids": (4, 24),
    }


def test_prompt_that_was_padded_to_512_is_not_read_at_512(lm, monkeypatch):
    def program(arrays, seeds):
        found.update(arrays)
        return {name: x for name, x in arrays.items() if name.startswith("decoder")}, seeds

    monkeypatch.setattr("keras_t5gemma.inference.generate.generate_program", lambda *_: program)
    found = {}
    inputs = {name: np.pad(x, ((0, 0), (30, 471))) for name, x in prompts(rows=1).items()}
    lm.generate(inputs, max_length=5, stop_token_ids=None)
    assert found["encoder_token_ids"].shape == ((1, 11) if ON_TORCH else (1, 16))
    np.testing.assert_array_equal(found["encoder_token_ids"][:, :11], prompts(rows=1)["encoder_token_ids"])


REQUESTS = {
    "greedy": ("greedy", {"processors": [kt.NoRepeatNgrams(2), kt.ForcedTokens({-1: 100, 0: 50})]}),
    "samples": (kt.TopKTopPSampler(p=0.9), {"num_samples": 2, "seed": 3, "max_new_tokens": [2, 12, 7]}),
    "random": (kt.TopKTopPSampler(k=9), {"seed": 3}),
    "beam": (kt.BeamSampler(num_beams=3), {"num_samples": 2, "processors": [kt.RepetitionPenalty(1.3)]}),
    "contrastive": (keras_hub.samplers.ContrastiveSampler(k=3), {}),
}


seeded = pytest.mark.skipif(
    ON_TORCH, reason="PyTorch's draws for a row depend on the number of rows; there nothing is rounded."
)


@pytest.mark.parametrize("stops", [None, STOPS], ids=["full", "stopped"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[seeded] if "seed" in options else []) for name, (_, options) in REQUESTS.items()]
)
def test_results_are_those_of_exact_shapes(lm, name, stops, rounding_everywhere):
    sampler, options = REQUESTS[name]
    lm.compile(sampler=sampler)
    options = {"return_log_probs": name != "contrastive", **options}
    if "max_new_tokens" not in options:
        options["max_length"] = 13
    got = {}
    for buckets in (EXACT, WIDE):
        lm.buckets = buckets
        got[buckets] = lm.generate(prompts(), stop_token_ids=stops, **options)
    assert got[WIDE]["decoder_token_ids"].shape[-1] == 13
    for key, expected in got[EXACT].items():
        np.testing.assert_allclose(got[WIDE][key], expected, atol=1e-4)
    if name == "greedy":
        last = got[WIDE]["decoder_token_ids"][:, -1]
        assert set(last.tolist()) <= {100, 0}  # at the limit asked for, not the program's
        assert stops or (last == 100).all()


def test_scores_and_vectors_are_those_of_exact_shapes(lm, rounding_everywhere):
    targets = [[5, 6, 7], [11], [13] * 9]
    got = []
    for buckets in (EXACT, WIDE):
        lm.buckets = buckets
        scores = lm.score(prompts(), targets)
        got.append((scores["log_probs"], scores["log_likelihood"], *(lm.embed(targets, p) for p in ("mean", "last"))))
    for expected, x in zip(*got, strict=True):
        np.testing.assert_allclose(x, expected, atol=1e-4)


def test_rows_that_are_added_never_keep_the_loop_going(lm, rounding_everywhere):
    steps = []

    class Endless(keras_hub.samplers.GreedySampler):
        """Stops the first three rows at once, and the others never."""

        def get_next_token(self, probabilities):
            return ops.where(ops.arange(probabilities.shape[0]) < 3, 1, 5)

        def run_loop(self, cond, body, **kwargs):
            state = super().run_loop(cond, body, **kwargs)
            steps.append(int(state[2]))
            return state

    lm.buckets = WIDE
    lm.compile(sampler=Endless(), run_eagerly=True)
    lm.generate(prompts(), max_length=20, stop_token_ids=(1,))
    lm.generate(prompts(), max_length=20, stop_token_ids=None)
    assert steps == [2, 20]


def test_contrastive_search_ends_at_the_longest_limit(lm, rounding_everywhere):
    calls = []

    class Counting(keras_hub.samplers.ContrastiveSampler):
        def compute_probabilities(self, logits):
            calls.append(1)
            return super().compute_probabilities(logits)

    lm.buckets = WIDE
    lm.compile(sampler=Counting(k=2), run_eagerly=True)
    lm.generate(prompts(), max_new_tokens=[3, 5, 4], stop_token_ids=None)
    if ON_TORCH:  # JAX traces the loop's body once, eagerly too
        assert len(calls) == 5


def program_count(lm):
    """How many programs `generate` compiled: JAX and TensorFlow count by themselves, PyTorch compiles none."""
    compiled = [program._compiled for program in lm.programs.values("generate") if program._compiled is not None]
    counts = {"jax": "_cache_size", "tensorflow": "experimental_get_tracing_count"}
    return sum(getattr(one, counts[keras.config.backend()])() for one in compiled)


def random_requests(count):
    generator = np.random.default_rng(0)
    for _ in range(count):
        rows, length, longest = (int(generator.integers(*span)) for span in ((1, 6), (1, 201), (2, 61)))
        ids = generator.integers(3, CONFIG.vocabulary_size, (rows, length))
        lengths = generator.integers(1, length + 1, rows)
        mask = (np.arange(length) < lengths[:, None]).astype(int)
        yield {"encoder_token_ids": ids, "encoder_padding_mask": mask}, longest


def counted(monkeypatch, owner, name):
    """A list that grows with each call of a method: with each trace, where it is compiled."""
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments, **options: calls.append(1) or original(*arguments, **options))
    return calls


def test_hundred_prompts_of_random_shape_compile_as_many_programs_as_buckets_and_give_the_results_of_one(
    lm, monkeypatch
):
    traced = counted(monkeypatch, programs, "start_decoding")
    traced_chunks = counted(monkeypatch, DecodingStream, "_run_to")
    lm.compile()
    requests = list(random_requests(10 if ON_TORCH else 100))  # PyTorch compiles none, and rounds nothing
    lm.buckets = kt.Buckets(encoder=(64, 256), decoder=(64,), batch=(2, 8))
    got = [lm.generate(x, longest, STOPS[:3])["decoder_token_ids"] for x, longest in requests]
    assert program_count(lm) <= (0 if ON_TORCH else 4)
    streams = [list(lm.stream({n: v[:1] for n, v in x.items()}, m, STOPS[:3])) for x, m in requests[:20]]
    assert ON_TORCH or (len(traced), len(traced_chunks)) == (2, 2)

    lm.compile()
    lm.buckets = kt.Buckets((256,), (128,), (5,))
    for (x, longest), ids in zip(requests, got, strict=True):
        np.testing.assert_array_equal(ids, lm.generate(x, longest, STOPS[:3])["decoder_token_ids"])
    assert program_count(lm) <= 1
    lm.buckets = EXACT
    for (x, longest), ids in list(zip(requests, got, strict=True))[:4]:
        np.testing.assert_array_equal(ids, lm.generate(x, longest, STOPS[:3])["decoder_token_ids"])
    for ids, tokens in zip(got, streams, strict=False):
        assert tokens == ids[0, : len(tokens)].tolist()
        assert not ids[0, len(tokens) :].any()
