"""A recipe file: every key checked, and a fault told with the file, the key, what came and what would work."""

import dataclasses
import tomllib
import typing

import pytest

from keras_t5gemma.recipes.no_effect import RULES
from keras_t5gemma.recipes.objective_section import make_objective
from keras_t5gemma.recipes.reading import RecipeError, flat, read_recipe, recipe_names, to_toml
from keras_t5gemma.recipes.run_folder import COMPARED, MAY_CHANGE, begin, check_run, locked
from keras_t5gemma.recipes.schema import Recipe

MINIMAL = """
[model]
preset = "t5gemma_s_s_ul2"
[data]
sources = "corpus.txt"
[objective]
name = "ul2"
encoder_length = 64
decoder_length = 48
[optimizer]
learning_rate = 1e-3
[training]
steps = 100
batch_size = 8
[output]
folder = "run"
"""
OBJECTIVE = '[objective]\nname = "ul2"\nencoder_length = 64\ndecoder_length = 48'
TASK = '[task]\nhead = "text_classifier"\n'
# The file's text, what stands in its place, and what the message names: key, what came, what would work.
FAULTS = {
    "unknown section": ("[training]", "[trainning]", ("'trainning'", "Did you mean 'training'?")),
    "unknown key": ("batch_size", "batchsize", ("[training]", "'batchsize'", "Did you mean 'batch_size'?")),
    "key that is missing": ("batch_size = 8", "", ("[training]", "'batch_size'")),
    "section that is missing": ('[output]\nfolder = "run"', "", ("'output'",)),
    "text for a number": ("steps = 100", 'steps = "100"', ("steps", "a whole number of at least 1", "'100'")),
    "fraction for a whole number": ("steps = 100", "steps = 1e2", ("steps", "a whole number", "100.0")),
    "true for a whole number": ("batch_size = 8", "batch_size = true", ("batch_size", "a whole number", "True")),
    "number for a text": ('folder = "run"', "folder = 3", ("folder", "a text in quotes", "3")),
    "number for true or false": ("[data]", "[data]\npack = 1", ("pack", "true or false", "1")),
    "number out of range": ("learning_rate = 1e-3", "learning_rate = 0", ("learning_rate", "above 0", "0")),
    "infinity": ("learning_rate = 1e-3", "learning_rate = inf", ("learning_rate", "a number", "inf")),
    "unknown choice": ("[model]", '[model]\ndtype = "bfloat"', ("dtype", "'bfloat'", "Did you mean 'bfloat16'?")),
    "unknown objective": ('name = "ul2"', 'name = "ul3"', ("[objective]", "t5gemma2", "'ul3'")),
    "two objectives": ('name = "ul2"', 'name = "ul2"\nmixture = [{ name = "ul2" }]', ("`mixture`", "name, mixture")),
    "fault in a list": ('name = "ul2"', 'mixture = [{ name = "ul2", weight = 0 }]', ("mixture[0] weight", "1", "0")),
    "no source": ('"corpus.txt"', "[]", ("[data] sources", "at least one")),
    "weights of another number": (
        '"corpus.txt"',
        '["a", "b"]\nweights = [1]',
        ("[data] weights", "each of the", "(1.0,)"),
    ),
    "weight of a single source": ('"corpus.txt"', '"a"\nweights = [1]', ("[data] weights", "two or more", "(1.0,)")),
    "weight of nothing": ('"corpus.txt"', '["a", "b"]\nweights = [1, 0]', ("weights[1]", "above 0", "0")),
    "number among sources": ('"corpus.txt"', '["a", 3]', ("sources[1]", "a text in quotes", "3")),
    "preset and adapt": ("[model]", '[model]\nadapt = "gemma2_2b_en"', ("[model]", "`preset` or `adapt`")),
    "steps that rows do not divide": ("steps = 100", "steps = 105", ("steps", "multiple of log_every=10", "105")),
    "validation that is never measured": ("[data]", '[data]\nvalidation = "a"', ("evaluate_every", "validation")),
    "mean of more than is kept": ("[output]", "[output]\naverage_last = 9", ("average_last", "keep=5", "9")),
    "mean of adapters": ("[output]", "[output]\naverage_last = 2", ("average_last", "LoRA")),
    "prompts that are never asked": (
        "[output]",
        '[evaluation]\nprompts = "a"\n[output]',
        ("prompts and every", "both"),
    ),
    "evaluation within a row": (
        "[output]",
        '[evaluation]\nprompts = "a"\nevery = 15\n[output]',
        ("[evaluation] every", "log_every=10", "15"),
    ),
    "evaluation after the end": (
        "[output]",
        '[evaluation]\nprompts = "a"\nevery = 200\n[output]',
        ("[evaluation] every", "steps=100", "200"),
    ),
    "unknown metric": (
        "[output]",
        '[evaluation]\nmetrics = "rougel"\n[output]',
        ("[evaluation] metrics[0]", "'rougel'", "Did you mean 'rougeL'?"),
    ),
    "metric twice": (
        "[output]",
        '[evaluation]\nprompts = "a"\nevery = 10\nmetrics = ["f1", "f1"]\n[output]',
        ("[evaluation] metrics", "once"),
    ),
    "prompts on several processes": (
        "[output]",
        '[hardware]\nmesh = [2]\nprocesses = 2\n[evaluation]\nprompts = "a"\nevery = 10\n[output]',
        ("[evaluation] prompts", "processes=2"),
    ),
    "best value that is not measured": (
        "[output]",
        '[evaluation]\nprompts = "a"\nevery = 10\nbest = "val_f1"\n[output]',
        ("[evaluation] best", "val_exact_match", "'val_f1'"),
    ),
    "best value of nothing": ("[output]", '[evaluation]\nbest = "val_loss"\n[output]', ("best", "no held-out value")),
    "best loss after the end": (
        "[data]",
        '[evaluation]\nbest = "val_loss"\n[data]\nvalidation = "a"',
        ("[evaluation] best", "evaluate_every=200", "steps=100"),
    ),
    "best checkpoint and mean": (
        "[output]",
        '[evaluation]\nprompts = "a"\nevery = 10\nbest = "val_exact_match"\n[output]\naverage_last = 2',
        ("[output] average_last", "best='val_exact_match'", "2"),
    ),
    "neither objective nor task": (OBJECTIVE, "", ("[objective]", "encoder_length=None", "[task] head")),
    "objective of a task": ("[output]", f"{TASK}[output]", ("[task] head", "Leave [objective] out")),
    **{
        name: (OBJECTIVE, f"{TASK}{more}", words)
        for name, (more, words) in {
            "teacher of a task": ('[distillation]\nteacher = "a"', ("[task] head", "[distillation] teacher")),
            "prompts of a task": ('[evaluation]\nprompts = "a"\nevery = 10', ("[task] head", "[evaluation] prompts")),
            "task on several processes": ("[hardware]\nmesh = [2]\nprocesses = 2", ("[task] head", "processes=2")),
            "label twice": ('labels = ["a", "a"]', ("[task] labels", "('a', 'a')")),
            "single label": ('labels = ["a"]', ("[task] labels", "('a',)")),
            "labels of a regression": (
                'labels = ["a", "b"]\nproblem = "regression"',
                ("[task] labels", "a regression has no classes"),
            ),
            "mean in Hugging Face's format": ('labels = ["a", "b"]\npooling = "mean"', ("[output] format", '"keras"')),
            "three texts": ('labels = ["a", "b"]\ntext_fields = ["a", "b", "c"]', ("[task] text_fields", "'c'")),
        }.items()
    },
    "loss of tokens in a task": (
        f"{OBJECTIVE}\n[optimizer]\nlearning_rate = 1e-3\n[training]",
        f"{TASK}[optimizer]\nlearning_rate = 1e-3\n[training]\nz_loss = 0.1",
        ("[task] head", "z_loss"),
    ),
    "packed rows of a task": (
        f'[data]\nsources = "corpus.txt"\n{OBJECTIVE}',
        f'[data]\nsources = "a.jsonl"\npack = true\n{TASK}',
        ("[task] head", "pack"),
    ),
    "batch that devices do not divide": (
        "[output]",
        "[hardware]\nmesh = [3]\n[output]",
        ("batch_size", "3 devices", "8"),
    ),
    "processes that share a row of the mesh": (
        "[output]",
        "[hardware]\nmesh = [1, 2]\nprocesses = 2\n[output]",
        ("mesh", "a multiple of processes=2", "[1, 2]"),
    ),
    "preset of weights on several processes": (
        "[output]",
        '[hardware]\nmesh = [2]\nprocesses = 2\n[output]\nformat = "keras"',
        ("[output] format", '"hf"', "processes=2"),
    ),
    "no TOML": ("steps = 100", "steps = ", ("not TOML", "line")),
}


