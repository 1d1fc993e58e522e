"""The README tells the truth: its code runs, its commands are those of CI, its table is the computed one."""

import re
from pathlib import Path

import pytest
import typer

import keras_t5gemma as kt
from keras_t5gemma.checkpoints.name_maps import parameter_count
from keras_t5gemma.cli import app
from keras_t5gemma.demo.pretraining import build_gemma2, save_gemma2
from keras_t5gemma.presets import PAIRS, STACKS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")

GENERATION = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    """What stands in for the downloads: a name in the README -> a folder here."""
    folder = tmp_path_factory.mktemp("models")
    proto = kt.train_tokenizer([README], 500)
    large = kt.StackConfig(1, 16, 24, 2, 1, 8, sliding_window=8)
    small = kt.StackConfig(1, 12, 24, 2, 1, 6, sliding_window=8)
    for name, stack in (("gemma2_9b_en", large), ("gemma2_2b_en", small)):
        save_gemma2(build_gemma2(stack, 500), proto, folder / name)
    tokenizer = kt.T5GemmaTokenizer(proto=proto)
    name = "t5gemma_2b_2b_prefixlm_it"
    kt.export_to_hugging_face(
        kt.T5GemmaBackbone(large, vocabulary_size=500), folder / name, tokenizer=tokenizer, chat=True
    )
    return {name: str(folder / name) for name in (name, "gemma2_9b_en", "gemma2_2b_en")}


def test_python_tour_with_tiny_models_runs_from_top_to_bottom(tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "unchanged")  # the tour sets it; put back afterwards
    code = "\n".join(blocks("python"))
    for name, folder in tiny_models.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(folder))
    # The same calls, sized for a test.
    for full, tiny in (("512", "32"), ("10_000", "2"), ("256_000", "500"), ("max_length=128", "max_length=8")):
        assert full in code
        code = code.replace(full, tiny)
    names = {"texts": [README]}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "my-t5gemma" / "model.safetensors").is_file()
    assert names["backbone"].config.encoder == STACKS["s"]


def test_training_guide_with_tiny_models_runs_from_a_text_file_to_an_averaged_checkpoint(
    tiny_models, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text(README, encoding="utf-8")
    *code, devices = blocks("python", TRAINING)
    assert "DeviceMesh" in devices  # eight of them: see `test_distribution`
    code = "\n".join(code).replace('"gemma2_2b_en"', repr(tiny_models["gemma2_2b_en"]))
    tiny_sizes = (("(512, 512)", "(32, 32)"), ("10_000", "100"), ("epochs=10", "epochs=5"), ("1_000", "1"))
    for full, tiny in (*tiny_sizes, ("save_every=500", "save_every=1"), ("steps_per_epoch=100", "steps_per_epoch=1")):
        assert full in code
        code = code.replace(full, tiny)
    exec(compile(code, "training.md", "exec"), {})
    assert (tmp_path / "averaged" / "model.safetensors").is_file()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_generation_guide_with_a_tiny_model_gives_results_of_the_shapes_it_says(tiny_models):
    name = "t5gemma_2b_2b_prefixlm_it"
    code = "\n".join(blocks("python", GENERATION))
    for full, tiny in (
        (f'"{name}"', repr(tiny_models[name])),
        ("=128", "=8"),
        ("[64, 16]", "[7, 2]"),
        ("235280", "99"),
    ):
        assert full in code
        code = code.replace(full, tiny)
    names = {}
    exec(compile(code, "generation.md", "exec"), names)
    assert all(isinstance(text, str) for text in names["answers"] + names["result"]["text"])
    assert [len(texts) for texts in names["several"]] == [3, 3]
    assert names["result"]["log_probs"].shape == names["result"]["decoder_token_ids"].shape == (2, 8)
    assert names["best"].shape == (2,)
    lm, prompts = names["lm"], names["prompts"]
    begun = lm.score(prompts[0], "Air scatters blue light.", closed=False)
    assert begun["log_likelihood"] > names["best"][0]  # an answer of which fewer tokens count


def test_training_guides_recipe_is_good_and_says_what_its_python_says(tmp_path):
    (text,) = blocks("toml", TRAINING)
    (tmp_path / "my.toml").write_text(text, encoding="utf-8")
    recipe = kt.read_recipe(tmp_path / "my.toml")
    python = blocks("python", TRAINING)[0]
    lengths = recipe.objective.encoder_length, recipe.objective.decoder_length
    for said in (
        f'adapt_gemma2("{recipe.model.adapt[0]}", dtype="{recipe.model.dtype}")',
        f'optimizer("{recipe.optimizer.name}", learning_rate=1e-4, steps={recipe.training.steps:_})',
        f"text_source({recipe.data.sources[0]!r})".replace("'", '"'),
        f"UL2{lengths}, batch_size={recipe.training.batch_size}",
        f'"{recipe.output.folder}", save_every={recipe.training.save_every}, keep={recipe.training.keep}',
        f"last={recipe.output.average_last}",
    ):
        assert said in python


def test_command_line_examples_name_verbs_that_exist():
    used = set(re.findall(r"keras-t5gemma ([a-z]+)", README))
    assert used == set(typer.main.get_command(app).commands)


def test_ci_runs_the_test_command():
    (command,) = [block for block in blocks("bash") if "nox" in block]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_preset_table_has_the_computed_sizes():
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| (\d+) x (\d+) \| (\d+) x (\d+) \|$", README, re.MULTILINE)
    assert len(rows) == len(PAIRS)
    for (pair, parameters, *sizes), (encoder, decoder) in zip(rows, PAIRS, strict=True):
        assert pair == f"{encoder}_{decoder}"
        stacks = STACKS[encoder], STACKS[decoder]
        assert int(parameters.replace(",", "")) == parameter_count(kt.T5GemmaConfig(*stacks))
        assert [int(size) for size in sizes] == [n for stack in stacks for n in (stack.num_layers, stack.hidden_dim)]


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "docs/generation.md"]
)
def test_links_between_pages_lead_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert not [link for link in links if not (path.parent / link).exists()]
