"""The demo: its corpus, its Gemma 2, and a run from end to end at toy size."""

import dataclasses
import datetime
import importlib.util
import io
import json
import random
import re

import keras
import numpy as np
import pytest
from rich.console import Console

import keras_t5gemma as kt
from keras_t5gemma.demo import report
from keras_t5gemma.demo.adaptation import Result
from keras_t5gemma.demo.benchmark import date_rows, measure, measure_if_installed
from keras_t5gemma.demo.corpus import standard_library_corpus
from keras_t5gemma.demo.dates import FORMS, date_pairs, split_dates, write_date
from keras_t5gemma.demo.finetuning import Answers
from keras_t5gemma.demo.pretraining import causal_chunks
from keras_t5gemma.demo.run import run_demo
from keras_t5gemma.demo.settings import TOY
from keras_t5gemma.training.evaluation import mean_loss


@pytest.fixture(scope="module")
def corpus():
    return standard_library_corpus()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, (results, answers)) of a toy run."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, run_demo(out, TOY)


def fake_library(root, modules):
    for name, docstrings in modules.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(f"def f{i}():\n    {text!r}\n" for i, text in enumerate(docstrings)))


def long(text):
    return f"{text}, a documentation string that is long enough to be kept."


def test_corpus_of_the_standard_library_has_docstrings_and_the_language_reference(corpus):
    assert len(corpus.train) > 3000
    assert len(corpus.held_out) > 100
    texts = (*corpus.train, *corpus.held_out)
    assert " ".join(json.__doc__.split()) in texts
    assert any(text.startswith('The "with" statement') for text in texts)


def test_corpus_has_no_text_on_both_sides(corpus):
    assert not set(corpus.train) & set(corpus.held_out)


def test_corpus_keeps_all_docstrings_of_a_file_on_one_side(tmp_path):
    fake_library(tmp_path, {f"module{i}.py": [long(f"{i}.{j}") for j in range(3)] for i in range(40)})
    corpus = standard_library_corpus(held_out=0.5, root=tmp_path)
    train, held_out = ({text.partition(".")[0] for text in side} for side in (corpus.train, corpus.held_out))
    assert not train & held_out
    assert len(train) + len(held_out) == 40


def test_corpus_keeps_a_docstring_of_several_files_once(tmp_path):
    fake_library(tmp_path, {f"module{i}.py": [long("shared"), long(f"own {i}")] for i in range(20)})
    corpus = standard_library_corpus(held_out=0.5, root=tmp_path)
    assert sorted((*corpus.train, *corpus.held_out)).count(long("shared")) == 1


def test_corpus_leaves_out_tests_short_docstrings_and_files_that_do_not_parse(tmp_path):
    fake_library(tmp_path, {f"module{i}.py": [long(f"kept {i}"), "Too short."] for i in range(20)})
    fake_library(tmp_path, {"test/test_module.py": [long("left out")], "site-packages/peer.py": [long("left out")]})
    (tmp_path / "broken.py").write_text(f'"""{long("left out")}"""\ndef (:\n')
    corpus = standard_library_corpus(held_out=0.5, root=tmp_path)
    assert sorted((*corpus.train, *corpus.held_out)) == sorted(long(f"kept {i}") for i in range(20))


def test_corpus_without_sources_says_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match="sources") as error:
        standard_library_corpus(root=tmp_path)
    assert str(tmp_path) in str(error.value)