def written(folder, text=MINIMAL):
    path = folder / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FAULTS)
def test_fault_in_a_recipe_is_told_with_file_key_what_came_and_what_would_work(name, tmp_path):
    old, new, named = FAULTS[name]
    assert old in MINIMAL
    text = MINIMAL.replace(old, new)
    if name == "mean of adapters":
        text = text.replace("[model]", "[model]\nlora_rank = 4")
    if name in ("mean of adapters", "best checkpoint and mean"):
        text = text.replace("steps = 100", "steps = 100\nsave_every = 50")
    if name == "best loss after the end":
        text = text.replace("steps = 100", "steps = 100\nevaluate_every = 200")
    with pytest.raises(RecipeError) as error:
        read_recipe(written(tmp_path, text))
    for word in ("my.toml", *named):
        assert word in str(error.value)


DATA = '"corpus.txt"\n[objective]\nname = "ul2"'
# What stands in the file's place, and the key that then says nothing.
WITHOUT_EFFECT = {
    "[model] tokenizer": ("[model]", '[model]\ntokenizer = "here"'),
    "[model] cross_attention": ("[model]", '[model]\ncross_attention = "random"'),
    "[model] encoder_attention": ("[model]", '[model]\nencoder_attention = "causal"'),
    "[model] encoder_heads": ("[model]", '[model]\nencoder_heads = "multi"'),
    "[data] pair_fields": ("[data]", '[data]\npair_fields = ["q", "a"]'),
    "[data] answers": ("[data]", '[data]\nanswers = "all"'),
    "[data] field": (DATA, '"a"\nfield = "b"\n[objective]\nname = "supervised"'),
    "[data] documents": (DATA, '"a"\ndocuments = "whole"\n[objective]\nname = "supervised"'),
    "[data] pack_buffer": ("[data]", "[data]\npack_buffer = 8"),
    "[objective] sentinels": ('name = "ul2"', 'name = "prefixlm"\nsentinels = [8, 9]'),
    "[objective] too_few_sentinels": ('name = "ul2"', 'name = "prefixlm"\ntoo_few_sentinels = "merge"'),
    "[objective] mode_tokens": ('name = "ul2"', 'name = "supervised"\nmode_tokens = { R = 7 }'),
    "[training] evaluate_batches": ("steps = 100", "steps = 100\nevaluate_batches = 3"),
    "[distillation] dtype": ("[output]", '[distillation]\ndtype = "float32"\n[output]'),
    "[distillation] temperature": ("[output]", "[distillation]\ntemperature = 2\n[output]"),
    "[distillation] hard_weight": ("[output]", "[distillation]\nhard_weight = 0.5\n[output]"),
    **{
        f"[preference] {key}": ("[output]", f"[preference]\n{key} = 0.25\n[output]")
        for key in ("beta", "label_smoothing", "gamma", "alpha", "desirable_weight", "undesirable_weight")
    },
    "[preference] reference": ("[output]", '[preference]\nreference = "precomputed"\n[output]'),
    **{
        f"[evaluation] {key}": ("[output]", f"[evaluation]\n{key} = {value}\n[output]")
        for key, value in (
            ("metrics", '"f1"'),
            ("max_new_tokens", 9),
            ("limit", 9),
            ("samples", 9),
            ("batch_size", 9),
        )
    },
    **{
        f"[task] {key}": ("[output]", f"[task]\n{key} = {value}\n[output]")
        for key, value in (
            ("labels", '["a", "b"]'),
            ("text_fields", '"a"'),
            ("label_field", '"a"'),
            ("problem", '"multi"'),
            ("pooling", '"mean"'),
            ("stack", '"decoder"'),
            ("dropout", 0.1),
            ("normalize", "false"),
            ("dimensions", 9),
            ("temperature", 0.1),
            ("matryoshka", "[9]"),
            ("sequence_length", 9),
            ("truncate", '"left"'),
            ("separator", '" "'),
        )
    },
    "[hardware] fully_sharded": ("[output]", "[hardware]\nfully_sharded = false\n[output]"),
}


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_key_that_says_nothing_beside_the_others_is_refused(key, tmp_path):
    old, new = WITHOUT_EFFECT[key]
    assert old in MINIMAL
    with pytest.raises(RecipeError) as error:
        read_recipe(written(tmp_path, MINIMAL.replace(old, new)))
    assert f"my.toml, {key}: " in str(error.value)
    assert "Leave it out. Received: " in str(error.value)


