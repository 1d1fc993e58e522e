"""The command line: help without Keras, errors in a line, and the verbs on a tiny checkpoint."""

import importlib.metadata
import json
import os
import resource
import subprocess
import sys

import keras
import pytest
import typer
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import keras_t5gemma as kt
from keras_t5gemma.cli import app
from keras_t5gemma.cli.inspection import size_name
from keras_t5gemma.cli.session import first_free, one_line_errors
from keras_t5gemma.presets import PRESETS, STACKS
from keras_t5gemma.recipes.reading import recipe_path

VERBS = ("demo", "adapt", "export", "average", "inspect", "verify", "train", "plot", "generate", "evaluate", "env")
VERBS += ("presets", "superglue", "serve")
BACKENDS = ("keras", "keras_hub", "jax", "tensorflow", "torch")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def in_new_python(*arguments, **environment):
    """Run the command line in a Python of its own; (exit code, output, errors, imported backends)."""
    code = (
        "import sys\nfrom keras_t5gemma.cli import app\n"
        f"try:\n    app({list(arguments)!r})\n"
        f"finally:\n    print([name for name in {BACKENDS} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    *output, imported = result.stdout.splitlines()
    return result.returncode, "\n".join(output), result.stderr, imported


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_answers_without_importing_a_backend(verb):
    code, output, _, imported = in_new_python(verb, "--help")
    assert code == 0
    assert verb in output
    assert imported == "[]"


def test_help_takes_under_a_second_of_processor_time():
    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    in_new_python("--help")
    assert spent() - before < 1


def test_version_is_told_without_importing_a_backend():
    assert in_new_python("--version") == (0, f"keras-t5gemma {kt.__version__}", "", "[]")


def test_env_names_versions_backend_and_devices():
    result = run("env")
    facts = dict(line.split(": ", 1) for line in result.output.splitlines())
    assert result.exit_code == 0
    assert facts["keras"] == importlib.metadata.version("keras")
    assert facts["backend"] == keras.backend.backend()
    assert "cpu" in facts["devices"].lower()


def test_env_says_what_is_wrong_with_a_backend_that_does_not_import(tmp_path, monkeypatch):
    name = keras.backend.backend()
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('no such driver')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    result = run("env")
    facts = dict(line.split(": ", 1) for line in result.output.splitlines())
    assert result.exit_code == 0
    assert facts["backend"] == "does not work (exit status 1): RuntimeError: no such driver"
    assert facts["numpy"] == importlib.metadata.version("numpy")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("generate", "nothing", "hi", "--sampler", "gredy"), "Did you mean 'greedy'?"),
        (("generate", "nothing", "hi", "--top-p", "0"), "--top-p"),
        (("generate", "nothing", "hi", "--out", "no_such_folder/a.jsonl"), "no_such_folder"),
        (("generate", "google/t5gemma-2b-2b-ul2", "hi"), "Did you mean 't5gemma_2b_2b_ul2'?"),
        (("adapt", "nothing", "out", "--cross-attention", "self_attention"), "Did you mean 'self-attention'?"),
        (("adapt", "nothing", "out", "--max-shard-size", "5 apples"), "5 apples"),
        (("export", "nothing", "out", "--max-shard-size", "5 apples"), "5 apples"),
        (("average", "one", "out"), "two checkpoints"),
    ],
)
def test_option_that_cannot_be_is_told_before_any_backend_is_imported(arguments, named):
    code, output, errors, imported = in_new_python(*arguments)
    assert (code, output) == (1, "")
    assert named in errors
    assert imported == "[]"


def test_plot_of_several_runs_has_a_name_of_its_own_that_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text("step,loss\n1,3.0\n2,2.0\n", encoding="utf-8")
    for runs, picture in ((("a",), "a/log.png"), (("a", "b"), "runs.png"), (("a", "b"), "runs_2.png")):
        before = (tmp_path / "a" / "log.png").stat().st_mtime_ns if picture != "a/log.png" else None
        result = run("plot", *runs)
        assert (result.exit_code, result.output) == (0, f"Wrote {picture}.\n")
        assert (tmp_path / picture).is_file()
        assert before is None or (tmp_path / "a" / "log.png").stat().st_mtime_ns == before


def test_verbs_are_these_and_no_others():
    assert sorted(typer.main.get_command(app).commands) == sorted(VERBS)


