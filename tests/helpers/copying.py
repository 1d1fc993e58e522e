"""A task that a tiny model learns in seconds, with rows and task files for lm-evaluation-harness."""

import json

import keras
import yaml

import keras_t5gemma as kt

WORDS = ("red", "blue", "green", "black", "white", "brown", "grey", "pink")


def question(word, fillers):
    """A context; questions with more fillers are longer, so that batches have padding."""
    return f"{'so ' * fillers}copy {word}:"


def copying_lm(steps=40, batch_size=32):
    """A model that answers each question by a space and its word."""
    keras.utils.set_random_seed(0)
    pairs = [(question(word, fillers), f" {word}") for fillers in range(6) for word in WORDS]
    texts = [q + a for q, a in pairs]
    tokenizer = kt.T5GemmaTokenizer(proto=kt.train_tokenizer(texts, 446))
    stack = kt.StackConfig(1, 32, 64, 4, 2, 8, sliding_window=16)
    backbone = kt.T5GemmaBackbone(stack, stack, vocabulary_size=tokenizer.vocabulary_size())
    lm = kt.T5GemmaSeq2SeqLM(backbone, kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, 12, 4))
    lm.compile(optimizer=kt.optimizer(learning_rate=3e-2, warmup_steps=10))
    rows = [pairs[(7 * i) % len(pairs)] for i in range(steps * batch_size)]
    data = {"encoder_text": [q for q, _ in rows], "decoder_text": [a for _, a in rows]}
    for _ in range(10):
        lm.fit(data, batch_size=batch_size, verbose=0)
        if lm.generate([q for q, _ in pairs]) == [a for _, a in pairs]:
            return lm
    raise AssertionError("The model does not learn to copy.")


def write_tasks(folder):
    """Writes rows and three tasks, one per kind of request.

    Returns:
        The names of the tasks.
    """
    rows = [
        {"question": question(word, fillers), "choices": [WORDS[(i + 3 * j) % 8] for j in range(4)], "word": word}
        for fillers in (0, 3, 5)
        for i, word in enumerate(WORDS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1.0},
    }
    accuracy = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    tasks = {
        "copy_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "metric_list": accuracy,
        },
        "copy_text": {
            "output_type": "generate_until",
            "doc_to_target": " {{word}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
            "metric_list": exact,
        },
        "copy_likely": {"output_type": "loglikelihood", "doc_to_target": " {{word}}", "metric_list": accuracy},
    }
    for name, task in tasks.items():
        text = yaml.safe_dump({"task": name, **shared, **task}, sort_keys=False)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return list(tasks)