def test_every_rule_for_keys_without_effect_is_tried():
    keys = {f"[{section}] {key}" for section, keys, _, _ in RULES for key in keys}
    assert set(WITHOUT_EFFECT) == keys


def test_recipe_that_is_no_text_says_so(tmp_path):
    path = tmp_path / "my.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"my\.toml is not UTF-8"):
        read_recipe(path)


def test_unknown_recipe_names_those_that_come_with_the_package():
    with pytest.raises(RecipeError, match=r"2b_2b_prefixlm.*Did you mean '2b_2b_ul2'") as error:
        read_recipe("2b_2b_ul")
    assert all(name in str(error.value) for name in recipe_names())


def test_recipe_with_every_key_stated_reads_as_the_one_it_was(tmp_path):
    recipe = read_recipe(written(tmp_path))
    again = tmp_path / "again.toml"
    again.write_text(to_toml(recipe), encoding="utf-8")
    assert read_recipe(again) == recipe
    stated = {f"{section}.{key}" for section, table in tomllib.loads(to_toml(recipe)).items() for key in table}
    assert {key for key, value in flat(recipe).items() if value is not None} == stated


def test_overrides_take_the_place_of_the_file_before_it_is_checked(tmp_path):
    recipe = read_recipe(written(tmp_path), training={"steps": 400}, output={"folder": "there"})
    assert (recipe.training.steps, recipe.optimizer.decay_steps, recipe.output.folder) == (400, 400, "there")
    with pytest.raises(RecipeError, match="log_every"):
        read_recipe(written(tmp_path), training={"steps": 401})