def test_causal_chunks_labels_are_the_next_tokens_of_one_stream():
    proto = kt.train_tokenizer(["abc def"] * 3, 402)
    token_ids, labels = causal_chunks(["abc", "def"], proto, 2)
    stream = [2, *kt.T5GemmaTokenizer(proto=proto)("abc"), 1, 2, *kt.T5GemmaTokenizer(proto=proto)("def"), 1]
    assert token_ids.ravel().tolist() == stream[: token_ids.size]
    assert labels.ravel().tolist() == stream[1 : labels.size + 1]
    assert token_ids.shape == labels.shape == ((len(stream) - 1) // 2, 2)


def test_causal_chunks_of_too_little_text_names_both_numbers():
    proto = kt.train_tokenizer(["abc"], 398)
    with pytest.raises(ValueError, match="length=500"):
        causal_chunks(["abc"], proto, 500)


def test_mean_loss_weighs_batches_by_their_target_tokens():
    class Model:
        def test_on_batch(self, x, y, weight, return_dict):
            return {"loss": x}

        def reset_metrics(self):
            pass

    few, many = np.array([[1.0, 0.0, 0.0, 0.0]]), np.ones((1, 4))
    assert mean_loss(Model(), [(10.0, few, few), (5.0, many, many)]) == pytest.approx((10 * 1 + 5 * 4) / 5)


def test_dates_are_written_in_a_dozen_ways():
    assert [write_date(datetime.date(2024, 3, 5), form) for form in FORMS] == [
        "5 March 2024",
        "March 5, 2024",
        "Mar 5th, 2024",
        "the 5th of March 2024",
        "Tuesday, March 5th 2024",
        "Tue, 05 Mar 2024",
        "Tue Mar 05 00:00:00 2024",
        "05-Mar-2024",
        "05 Mar 24",
        "05.03.2024",
        "03/05/2024",
        "20240305",
    ]
    ordinals = [write_date(datetime.date(2024, 1, day), FORMS[2]).split()[1] for day in (1, 2, 3, 11, 12, 13, 22, 31)]
    assert ordinals == ["1st,", "2nd,", "3rd,", "11th,", "12th,", "13th,", "22nd,", "31st,"]


@pytest.mark.parametrize("form", FORMS)
def test_dates_answers_are_what_the_standard_library_reads_in_the_prompts(form):
    pairs = date_pairs(split_dates()[0], 500, forms=(form,))
    read_as = form.replace("{date.day}", "%d").replace("{date.year}", "%Y").replace("{ordinal}", "%d")
    read_as = re.sub(r"\{date:(.*?)\}", r"\1", read_as)
    for prompt, answer in zip(pairs["encoder_text"], pairs["decoder_text"], strict=True):
        text = re.sub(r"(\d)(st|nd|rd|th)\b", r"\1", prompt)
        assert datetime.datetime.strptime(text, read_as).date().isoformat() == answer


def test_dates_to_learn_from_and_to_ask_for_have_none_in_common():
    train, held_out = split_dates(held_out=200)
    assert len(held_out) == len(set(held_out)) == 200
    assert len({*train, *held_out}) == len(train) + 200 == 36525


def test_answers_are_right_only_to_the_last_character():
    answers = Answers("adapted", ("a", "b", "c"), ("2024-03-05",) * 3, ("2024-03-05", "2024-03-0", "2024-03-055"), ())
    assert answers.right == 1
    assert report.score_line(answers) == "adapted: 1 of 3 held-out dates right"


def test_verdict_says_lower_only_where_it_is_lower():
    def result(start, before, after):
        return Result("balanced", start, "UL2", 1, before, after, losses=(1.0,) * 7)

    sentence = report.verdict([result("adapted", 4.0, 3.5), result("from scratch", 8.0, 3.25)])
    assert "starts 4.00 nats lower" in sentence
    assert "ends 0.25 nats higher" in sentence
    assert "7 steps" in sentence


def test_demo_refuses_a_folder_with_something_in_it(tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ValueError, match="`out`"):
        run_demo(tmp_path, TOY)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_demo_measures_both_pairs_adapted_and_from_scratch(demo):
    results = demo[1][0]
    assert [(result.pair, result.start, result.objective) for result in results] == [
        ("balanced", "adapted", "PrefixLM"),
        ("balanced", "from scratch", "PrefixLM"),
        ("unbalanced", "adapted", "UL2"),
        ("unbalanced", "from scratch", "UL2"),
    ]
    for adapted, scratch in (results[:2], results[2:]):
        assert adapted.parameters == scratch.parameters
        assert len(adapted.losses) == len(scratch.losses) == TOY.adaptation.steps
    for result in results:
        assert np.isfinite([result.before, result.after, *result.losses]).all()
        assert result.after < result.before
        # The loss of fresh weights is that of a guess among all pieces; held-out and training text are alike.
        assert abs(result.before - result.losses[0]) < 0.5


def test_demo_from_scratch_starts_at_the_loss_of_a_guess(demo):
    for result in demo[1][0][1::2]:
        assert result.before == pytest.approx(np.log(TOY.vocabulary_size), abs=0.1)


def test_demo_writes_figures_completions_and_a_picture(demo):
    out, (results, _) = demo
    written = json.loads((out / "results.json").read_text())
    assert [row["after"] for row in written["results"]] == [result.after for result in results]
    assert written["environment"]["keras"]
    completions = (out / "completions.txt").read_text(encoding="utf-8")
    for voice in ("prompt", "truth", "adapted", "from scratch"):
        assert f"[{voice}]" in completions
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_demo_fine_tunes_both_starts_on_dates_and_keeps_every_answer(demo):
    out, (_, tuned) = demo
    assert [answers.start for answers in tuned] == ["adapted", "from scratch"]
    asked = date_pairs(split_dates(TOY.held_out_dates)[1], seed=1)
    written = json.loads((out / "results.json").read_text())["dates"]
    for answers, row in zip(tuned, written, strict=True):
        assert answers.losses[-1] < answers.losses[0]
        assert len(answers.losses) == TOY.dates.steps
        assert answers.prompts == tuple(asked["encoder_text"])
        assert answers.truths == tuple(asked["decoder_text"])
        assert row["answers"] == list(answers.answers)
        assert row["right"] == answers.right


def test_demo_leaves_the_model_that_gave_the_answers(demo):
    out, (_, (adapted, _)) = demo
    lm = kt.T5GemmaSeq2SeqLM.from_preset(out / "t5gemma_dates")
    assert lm.generate(list(adapted.prompts), max_length=12) == list(adapted.answers)


def test_demo_is_measured_by_the_harness_before_and_after_tuning(demo):
    out, (_, (adapted, _)) = demo
    benchmark = json.loads((out / "results.json").read_text())["benchmark"]
    assert set(benchmark["before"]) == set(benchmark["after"]) == {"dates_choice", "dates_text"}
    assert benchmark["after"]["dates_text"] == adapted.right / len(adapted.truths)
    # The likeliest of four choices, as `score` has it.
    lm, rows = kt.T5GemmaSeq2SeqLM.from_preset(out / "t5gemma_dates"), date_rows(TOY)
    scores = lm.score([row["prompt"] for row in rows], [row["choices"] for row in rows], closed=False)
    right = scores["log_likelihood"].argmax(axis=1) == [row["answer"] for row in rows]
    assert benchmark["after"]["dates_choice"] == right.mean()


def test_demo_measurement_leaves_the_random_numbers_of_what_follows(demo):
    lm = kt.T5GemmaSeq2SeqLM.from_preset(demo[0] / "t5gemma_dates")
    drawn = []
    for measured in (False, True):
        keras.utils.set_random_seed(1)
        if measured:
            measure(lm, TOY)
        uniform = keras.ops.convert_to_numpy(keras.random.uniform((2,))).tolist()
        drawn.append((random.random(), np.random.random(), uniform))
    assert drawn[0] == drawn[1]


def test_demo_is_measured_on_dates_in_digits_alone(demo):
    settings = dataclasses.replace(TOY, held_out_dates=30)
    assert any(row["prompt"].isdigit() for row in date_rows(settings))
    lm = kt.T5GemmaSeq2SeqLM.from_preset(demo[0] / "t5gemma_dates")
    assert all(0 <= share <= 1 for share in measure(lm, settings).values())


def test_demo_choices_are_four_dates_with_the_right_one_at_any_place():
    rows = date_rows(TOY)
    assert all(len(set(row["choices"])) == 4 and row["choices"][row["answer"]] == row["date"] for row in rows)
    assert len({row["answer"] for row in rows}) > 1


def test_demo_without_the_harness_says_in_a_line_what_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    console = Console(file=io.StringIO(), width=500)
    assert measure_if_installed(None, TOY, console) is None
    (line,) = console.file.getvalue().splitlines()
    assert "pip install 'keras-t5gemma[evaluation]'" in line


@pytest.mark.parametrize("pair", ["balanced", "unbalanced"])
def test_demo_checkpoint_gives_the_same_logits_in_transformers(demo, pair):
    import torch
    import transformers

    folder = demo[0] / f"t5gemma_{pair}"
    # Shorter than the windows, about which `transformers` 5 and the paper differ by one key.
    ids = np.arange(200, 212, dtype="int32").reshape(2, 6)
    lm = kt.T5GemmaSeq2SeqLM.from_preset(folder, preprocessor=None)
    ours = lm.predict(
        {
            "encoder_token_ids": ids,
            "encoder_padding_mask": np.ones_like(ids),
            "decoder_token_ids": ids,
            "decoder_padding_mask": np.ones_like(ids),
        },
        verbose=0,
    )
    peer = transformers.T5GemmaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.tensor(ids.astype("int64"))
    with torch.no_grad():
        theirs = peer(input_ids=ids, decoder_input_ids=ids).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_demo_gemma2_is_a_preset_that_adapts(demo):
    backbone = kt.adapt_gemma2(str(demo[0] / "gemma2_large"), str(demo[0] / "gemma2_small"))
    assert backbone.config.encoder.hidden_dim == TOY.large.hidden_dim
    assert backbone.config.decoder.hidden_dim == TOY.small.hidden_dim
