"""Decoding from token ids: against `transformers`, against the uncached forward pass, whatever the batch."""

import keras_hub
import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone, twins
from keras import ops

from keras_t5gemma.inference.samplers.beam import BeamSampler
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

LENGTH = 24
# Two layers, one with a window and one without: a compiled program for each case costs enough as it is.
CONFIGS = {"balanced": tiny_config(num_layers=2), "unbalanced": tiny_config(balanced=False, num_layers=2)}
UNBALANCED = CONFIGS["unbalanced"]
# Enough stop ids that beams stop early again and again.
STOPS = tuple(range(1, 128, 9))


def prompts(config, **kwargs):
    inputs = loud_inputs(config, **{"batch": 4, "encoder_length": 19, **kwargs})
    return {name: values for name, values in inputs.items() if name.startswith("encoder")}


def peer_output(peer, inputs, beams=1, stops=(1,), decoder_ids=None):
    import torch

    ids, mask = (torch.from_numpy(inputs[f"encoder_{name}"]).long() for name in ("token_ids", "padding_mask"))
    decoder_ids = np.full((len(ids), 1), 2) if decoder_ids is None else decoder_ids
    output = peer.generate(
        input_ids=ids,
        attention_mask=mask,
        decoder_input_ids=torch.from_numpy(decoder_ids).long(),
        max_length=LENGTH,
        num_beams=beams,
        do_sample=False,
        eos_token_id=list(stops),
        pad_token_id=0,
    ).numpy()
    return np.pad(output, ((0, 0), (0, LENGTH - output.shape[1])))


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    peer, backbone = twins(CONFIGS[request.param])
    return peer, T5GemmaSeq2SeqLM(backbone), CONFIGS[request.param]


@pytest.fixture(scope="module")
def lm():
    return T5GemmaSeq2SeqLM(loud_backbone(UNBALANCED))


def test_greedy_output_equals_transformers_token_for_token(pair):
    peer, lm, config = pair
    lm.compile(sampler="greedy")
    inputs = prompts(config)
    got = lm.generate(inputs, max_length=LENGTH, stop_token_ids=(1,))["decoder_token_ids"]
    np.testing.assert_array_equal(got, peer_output(peer, inputs))
    stops = tuple(int(token) for token in {got[0, 9], got[2, 15]})
    got = lm.generate(inputs, max_length=LENGTH, stop_token_ids=stops)
    np.testing.assert_array_equal(got["decoder_token_ids"], peer_output(peer, inputs, stops=stops))
    assert got["decoder_padding_mask"].sum(axis=1)[0] <= 10  # up to and with the stop


@pytest.mark.parametrize(("beams", "stops"), [(2, (1,)), (3, STOPS[::3]), (4, STOPS)])
def test_beam_output_equals_transformers_token_for_token(pair, beams, stops):
    peer, lm, config = pair
    lm.compile(sampler=BeamSampler(num_beams=beams))
    inputs = prompts(config)
    got = lm.generate(inputs, max_length=LENGTH, stop_token_ids=stops)
    np.testing.assert_array_equal(got["decoder_token_ids"], peer_output(peer, inputs, beams, stops))


def test_beam_output_differs_from_greedy(lm):
    inputs = prompts(UNBALANCED)
    lm.compile(sampler="greedy")
    greedy = lm.generate(inputs, max_length=LENGTH, stop_token_ids=None)["decoder_token_ids"]
    lm.compile(sampler="beam")
    assert (lm.generate(inputs, max_length=LENGTH, stop_token_ids=None)["decoder_token_ids"] != greedy).any()


@pytest.mark.parametrize("sampler", ["greedy", "beam"])
def test_output_with_decoder_prompts_equals_transformers(pair, sampler):
    peer, lm, config = pair
    lm.compile(sampler=sampler if sampler == "greedy" else BeamSampler(num_beams=3))
    inputs = prompts(config)
    starts = np.random.default_rng(3).integers(3, 128, (4, 7))
    starts[:, 0] = 2
    got = lm.generate({**inputs, "decoder_token_ids": starts}, max_length=LENGTH, stop_token_ids=(1,))
    expected = peer_output(peer, inputs, 1 if sampler == "greedy" else 3, (1,), starts)
    np.testing.assert_array_equal(got["decoder_token_ids"], expected)


