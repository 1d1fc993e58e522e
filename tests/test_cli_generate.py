"""`keras-t5gemma generate`: prompts from everywhere, answers to the terminal or into a file of whole lines."""

import io
import json

import pytest
import typer
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import TEXTS, train_tiny_tokenizer
from typer.testing import CliRunner

import keras_t5gemma as kt
from keras_t5gemma.cli import app
from keras_t5gemma.cli.generation import sampler_of
from keras_t5gemma.cli.options import InferenceDtype
from keras_t5gemma.cli.prompts import read_prompts, write_answers
from keras_t5gemma.cli.session import inference_dtype, load_for_inference

SHORT = ("--max-length", "6")


def run(*arguments, text=None):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], input=text)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model's folder."""
    from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
    from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor
    from keras_t5gemma.text.tokenizer import T5GemmaTokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = T5GemmaTokenizer(proto=train_tiny_tokenizer(folder / "tokenizer.model"))
    backbone = loud_backbone(tiny_config(balanced=False, num_layers=1, vocabulary_size=512))
    lm = T5GemmaSeq2SeqLM(backbone, T5GemmaSeq2SeqLMPreprocessor(tokenizer, 16, 8))
    lm.save_to_preset(str(folder / "preset"))
    return folder / "preset"


class Echo:
    """In place of a model: answers each prompt with itself, and breaks down at one of them."""

    def __init__(self, breaks_at=None):
        self.batches, self.breaks_at = [], breaks_at

    def generate(self, prompts, max_length):
        if self.breaks_at in prompts:
            raise MemoryError
        self.batches.append(list(prompts))
        return [f"{prompt} in {max_length}" for prompt in prompts]


def prompts(texts):
    return [{"prompt": text} for text in texts]


def test_prompts_come_from_arguments_stdin_and_files_in_this_order(tmp_path, monkeypatch):
    (tmp_path / "more.txt").write_text("three\n\n  \nfour \r\n", encoding="utf-8")
    conversation = [{"role": "user", "content": "Knock knock.\nWho\u2028is there?"}]
    rows = [{"prompt": "five", "other": 1}, {"prompt": conversation}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    got = read_prompts(["zero\nstill zero", "-"], [tmp_path / "more.txt", tmp_path / "rows.jsonl"])
    texts = ["zero\nstill zero", "one", "two", "three", "", "  ", "four "]
    assert got == [*({"prompt": text} for text in texts), *rows]


def test_no_prompt_at_all_is_refused(tmp_path):
    with pytest.raises(typer.BadParameter, match="at least one PROMPT"):
        read_prompts([], [])
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"no prompt in .*empty\.txt"):
        read_prompts([], [tmp_path / "empty.txt"])


@pytest.mark.parametrize("line", ["{", "3", "", '{"text": "a"}', '{"prompt": 3}', '{"prompt": "a", "answer": "b"}'])
def test_line_that_holds_no_prompt_or_has_an_answer_is_named(line, tmp_path):
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "good"}}\n{line}\n{{"prompt": "good"}}\n\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: "):
        read_prompts([], [tmp_path / "rows.jsonl"])


def test_answers_are_written_a_batch_at_a_time_in_order_and_the_last_batch_is_as_large(tmp_path):
    lm, out = Echo(), tmp_path / "answers.jsonl"
    write_answers(lm, prompts("abcde"), out, 2, max_length=7)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [{"prompt": prompt, "answer": f"{prompt} in 7"} for prompt in "abcde"]
    assert lm.batches == [["a", "b"], ["c", "d"], ["e", "e"]]


def test_fields_of_a_row_go_with_its_answer_and_a_prompt_without_text_keeps_its_place(tmp_path):
    lm, out = Echo(), tmp_path / "answers.jsonl"
    rows = [{"id": 3, "prompt": "a"}, {"prompt": " "}, {"prompt": ""}, {"prompt": "", "id": 4}, {"prompt": "e"}]
    write_answers(lm, rows, out, 2, max_length=7)
    answers = ["a in 7", "", "", "", "e in 7"]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert written == [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]
    assert list(written[0]) == ["id", "prompt", "answer"]
    assert lm.batches == [["a", "a"], ["e", "e"]]


def test_broken_run_leaves_the_whole_lines_of_the_batches_before(tmp_path):
    out = tmp_path / "answers.jsonl"
    with pytest.raises(MemoryError):
        write_answers(Echo(breaks_at="d"), prompts("ébcd"), out, 2, max_length=7)
    content = out.read_text(encoding="utf-8")
    assert content.endswith("\n")
    assert [json.loads(line)["prompt"] for line in content.splitlines()] == ["é", "b"]


