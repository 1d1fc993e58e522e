"""What the blocks of README.md and docs/ come to: per page, words of a block and what is asserted after it."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

import keras_t5gemma as kt
from helpers.page_outcomes_of_runtimes import exports, serving
from keras_t5gemma._keras_internals import flatten_layers
from keras_t5gemma.presets import STACKS
from keras_t5gemma.training.callbacks.log_file import read_log

WEIGHTS = "model.safetensors"


def arrays(folder):
    return load_file(Path(folder) / WEIGHTS)


def moved(lm):
    """Paths of the LoRA factors that are no longer as they were made: B starts at zero."""
    factors = [weight for weight in lm.trainable_variables if "lora_kernel_b" in weight.path]
    return [weight.path for weight in factors if np.any(keras.ops.convert_to_numpy(weight))]


def as_float32(weight):
    return keras.ops.convert_to_numpy(keras.ops.cast(weight, "float32"))


def modes(lm):
    """The forms in which weights are kept, by kind of layer."""
    found = {"Dense": set(), "Embedding": set()}
    for layer in flatten_layers(lm.backbone):
        for name, of_kind in found.items():
            if isinstance(layer, getattr(keras.layers, name)):
                of_kind.add(layer.quantization_mode)
    return found


def is_text(value):
    return isinstance(value, str)


def trained_lora_alone(names, histories):
    lm = names["lm"]
    assert all("lora" in weight.path for weight in lm.trainable_variables)
    assert np.isfinite(histories[-1].history["loss"]).all()
    return moved(lm)


def readme(histories):
    def answered(names):
        assert names["lm"].preprocessor.chat  # the stand-in answers to the name of an instruction-tuned preset
        assert is_text(names["lm"].generate("Why is the sky blue?", max_length=8))

    def tuned(names):
        assert names["lm"].preprocessor.chat
        assert trained_lora_alone(names, histories)

    def adapted(names):
        # Ten steps at a learning rate for real models.
        fresh = kt.adapt_gemma2("gemma2_9b_en", "gemma2_2b_en", dtype="bfloat16")  # what it was before `fit`
        pairs = list(zip(fresh.weights, names["backbone"].weights, strict=True))
        changed = [np.ravel(as_float32(before) != as_float32(after)) for before, after in pairs]
        assert np.concatenate(changed).mean() > 0.5
        losses = [
            lm.evaluate(names["data"], steps=4, verbose=0, return_dict=True)["loss"]
            for lm in (kt.T5GemmaSeq2SeqLM(fresh), names["lm"])
        ]
        assert losses[1] < losses[0] - 0.01, losses
        assert names["lm"].backbone.config.encoder.hidden_dim > names["lm"].backbone.config.decoder.hidden_dim
        assert np.isfinite(histories[-1].history["loss"]).all()
        again = kt.T5GemmaSeq2SeqLM.from_preset("my-t5gemma")
        for weight, loaded in zip(names["backbone"].weights, again.backbone.weights, strict=True):
            assert np.array_equal(as_float32(weight), as_float32(loaded)), weight.path

    def own(names):
        config = names["backbone"].config
        assert (config.encoder, config.decoder.num_layers) == (STACKS["s"], 4)

    return {
        "print(lm.generate(": answered,
        "enable_lora(8)": tuned,
        "my-t5gemma": adapted,
        "kt.StackConfig(": own,
    }


def checkpoints(_):
    def written(_):
        one, other, mean, back = map(arrays, ("out", "other", "mean", "hugging_face"))
        for name, value in mean.items():
            expected = (one[name].astype("float32") + 2 * other[name].astype("float32")) / 3
            np.testing.assert_allclose(value.astype("float32"), expected, rtol=2**-7, atol=1e-6)
            assert np.array_equal(value.astype("float32"), back[name].astype("float32"))
        assert any(np.any(one[name] != other[name]) for name in one)

    return {"kt.average_checkpoints": written}


def generation(_):
    def answered(names):
        assert len(names["answers"]) == 2
        assert all(map(is_text, names["answers"]))

    def sampled(names):
        lm, prompts = names["lm"], names["prompts"]
        assert names["searched"] == lm.generate(prompts, max_length=128)
        lm.compile(sampler=kt.TopKTopPSampler(k=64, p=0.95, temperature=0.8))
        assert names["drawn"] == lm.generate(prompts, max_length=128, seed=1)

    def controlled(names):
        first = names["lm"].preprocessor.tokenizer.detokenize([int(names["first"])])
        assert all(text.strip().startswith(first.strip()) for text in names["controlled"])

    def several(names):
        tokenizer = names["lm"].preprocessor.tokenizer
        assert [len(tokenizer(text)) <= most for text, most in zip(names["limited"], (64, 16), strict=True)]
        assert [len(texts) for texts in names["several"]] == [3, 3]

    def stopped(names):
        whole = names["lm"].generate(names["prompts"], max_length=128)
        ends = [min([text.find(s) for s in ("\n", "Question:") if s in text], default=len(text)) for text in whole]
        assert names["first_lines"] == [text[:end] for text, end in zip(whole, ends, strict=True)]

    def encoded_once(names):
        lm, prompts = names["lm"], names["prompts"]
        assert names["drafts"] == [lm.generate(prompts, max_length=128, stop=stop) for stop in ("\n", ".")]
        assert names["first"] == lm.generate(prompts[0], max_length=128)
        expected = lm.score(prompts, names["choices"])["log_likelihood"]
        np.testing.assert_allclose(names["likelihoods"], expected, rtol=1e-3)

    def uncut(names):
        assert names["cut"] == names["lm"].generate(names["prompts"], max_length=128)

    def scored(names):
        result, lm, prompts = names["result"], names["lm"], names["prompts"]
        assert result["log_probs"].shape == result["decoder_token_ids"].shape == (2, 128)
        assert names["best"].shape == (2,)
        begun = lm.score(prompts[0], "Air scatters blue light.", closed=False)
        assert begun["log_likelihood"] > names["best"][0]  # an answer of which fewer tokens count

    def chose(names):
        lm, prompts, choices = names["lm"], names["prompts"], names["choices"]
        for i, answers in enumerate(choices):
            alone = [lm.score(prompts[i], answer)["log_likelihood"] for answer in answers]
            np.testing.assert_allclose(names["likelihoods"][i], alone, rtol=1e-3)
            assert names["chosen"][i] == answers[int(np.argmax(alone))]

    def rounded(names):
        assert names["lm"].buckets.batch == (1, 8)

    def streamed(names):
        lm = names["lm"]
        question = names["prompts"][0]
        assert "".join(lm.stream(question, max_length=128)) == lm.generate(question, max_length=128)

    def embedded(names):
        width = names["lm"].backbone.config.encoder.hidden_dim
        assert names["vectors"].shape == names["last"].shape == (2, width)
        assert not np.allclose(names["vectors"], names["last"])

    def in_fewer_bytes(names):
        lm, prompts = names["lm"], names["prompts"]
        assert modes(lm) == {"Dense": {"int8"}, "Embedding": {"int8"}}
        assert modes(names["smaller"]) == {"Dense": {"int4"}, "Embedding": {"int4"}}
        for other in (names["saved"], names["loaded"]):
            for weight, found in zip(lm.backbone.weights, other.backbone.weights, strict=True):
                assert np.array_equal(as_float32(weight), as_float32(found)), weight.path
        # Of the same answers as before, in nats, about a hundred in all.
        likelihoods = lm.score(prompts, ["Air scatters blue light.", "Nile, Rhine, Don."])["log_likelihood"]
        np.testing.assert_allclose(likelihoods, names["best"], rtol=0.01)

    def in_two_forms(names):
        assert modes(names["mixed"]) == {"Dense": {"int4"}, "Embedding": {"int8"}}
        assert all(map(is_text, names["mixed"].generate(names["prompts"], max_length=16)))

    return {
        "answers =": answered,
        'lm.save_to_preset("int8")': in_fewer_bytes,
        "mixed.quantize": in_two_forms,
        "kt.BeamSampler": sampled,
        "kt.ForcedTokens": controlled,
        "num_samples=3": several,
        "stop=[": stopped,
        "return_log_probs": scored,
        "lm.encode": encoded_once,
        "truncate=": uncut,
        "choices =": chose,
        "kt.Buckets": rounded,
        "lm.stream": streamed,
        "lm.embed": embedded,
    }


def preferences(histories):
    def batches(names):
        x, y, _ = next(iter(names["held_out"]))
        assert x["encoder_token_ids"].shape == (8, 64)
        assert x["decoder_token_ids"].shape == y["labels"].shape == (8, 2, 32)

    def tuned(names):
        assert trained_lora_alone(names, histories)
        assert "rewards/margins" in histories[-1].history

    def referred(names):
        assert len(names["reference"]) == 2 * len(names["rows"])
        # One step, from a model that is its own reference.
        assert histories[-1].history["loss"][-1] == pytest.approx(np.log(2), abs=0.02)

    def without(_):
        assert 0 < histories[-1].history["loss"][-1] < 10

    return {
        "kt.preference_dataset": batches,
        "lora_off": tuned,
        "kt.reference_log_probs": referred,
        "simpo": without,
    }


def evaluation(_):
    def measured(names):
        lm, found = names["lm"], names["results"]["results"]["capitals"]
        # What the task does by hand: the likelier of two answers, in turns.
        rows = [json.loads(line) for line in Path("my_tasks/capitals.jsonl").read_text().splitlines()]
        chosen = [lm.score(row["question"], row["choices"], closed=False)["log_likelihood"].argmax() for row in rows]
        assert found["acc,none"] == np.mean([i == row["answer"] for i, row in zip(chosen, rows, strict=True)])
        assert names["results"]["keras_t5gemma"]["chat"] is True

    def by_hand(names):
        assert names["more"]["results"]["capitals"]["acc,none"] == names["results"]["results"]["capitals"]["acc,none"]
        assert isinstance(names["perplexity"][0], float)

    return {"my_tasks": measured, "kt.HarnessLM": by_hand}


def rewards(_):
    def rewarded(names):
        history, log = names["history"], read_log("rewarded")
        assert log["reward"][0] == history["step"] == [1, 2]
        parts = [history[f"rewards/{name}/mean"] for name in ("is_right", "is_short")]
        np.testing.assert_allclose(history["reward"], np.sum(parts, axis=0), rtol=1e-6)
        assert history["rewards/is_short/mean"][0] < 0
        assert all("lora" in weight.path for weight in names["lm"].trainable_variables)
        assert moved(names["lm"])

    def loaded(names):
        for weight, found in zip(names["lm"].weights, names["trained"].weights, strict=True):
            assert np.array_equal(as_float32(weight), as_float32(found)), weight.path
        assert Path("adapter/adapter_model.safetensors").is_file()

    def limited(names):
        assert len(names["history"]["kl"]) == 1
        assert np.isfinite(names["history"]["loss"]).all()

    return {"is_short]": rewarded, "kt.load_training_weights": loaded, "epsilon_high": limited}


def embed(_):
    def embedded(names):
        assert names["vectors"].shape == (2, names["embedder"].dimensions)
        np.testing.assert_allclose(np.linalg.norm(names["vectors"], axis=1), 1, rtol=1e-5)

    def taught(names):
        assert names["after"]["accuracy"] > names["before"]["accuracy"] + 0.1
        assert names["after"]["loss"] < names["before"]["loss"] - 0.5

    def found(names):
        assert len(names["best"]) == 3
        assert names["best"][0] == names["names"][int(np.argmax(names["scores"]))]

    def cut(names):
        embedder, small = names["embedder"], names["small"]
        assert all("lora" in weight.path for weight in embedder.trainable_variables)
        assert moved(embedder)
        vectors = embedder.embed("Why?")[: small.dimensions]
        np.testing.assert_allclose(small.embed("Why?"), vectors / np.linalg.norm(vectors), atol=0.02)

    def exported(names):
        np.testing.assert_allclose(names["again"].embed("Why?"), names["small"].embed("Why?"), atol=0.02)
        assert names["again"].dimensions == names["small"].dimensions
        assert Path("my-sentence-transformer/modules.json").is_file()

    return {
        'from_preset("t5gemma_2b_2b_ul2"': embedded,
        "import builtins": taught,
        "import numpy": found,
        "matryoshka": cut,
        "export_to_hugging_face": exported,
    }


def training(histories):
    def averaged(_):
        steps = sorted(Path("run").glob("step_*/model"))[-5:]
        expected = {name: [arrays(step)[name] for step in steps] for name in arrays(steps[0])}
        assert len(steps) == 5
        for name, value in arrays("averaged").items():
            np.testing.assert_allclose(value, np.mean(expected[name], axis=0), rtol=1e-5, atol=1e-6)
        embeddings = expected["model.decoder.embed_tokens.weight"]
        assert np.any(embeddings[0] != embeddings[-1])

    def tuned(names):
        assert trained_lora_alone(names, histories)
        assert Path("adapter/adapter_model.safetensors").is_file()

    def in_parts(names):
        lm = names["lm"]
        assert (lm.get_compile_config()["accumulation_steps"], lm.backbone.rematerialize) == (4, True)
        assert trained_lora_alone(names, histories)

    def taught(_):
        # In nats, of two models that know nothing yet: near to what a uniform guess costs.
        assert 0 < histories[-1].history["loss"][-1] < 2 * np.log(500)

    def taught_from_disk(names):
        assert len(list(names["stored"].batches())) == 1
        assert 0 < histories[-1].history["loss"][-1] < 2 * np.log(500)

    def measured(names):
        assert [entry["rougeL"] for entry in names["metrics"].results] == names["history"]
        assert len(names["history"]) == 2

    return {
        "kt.average_checkpoints": averaged,
        "kt.GenerationMetrics": measured,
        "kt.save_lora": tuned,
        "accumulation_steps": in_parts,
        "GemmaCausalLM": taught,
        "kt.store_teacher_logits": taught_from_disk,
    }


def classify(_):
    def told_apart(names):
        (name,), (chances,) = names["names"], names["chances"]
        assert name == max(chances, key=chances.get)
        assert sum(chances.values()) == pytest.approx(1)
        assert type(names["classifier"].backbone) is kt.T5GemmaEncoder

    def cut(names):
        inputs = names["longer"].preprocessor(["a fine film"] * 2 + ["a fine film " * 2000])
        assert inputs["padding_mask"].shape == (3, 1024)
        assert inputs["padding_mask"].sum(axis=1)[2] == 1024

    def exchanged(names):
        texts = names["texts"]
        expected = names["classifier"].predict(texts, verbose=0)
        np.testing.assert_allclose(names["again"].predict(texts, verbose=0), expected, atol=0.05)  # from bfloat16
        assert "score.out_proj.weight" in arrays("films_hf")

    def tagged(names):
        assert [len(row) for row in names["tags"]] == [3]
        assert set(names["tags"][0]) <= {"O", "PERSON", "PLACE"}

    def encoded(names):
        assert all(name.startswith("encoder.") for name in arrays("encoder_hf"))
        assert len(arrays("encoder_hf")) == len(names["encoder"].weights)

    return {
        "T5GemmaTextClassifier.from_preset(\n": told_apart,
        "sequence_length=1024": cut,
        "films_hf": exchanged,
        "T5GemmaTokenClassifier": tagged,
        "T5GemmaEncoder": encoded,
    }


# A page -> a function of the histories, which gives words of each block -> what is asserted after it.
OUTCOMES = {
    "README.md": readme,
    "docs/checkpoints.md": checkpoints,
    "docs/classify.md": classify,
    "docs/evaluate.md": evaluation,
    "docs/embed.md": embed,
    "docs/exports.md": exports,
    "docs/generation.md": generation,
    "docs/preferences.md": preferences,
    "docs/rewards.md": rewards,
    "docs/scale.md": lambda _: {},
    "docs/serving.md": serving,
    "docs/training.md": training,
}