@pytest.mark.parametrize("sampler", ["greedy", "beam", "contrastive"])
def test_output_does_not_depend_on_batch_mates_or_padding(lm, sampler):
    lm.compile(sampler=sampler)
    inputs = prompts(UNBALANCED)
    starts, mask = np.zeros((4, 9), int), np.zeros((4, 9), int)
    for row, length in enumerate((1, 5, 9, 3)):
        starts[row, :length], mask[row, :length] = np.random.default_rng(row).integers(3, 128, length), 1
    batch = {**inputs, "decoder_token_ids": starts, "decoder_padding_mask": mask}
    together = lm.generate(batch, max_length=LENGTH, stop_token_ids=STOPS)
    for row in (1, 2):  # one padded on the right, one on the left
        encoder_keep, decoder_keep = inputs["encoder_padding_mask"][row] == 1, mask[row] == 1
        assert not encoder_keep.all()
        alone = lm.generate(
            {
                "encoder_token_ids": inputs["encoder_token_ids"][row][encoder_keep],
                "decoder_token_ids": starts[row][decoder_keep],
            },
            max_length=LENGTH,
            stop_token_ids=STOPS,
        )
        for name in alone:
            np.testing.assert_array_equal(alone[name], together[name][row])


def test_left_padded_decoder_prompts_give_what_right_padded_ones_give(lm):
    lm.compile(sampler="greedy")
    inputs = prompts(UNBALANCED, batch=2)
    left = {
        "decoder_token_ids": np.array([[0, 0, 2, 9], [2, 8, 7, 6]]),
        "decoder_padding_mask": [[0, 0, 1, 1], [1] * 4],
    }
    right = {
        "decoder_token_ids": np.array([[2, 9, 0, 0], [2, 8, 7, 6]]),
        "decoder_padding_mask": [[1, 1, 0, 0], [1] * 4],
    }
    got, expected = (lm.generate({**inputs, **x}, max_length=12, stop_token_ids=None) for x in (left, right))
    np.testing.assert_array_equal(got["decoder_token_ids"], expected["decoder_token_ids"])


@pytest.mark.parametrize("ring", [False, True], ids=["whole", "ring"])
@pytest.mark.parametrize("pieces", [[1] * 13, [5, 1, 1, 4, 2], [13]], ids=["steps", "pieces", "prefill"])
def test_cached_decoding_equals_the_whole_forward_pass_at_every_position(pieces, ring):
    config = UNBALANCED  # the decoder's window is 5, the sequence 13
    backbone = loud_backbone(config)
    inputs = loud_inputs(config)
    outputs = backbone(inputs)
    expected = ops.convert_to_numpy(outputs["decoder_sequence_output"])
    decoder = backbone.decoder
    ahead = max(pieces) if ring else None
    cache = decoder.start_cache(outputs["encoder_sequence_output"], inputs["encoder_padding_mask"], 16, ahead)
    # The first layer's window is 5, the second sees everything.
    kept = [layer["self"]["key"].shape[2] for layer in cache["layers"]]
    assert kept == [min(16, 5 + ahead) if ring else 16, 16]
    got, index = [], 0
    for size in pieces:
        ids, mask = (inputs[f"decoder_{n}"][:, index : index + size] for n in ("token_ids", "padding_mask"))
        hidden, cache = decoder.step(ops.convert_to_tensor(ids), ops.convert_to_tensor(mask), cache, index)
        got.append(ops.convert_to_numpy(hidden))
        index += size
    np.testing.assert_allclose(np.concatenate(got, axis=1), expected, atol=2e-5)


def test_strip_prompt_leaves_only_what_was_generated(lm):
    lm.compile(sampler="greedy")
    inputs = {**prompts(UNBALANCED, batch=2), "decoder_token_ids": [[2, 9, 0], [2, 8, 7]]}
    inputs["decoder_padding_mask"] = [[1, 1, 0], [1, 1, 1]]
    whole = lm.generate(inputs, max_length=10, stop_token_ids=None)["decoder_token_ids"]
    stripped = lm.generate(inputs, max_length=10, stop_token_ids=None, strip_prompt=True)
    for row, length in enumerate((2, 3)):
        kept = stripped["decoder_padding_mask"][row].sum()
        assert kept == 10 - length
        np.testing.assert_array_equal(stripped["decoder_token_ids"][row, :kept], whole[row, length:])


