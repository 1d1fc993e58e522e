"""`keras-t5gemma generate`: prompts from everywhere, answers to the terminal or into a file of whole lines."""

import io
import json

import pytest
import typer
from peers import tiny_config
from tiny import loud_backbone
from tiny_tokenizer import TEXTS, train_tiny_tokenizer
from typer.testing import CliRunner

from keras_t5gemma.cli import app
from keras_t5gemma.cli.generation import read_prompts, sampler_of, write_answers

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


def test_prompts_come_from_arguments_stdin_and_files_in_this_order(tmp_path, monkeypatch):
    (tmp_path / "more.txt").write_text("three\n\n  \nfour \r\n", encoding="utf-8")
    conversation = [{"role": "user", "content": "Knock knock.\nWho\u2028is there?"}]
    rows = [{"prompt": "five", "other": 1}, {"prompt": conversation}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    got = read_prompts(["zero\nstill zero", "-"], [tmp_path / "more.txt", tmp_path / "rows.jsonl"])
    assert got == ["zero\nstill zero", "one", "two", "three", "four ", "five", conversation]


def test_no_prompt_at_all_is_refused(tmp_path):
    with pytest.raises(typer.BadParameter, match="at least one PROMPT"):
        read_prompts([], [])
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"no prompt in .*empty\.txt"):
        read_prompts([], [tmp_path / "empty.txt"])


@pytest.mark.parametrize("line", ["{", "3", '{"text": "a"}'])
def test_line_that_holds_no_prompt_is_named(line, tmp_path):
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"rows\.jsonl: a line is not"):
        read_prompts([], [tmp_path / "rows.jsonl"])


def test_answers_are_written_a_batch_at_a_time_in_order_and_the_last_batch_is_as_large(tmp_path):
    lm, out = Echo(), tmp_path / "answers.jsonl"
    write_answers(lm, list("abcde"), out, 7, 2)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [{"prompt": prompt, "answer": f"{prompt} in 7"} for prompt in "abcde"]
    assert lm.batches == [["a", "b"], ["c", "d"], ["e", "e"]]


def test_broken_run_leaves_the_whole_lines_of_the_batches_before(tmp_path):
    out = tmp_path / "answers.jsonl"
    with pytest.raises(MemoryError):
        write_answers(Echo(breaks_at="d"), ["é", "b", "c", "d"], out, 7, 2)
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
    together = run(model, "-", *SHORT, text=f"{TEXTS[0][:20]}\n{TEXTS[0][:20]}")
    assert together.stdout == 2 * alone.stdout
    assert len(alone.stdout) > 1


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
