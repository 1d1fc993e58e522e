"""The demo from end to end: text, tokenizer, Gemma 2, T5Gemma, training, fine-tuning, benchmark, files."""

from __future__ import annotations

import time
from pathlib import Path

import keras
import keras_hub
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress
from rich.text import Text

import keras_t5gemma as kt
from keras_t5gemma.demo import report
from keras_t5gemma.demo.adaptation import Result, compare
from keras_t5gemma.demo.benchmark import measure, measure_if_installed
from keras_t5gemma.demo.corpus import Corpus, standard_library_corpus
from keras_t5gemma.demo.finetuning import Answers, fine_tune
from keras_t5gemma.demo.pretraining import pretrain_gemma2, save_gemma2
from keras_t5gemma.demo.settings import FULL, DemoSettings
from keras_t5gemma.training.callbacks.progress_bar import ProgressBar, progress_display


def run_demo(
    out: str | Path, settings: DemoSettings = FULL, console: Console | None = None
) -> tuple[list[Result], list[Answers]]:
    """Runs the demo.

    Args:
        out: folder to write into; it must be new or empty.
        settings: a `DemoSettings`.
        console: a `rich.console.Console`, by default one on standard output.

    Returns:
        (results, answers): a list of `Result`, balanced then unbalanced, each adapted then from scratch; and a list of
        the `Answers` of the balanced pair after fine-tuning on dates, adapted then from scratch.

    Raises:
        ValueError: if `out` is a file, or a folder that is not empty.
    """
    out, console = Path(out), console or Console()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"`out` must be a new or an empty folder. Received: {str(out)!r}, which has something in it.")
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    keras.utils.set_random_seed(settings.seed)

    corpus = standard_library_corpus(max_documents=settings.max_documents)
    proto = kt.train_tokenizer(corpus.train, settings.vocabulary_size, out / "tokenizer.model")
    tokenizer = kt.T5GemmaTokenizer(proto=proto)
    console.print(
        f"Corpus: {len(corpus.train):,} documentation strings of this Python to learn from, {len(corpus.held_out):,} "
        f"from other source files held out. Backend: {keras.backend.backend()}."
    )
    with progress_display(console) as progress:
        pretraining = _pretrain_both(out, corpus, proto, settings, progress)
        runs = _compare_both(out, corpus, tokenizer, settings, progress)
        # Before fine-tuning, which changes the models.
        for pair, run in runs.items():
            kt.export_to_hugging_face(run["adapted"][0], out / f"t5gemma_{pair}", tokenizer=tokenizer)
        completions = _complete(runs["balanced"], corpus, tokenizer, settings)
    adapted = kt.T5GemmaSeq2SeqLM(runs["balanced"]["adapted"][0], kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer))
    before = measure_if_installed(adapted, settings, console)
    with progress_display(console) as progress:
        bars = {
            start: ProgressBar(progress, f"fine-tune on dates, {start}", settings.dates.steps)
            for start in runs["balanced"]
        }
        tuned = fine_tune(runs["balanced"], tokenizer, settings, bars)
    after = before and measure(tuned["adapted"][0], settings)
    results = [result for run in runs.values() for _, result in run.values()]
    answers = [answers for _, answers in tuned.values()]
    kt.export_to_hugging_face(tuned["adapted"][0], out / "t5gemma_dates")
    (out / "completions.txt").write_text(
        "\n\n----\n\n".join(report.format_completion(completion) for completion in completions) + "\n", encoding="utf-8"
    )
    has_plot = report.plot_losses(results, answers, out / "losses.png")
    seconds = time.monotonic() - started
    report.write_results(
        results, answers, pretraining, (before, after), seconds, keras.backend.backend(), out / "results.json"
    )

    console.print(Panel(Text(report.format_completion(completions[0])), title="A held-out docstring, completed"))
    console.print(report.results_table(results))
    console.print(report.verdict(results))
    console.print(
        f"{seconds:.0f} s in total. In {out}: "
        f"{'losses.png' if has_plot else 'no losses.png (the extra `plots` draws it)'}, "
        f"completions.txt, results.json, both Gemma 2, and t5gemma_balanced, t5gemma_unbalanced and t5gemma_dates, "
        f"which `transformers` loads as well."
    )
    console.print(report.answers_table(answers))
    console.print("\n".join(map(report.score_line, answers)))
    if before and after:
        console.print(report.benchmark_table(before, after))
    console.print(f'Ask for another: keras-t5gemma generate {out / "t5gemma_dates"} "July 20th, 1969" --max-length 12')
    return results, answers


def _pretrain_both(
    out: Path, corpus: Corpus, proto: bytes, settings: DemoSettings, progress: Progress
) -> dict[str, float]:
    """Pretrains and saves the large and the small Gemma 2.

    Returns:
        {name: held-out loss}.
    """
    losses = {}
    for name, stack, training in (
        ("large", settings.large, settings.large_pretraining),
        ("small", settings.small, settings.small_pretraining),
    ):
        bar = ProgressBar(progress, f"pretrain the {name} Gemma 2", training.steps)
        backbone, losses[name] = pretrain_gemma2(stack, corpus, proto, settings, training, [bar])
        save_gemma2(backbone, proto, out / f"gemma2_{name}")
    return losses


def _compare_both(
    out: Path, corpus: Corpus, tokenizer: kt.T5GemmaTokenizer, settings: DemoSettings, progress: Progress
) -> dict[str, dict[str, tuple[kt.T5GemmaBackbone, Result]]]:
    """Trains both pairs, adapted and from scratch.

    Returns:
        {pair: {start: (backbone, Result)}}.
    """
    lengths = settings.encoder_length, settings.decoder_length
    runs = {}
    for pair, decoder, objective, warmup_steps in (
        ("balanced", "large", kt.PrefixLM(*lengths), 0),
        ("unbalanced", "small", kt.UL2(*lengths), settings.warmup_steps),
    ):
        bars = {
            start: ProgressBar(progress, f"train the {pair} T5Gemma, {start}", settings.adaptation.steps)
            for start in ("adapted", "from scratch")
        }
        runs[pair] = compare(
            pair,
            out / "gemma2_large",
            out / f"gemma2_{decoder}",
            objective,
            corpus,
            tokenizer,
            settings,
            warmup_steps=warmup_steps,
            callbacks=bars,
        )
    return runs


def _complete(
    run: dict[str, tuple[kt.T5GemmaBackbone, Result]],
    corpus: Corpus,
    tokenizer: kt.T5GemmaTokenizer,
    settings: DemoSettings,
) -> list[dict[str, str]]:
    """Completes held-out docstrings with the models of a pair."""
    length = settings.encoder_length + settings.decoder_length
    texts = [text for text in corpus.held_out if len(tokenizer(text)) >= length]
    # Evenly spaced, so that they come from different files.
    texts = [texts[i * len(texts) // settings.completions] for i in range(min(settings.completions, len(texts)))]
    preprocessor = kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, settings.encoder_length, settings.decoder_length)
    models = {start: kt.T5GemmaSeq2SeqLM(backbone, preprocessor) for start, (backbone, _) in run.items()}
    for model in models.values():
        # With greedy decoding, small models repeat themselves.
        model.compile(sampler=keras_hub.samplers.TopKSampler(k=5, seed=settings.seed))
    return report.complete(models, texts, tokenizer, settings.encoder_length, settings.decoder_length)