def test_file_that_exists_is_refused_before_anything_is_loaded_and_kept(tmp_path):
    (tmp_path / "answers.jsonl").write_text("mine")
    result = run("no_such_model", "hi", "--out", tmp_path / "answers.jsonl")
    assert result.exit_code == 1
    assert "exists already" in result.output
    assert (tmp_path / "answers.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    "options",
    [
        ("--num-beams", "2", "--top-k", "3"),
        ("--sampler", "greedy", "--temperature", "0.5"),
        ("--sampler", "beam", "--num-beams", "2"),
    ],
)
def test_options_for_different_ways_to_choose_exclude_each_other(options):
    result = run("no_such_model", "hi", *options)
    assert result.exit_code == 1
    assert f"{options[0]}, {options[2]} ask for different ways" in result.output


def test_single_answer_is_streamed_and_the_same_as_among_others(model):
    alone = run(model, TEXTS[0][:20], *SHORT)
    assert alone.exit_code == 0, alone.output
    together = run(model, "-", *SHORT, "--temperature", 0, "--seed", 3, text=f"{TEXTS[0][:20]}\n{TEXTS[0][:20]}")
    assert together.stdout == 2 * alone.stdout
    assert len(alone.stdout) > 1


def test_empty_lines_of_stdin_are_empty_lines_of_the_answers(model):
    alone = run(model, TEXTS[0][:20], *SHORT)
    spaced = run(model, "-", *SHORT, text=f"\n{TEXTS[0][:20]}\n\n")
    assert spaced.stdout == f"\n{alone.stdout}\n"


def test_temperature_of_zero_is_greedy_and_below_zero_none():
    assert sampler_of(None, None, 0.0, 40, 0.9, 5) == "greedy"
    assert run("no_such_model", "hi", "--temperature", "-1").exit_code == 2


def test_prompt_that_is_too_long_is_an_error_or_cut_as_asked(model):
    long = TEXTS[0] + TEXTS[1]
    refused = run(model, long, *SHORT)
    assert (refused.exit_code, 'truncate="left"' in refused.output) == (1, True)
    loaded = load_for_inference(str(model), None, None)
    assert loaded.backbone.dtype_policy.name == "float32"  # on a CPU
    result = run(model, long, *SHORT, "--truncate", "left")
    assert result.stdout == f"{loaded.generate(long, max_length=6, truncate='left')}\n"


@pytest.mark.parametrize(
    ("on_cpu", "asked", "dtype"),
    [
        (True, None, "float32"),
        (False, None, "bfloat16"),
        (True, InferenceDtype.float16, "float16"),
        (True, InferenceDtype.int8, "int8_from_float32"),
        (False, InferenceDtype.int4, "int4_from_bfloat16"),
    ],
)
def test_dtype_is_what_is_asked_for_or_suits_the_hardware(on_cpu, asked, dtype, model, monkeypatch):
    monkeypatch.setattr("keras_t5gemma.kernels.device.on_cpu", lambda x: on_cpu)
    assert inference_dtype(asked, model) == dtype


def test_model_answers_in_int8(model):
    result = run(model, TEXTS[0][:20], *SHORT, "--dtype", "int8")
    assert result.exit_code == 0, result.output
    loaded = kt.T5GemmaSeq2SeqLM.from_preset(str(model), dtype="int8_from_float32")
    assert result.stdout == f"{loaded.generate(TEXTS[0][:20], max_length=6)}\n"


def test_preset_that_was_saved_quantized_keeps_its_dtype(model, tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"dtype": "int8_from_bfloat16"}}')
    assert inference_dtype(None, tmp_path) is None


def test_answers_end_before_a_stop_string(model):
    whole = run(model, TEXTS[0][:20], *SHORT).stdout[:-1]
    expected = whole[: whole.index(whole[2:4])]
    assert run(model, TEXTS[0][:20], *SHORT, "--stop", "never", "--stop", whole[2:4]).stdout == f"{expected}\n"
    both = run(model, TEXTS[0][:20], TEXTS[0][:20], *SHORT, "--stop", whole[2:4]).stdout
    assert both == f"{expected}\n" * 2


def test_answers_drawn_with_a_seed_go_to_a_file(model, tmp_path):
    def answer(*options):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        result = run(model, TEXTS[1][:20], *SHORT, "--out", out, *options)
        assert result.exit_code == 0, result.output
        return json.loads(out.read_text(encoding="utf-8"))["answer"]

    assert answer("--temperature", "5", "--seed", 1) != answer("--temperature", "5", "--seed", 2)


def test_options_become_the_sampler_they_name():
    assert sampler_of(None, None, None, None, None, None) == "greedy"
    assert sampler_of("contrastive", None, None, None, None, None) == "contrastive"
    assert sampler_of(None, 3, None, None, None, None).num_beams == 3
    expected = {"temperature": 0.7, "k": 40, "p": 0.9, "seed": 5}
    assert sampler_of(None, None, 0.7, 40, 0.9, 5).get_config() == expected
    assert sampler_of(None, None, None, 40, None, None).get_config() == {"temperature": 1, "k": 40} | {
        name: None for name in ("p", "seed")
    }