def test_presets_lists_every_checkpoint_with_its_parameters_and_handle():
    result = run("presets")
    assert result.exit_code == 0
    assert len([line for line in result.output.splitlines() if "hf://google/t5gemma-" in line]) == len(PRESETS)
    row = next(line for line in result.output.splitlines() if "t5gemma_9b_2b_prefixlm_it" in line)
    assert "12,292,375,296" in row
    assert "hf://google/t5gemma-9b-2b-prefixlm-it" in row


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train",), "RECIPE"),
        (("train", "tiny", "--steps", "few"), "--steps"),
        (("plot",), "RUN"),
        (("generate", "model"), "PROMPT"),
        (("generate", "model", "hi", "--max-length", "many"), "--max-length"),
        (("generate", "model", "hi", "--backend", "numpy"), "numpy"),
        (("adapt", "a", "b", "c", "out"), "4 arguments"),
        (("verify", "model", "--gemma2", "a", "--against", "b"), "--against"),
        (("verify", "model", "--gemma2", "a", "--gemma2", "b", "--gemma2", "c"), "3 times"),
        (("fly",), "fly"),
    ],
)
def test_bad_usage_exits_with_2_and_names_it(arguments, named):
    result = run(*arguments)
    assert result.exit_code == 2
    assert named in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "no_such_model"),
        ("generate", "no_such_model", "hi"),
        ("export", "no_such_model", "no_such_folder"),
    ],
)
def test_unknown_model_is_one_line_on_stderr_before_any_backend_is_imported(arguments):
    code, output, errors, imported = in_new_python(*arguments)
    assert code == 1
    assert output == ""
    assert len(errors.splitlines()) == 1
    assert errors.startswith("Error: Unknown preset 'no_such_model'")
    assert imported == "[]"


def test_unknown_backend_in_the_environment_is_one_line(tmp_path):
    code, _, errors, imported = in_new_python("demo", "--out", str(tmp_path / "out"), KERAS_BACKEND="abacus")
    assert code == 1
    assert errors.startswith("Error: KERAS_BACKEND must be one of jax, tensorflow, torch. Received: 'abacus'")
    assert imported == "[]"


@pytest.mark.parametrize("verb", ["export", "demo", "adapt"])
def test_output_folder_with_something_in_it_is_refused_at_once(verb, tmp_path):
    (tmp_path / "precious").write_text("mine")
    arguments = {
        "export": ("no_such_model", tmp_path),
        "demo": ("--out", tmp_path),
        "adapt": ("no_such_model", tmp_path),
    }
    result = run(verb, *arguments[verb])
    assert result.exit_code == 1
    assert "is not empty" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_first_free_folder_is_the_name_itself_or_the_next_number(tmp_path):
    out = tmp_path / "demo_out"
    assert first_free(out) == out
    out.mkdir()
    (tmp_path / "demo_out_2").mkdir()
    assert first_free(out) == tmp_path / "demo_out_3"


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ("no_such_recipe", "There is no recipe 'no_such_recipe'"),
        ("tiny", "corpus.txt"),  # which is not here
        (__file__, "is not TOML"),
    ],
)
def test_recipe_that_cannot_be_followed_is_one_line_on_stderr_before_keras_is_imported(recipe, named):
    code, output, errors, imported = in_new_python("train", recipe)
    assert (code, output) == (1, "")
    assert "keras" not in imported  # Grain, which reads texts, imports JAX
    assert len(errors.splitlines()) == 1
    assert errors.startswith("Error: ")
    assert named in errors


def test_train_into_a_folder_with_something_else_in_it_is_refused_at_once(tmp_path):
    (tmp_path / "precious").write_text("mine")
    result = run("train", "tiny", "--out", tmp_path)
    assert (result.exit_code, "holds no run but precious" in " ".join(result.output.split())) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_train_show_prints_the_recipe_to_copy_and_change():
    result = run("train", "9b_2b_ul2", "--show")
    assert (result.exit_code, result.output) == (0, recipe_path("9b_2b_ul2").read_text(encoding="utf-8"))