def test_every_key_is_described():
    for section in typing.get_type_hints(Recipe).values():
        for field in dataclasses.fields(section):
            assert f"        {field.name}: " in section.__doc__, f"{section.__name__}.{field.name}"


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_of_the_package_is_good_and_says_where_each_number_comes_from(name):
    recipe = read_recipe(name)
    objective = make_objective(recipe.objective)
    assert sum(weight for _, weight in objective.parts) > 0
    assert recipe.output.folder


@pytest.mark.parametrize("pair", ["2b_2b", "9b_2b"])
def test_published_recipe_has_the_papers_numbers(pair):
    # arXiv 2504.06225: 4096-4096 tokens with a teacher, 8192-8192 without; 1,000 steps of cross-attention alone for
    # the unbalanced pair; about 4M tokens a step, up to 2T; the mean of the last 5 checkpoints 10K steps apart.
    for name, length, denoisers in (("prefixlm", 4096, 1), ("ul2", 8192, 7)):
        recipe = read_recipe(f"{pair}_{name}")
        assert (recipe.objective.encoder_length, recipe.objective.decoder_length) == (length, length)
        assert len(make_objective(recipe.objective).parts) == denoisers
        assert bool(recipe.distillation.teacher) == (name == "prefixlm")
        training = recipe.training
        assert training.cross_attention_steps == (1000 if pair == "9b_2b" else 0)
        tokens = training.batch_size * 2 * length
        assert tokens == pytest.approx(4e6, rel=0.05)
        assert tokens * training.steps == pytest.approx(2e12, rel=0.01)
        assert (recipe.output.average_last, training.save_every, recipe.optimizer.clip_norm) == (5, 10_000, 1)
        assert recipe.optimizer.warmup_steps == 100