@pytest.mark.parametrize("sampler", ["top_k", "top_p", "random"])
def test_random_samplers_repeat_under_a_seed_and_vary_without(lm, sampler):
    inputs = prompts(UNBALANCED)

    def run(seed):
        makers = {"top_k": keras_hub.samplers.TopKSampler, "top_p": keras_hub.samplers.TopPSampler}
        lm.compile(sampler=makers.get(sampler, keras_hub.samplers.RandomSampler)(seed=seed, temperature=1.5))
        return [lm.generate(inputs, max_length=12, stop_token_ids=None)["decoder_token_ids"] for _ in range(2)]

    first, again, other = run(1), run(1), run(2)
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any()
    assert (first[0] != other[0]).any()


def test_temperature_near_zero_is_greedy(lm):
    inputs = prompts(UNBALANCED)
    lm.compile(sampler="greedy")
    greedy = lm.generate(inputs, max_length=12, stop_token_ids=None)["decoder_token_ids"]
    lm.compile(sampler=keras_hub.samplers.RandomSampler(temperature=1e-4))
    np.testing.assert_array_equal(lm.generate(inputs, max_length=12, stop_token_ids=None)["decoder_token_ids"], greedy)


def contrastive_by_hand(lm, inputs, length, k, alpha):
    """Contrastive search (arXiv 2202.06417) with a whole forward pass a candidate."""
    ids = [2]

    def run(sequence):
        # Padded to one length, so that compiled backends compile once.
        token_ids, mask = np.zeros((1, length), int), np.zeros((1, length), int)
        token_ids[0, : len(sequence)], mask[0, : len(sequence)] = sequence, 1
        batch = {**inputs, "decoder_token_ids": token_ids, "decoder_padding_mask": mask}
        hidden = lm.backbone(batch)["decoder_sequence_output"]
        logits = ops.convert_to_numpy(lm.head(hidden))[0, len(sequence) - 1].astype("float64")
        hidden = ops.convert_to_numpy(hidden)[0, : len(sequence)]
        return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum(), hidden

    probabilities, _ = run(ids)
    while len(ids) < length:
        best = None
        for token in np.argsort(-probabilities)[:k]:
            following, extended = run([*ids, int(token)])
            norms = np.linalg.norm(extended, axis=-1)
            similarity = (extended[:-1] @ extended[-1]) / (norms[:-1] * norms[-1])
            score = (1 - alpha) * probabilities[token] - alpha * similarity.max()
            if best is None or score > best[0]:
                best = (score, int(token), following)
        ids.append(best[1])
        probabilities = best[2]
    return ids


def test_contrastive_search_equals_the_search_written_out(lm):
    lm.compile(sampler=keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.6))
    inputs = prompts(UNBALANCED, batch=1, encoder_length=9)
    got = lm.generate(inputs, max_length=6, stop_token_ids=None)["decoder_token_ids"][0]
    np.testing.assert_array_equal(got, contrastive_by_hand(lm, inputs, 6, 3, 0.6))


def test_generate_leaves_the_model_able_to_train_and_generate_again():
    lm = T5GemmaSeq2SeqLM(loud_backbone(UNBALANCED))
    inputs = loud_inputs(UNBALANCED)
    encoder = {name: values for name, values in inputs.items() if name.startswith("encoder")}
    before = lm.generate(encoder, max_length=12, stop_token_ids=None)["decoder_token_ids"]
    lm.compile(optimizer="sgd", sampler="greedy")
    lm.optimizer.learning_rate.assign(1.0)
    lm.fit(inputs, inputs["decoder_token_ids"], batch_size=3, verbose=0)
    after = lm.generate(encoder, max_length=12, stop_token_ids=None)["decoder_token_ids"]
    assert (before != after).any()