def test_loss_that_is_no_number_is_told_in_a_line(capsys):
    with pytest.raises(typer.Exit), one_line_errors():
        raise FloatingPointError("The loss is nan at batch 7. The last good checkpoint is step_00000005.")
    assert capsys.readouterr().err.startswith("Error: The loss is nan at batch 7.")


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory):
    """A tiny random Gemma 2 as a keras-hub preset, with a tokenizer."""
    from keras_t5gemma import train_tokenizer
    from keras_t5gemma.config import StackConfig
    from keras_t5gemma.demo.pretraining import build_gemma2, save_gemma2

    folder = tmp_path_factory.mktemp("gemma2") / "preset"
    proto = train_tokenizer(["the quick brown fox jumps over the lazy dog"], 440)
    save_gemma2(build_gemma2(StackConfig(1, 16, 24, 2, 1, 8, sliding_window=8), 440), proto, folder)
    return folder


def test_adapt_inspect_generate_and_export_work_on_one_checkpoint(gemma2, tmp_path):
    adapted, preset = tmp_path / "adapted", tmp_path / "preset"
    for arguments in (("adapt", gemma2, adapted), ("export", adapted, preset, "--format", "keras")):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert "Wrote" in result.output

    config = json.loads((adapted / "config.json").read_text())
    assert config["model_type"] == "t5gemma"
    assert json.loads((preset / "config.json").read_text())["registered_name"] == "keras_t5gemma>T5GemmaBackbone"

    for folder, kind in ((adapted, "Hugging Face format"), (preset, "Keras preset"), (gemma2, "Keras preset")):
        result = run("inspect", folder)
        assert result.exit_code == 0, result.output
        assert kind in " ".join(result.output.split())
        assert "parameters" in result.output

    answers = run("generate", adapted, "the quick", "the lazy", "--max-length", 4)
    assert answers.exit_code == 0, answers.output
    assert answers.output == run("generate", preset, "the quick", "the lazy", "--max-length", 4).output


def test_verify_knows_an_adapted_model_by_its_gemma2_and_a_changed_one_by_the_difference(gemma2, tmp_path):
    for heads in ("grouped", "multi"):
        adapted = tmp_path / heads
        assert run("adapt", gemma2, adapted, "--encoder-heads", heads).exit_code == 0
        result = run("verify", adapted)
        assert (result.exit_code, "all finite; 32 of them have a checksum" in result.output) == (0, True), result.output
        result = run("verify", adapted, "--gemma2", gemma2)
        assert result.exit_code == 0, result.output
        assert "decoder hidden states" in result.output
    file = tmp_path / "grouped" / "model.safetensors"
    arrays = load_file(file)
    arrays["model.decoder.layers.0.mlp.up_proj.weight"][3] += 1
    save_file(arrays, file)
    assert run("adapt", gemma2, tmp_path / "again").exit_code == 0
    for question in (("--gemma2", gemma2), ("--against", tmp_path / "again")):
        result = run("verify", tmp_path / "grouped", *question)
        assert result.exit_code == 1
        assert "differ by more than 1e-05" in result.output
    assert "model.decoder.layers.0.mlp.up_proj.weight" in result.output
    same = run("verify", tmp_path / "again", "--against", tmp_path / "again")
    assert (same.exit_code, "bit for bit" in same.output) == (0, True)


def test_average_of_a_checkpoint_and_itself_is_itself(gemma2, tmp_path):
    assert run("adapt", gemma2, tmp_path / "one").exit_code == 0
    result = run("average", tmp_path / "one", tmp_path / "one", tmp_path / "mean", "--weights", "1,3")
    assert result.exit_code == 0, result.output
    assert "bit for bit" in run("verify", tmp_path / "mean", "--against", tmp_path / "one").output
    result = run("average", tmp_path / "one", tmp_path / "one", tmp_path / "other", "--weights", "1,x")
    assert (result.exit_code, "--weights" in result.output) == (1, True)


def test_inspect_names_published_sizes_and_lists_tensors(gemma2):
    result = run("inspect", gemma2, "--tensors")
    assert result.exit_code == 0, result.output
    assert "none of the published" in result.output
    assert "model.layers.0.self_attn.q_proj.weight" in result.output
    assert size_name(STACKS["2b"]) == "2b"


def test_adapt_to_an_unknown_cross_attention_writes_nothing(gemma2, tmp_path):
    result = run("adapt", gemma2, tmp_path / "out", "--cross-attention", "sideways")
    assert result.exit_code == 1
    assert "sideways" in result.output
    assert not (tmp_path / "out").exists()