def test_objective_of_a_recipe_has_its_parts_tokens_and_sentinels(tmp_path):
    def made(objective):
        return make_objective(read_recipe(written(tmp_path, MINIMAL.replace('name = "ul2"', objective))).objective)

    mixed = made(
        'mixture = [{ name = "prefixlm", weight = 3 }, { name = "span_corruption" }]\n'
        "mode_tokens = { R = 120, S = 121 }"
    )
    (prefix, three), (corruption, one) = mixed.parts
    assert (three, one, prefix.mode_token, corruption.mode_token) == (3, 1, 121, 120)
    own = made("denoisers = [{ mean_span = 4, rate = 0.3, weight = 2 }, { rate = 0.5 }]\nsentinels = [200, 209]")
    (first, two), (last, _) = own.parts
    assert (first.denoiser.mean_span, first.denoiser.rate, two) == (4, 0.3, 2)
    assert (last.denoiser.mean_span, last.denoiser.rate, list(last.sentinels)) == (None, 0.5, list(range(200, 210)))
    assert (own.encoder_length, own.decoder_length) == (64, 48)


def test_run_of_another_recipe_is_refused_and_each_difference_named(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    assert begin(folder, read_recipe(written(tmp_path)))
    other = written(tmp_path, MINIMAL.replace("batch_size = 8", "batch_size = 16").replace("1e-3", "1e-4"))
    with pytest.raises(RecipeError) as error:
        check_run(folder, read_recipe(other))
    assert "training.batch_size was 8, is 16" in str(error.value)
    assert "optimizer.learning_rate was 0.001, is 0.0001" in str(error.value)
    assert "training.steps was" not in str(error.value)


def test_run_goes_on_with_what_may_change_and_for_more_steps_where_the_cosine_stays(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    text = MINIMAL.replace("1e-3", "1e-3\ndecay_steps = 100")
    assert begin(folder, read_recipe(written(tmp_path, text)))
    (folder / "model").mkdir()
    changed = text.replace("steps = 100\nb", "steps = 200\nsave_every = 20\nkeep = 2\nb")
    assert not begin(folder, read_recipe(written(tmp_path, changed)))
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["model_00000100"]
    assert read_recipe(folder / "recipe.toml").training.steps == 200
    with pytest.raises(RecipeError, match=r"decay_steps was 100, is 300.*unless decay_steps is stated"):
        check_run(folder, read_recipe(written(tmp_path), training={"steps": 300}))


def test_what_may_change_are_keys_that_there_are(tmp_path):
    assert set(MAY_CHANGE) <= set(flat(read_recipe(written(tmp_path))))
    assert set(COMPARED) <= set(MAY_CHANGE)


def test_prompts_of_a_run_may_change_unless_a_best_value_is_compared(tmp_path):
    for best in (None, "val_f1"):
        section = {"prompts": ["a"], "metrics": ["f1"], "every": 10, **({"best": best} if best else {})}
        folder = tmp_path / str(best)
        folder.mkdir()
        begin(folder, read_recipe(written(tmp_path), evaluation=section))
        other = read_recipe(written(tmp_path), evaluation={**section, "prompts": ["b"], "every": 20})
        if best is None:
            check_run(folder, other)
        else:
            with pytest.raises(RecipeError, match=r"evaluation\.prompts was \('a',\), is \('b',\)\. Put"):
                check_run(folder, other)


def test_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(RecipeError, match="precious"):
        check_run(tmp_path, read_recipe("tiny"))


def test_second_run_in_a_folder_is_refused_while_the_first_lasts(tmp_path):
    with locked(tmp_path, 0), pytest.raises(RecipeError, match="another process"), locked(tmp_path, 0):
        pass
    with locked(tmp_path, 0):
        pass
