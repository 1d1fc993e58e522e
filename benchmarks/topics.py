"""Topics of `results/`: the fields of a row, and their form in README.md."""

import dataclasses
import statistics


@dataclasses.dataclass(frozen=True)
class Column:
    """A field of a row.

    Attributes:
        field: its name, which ends in the unit unless it is a time in seconds.
        heading: the column's heading.
        form: a format for numbers; none for texts.
        unit: which follows the number, where the heading does not say it.
    """

    field: str
    heading: str
    form: str = ""
    unit: str = ""

    def number(self, row):
        """The median of repeats, or the number itself; None if unknown."""
        value = row.get(self.field)
        if isinstance(value, list):
            return statistics.median(value) if value else None
        return value

    def text(self, row):
        """A cell."""
        value = self.number(row) if self.form else row.get(self.field)
        if value is None:
            return ""
        if self.form:
            return f"{value:{self.form}}"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, list):
            return ", ".join(map(str, value))
        return f"{value:,}" if isinstance(value, int) else str(value)

    def text_with_unit(self, row):
        """The same outside of the column."""
        return self.text(row) + self.unit


class BestRate(Column):
    """The rate with the smallest loss."""

    def text(self, row):
        best = min(range(len(row["loss_nats"])), key=row["loss_nats"].__getitem__)
        return f"{row['rates'][best]:g}"


class Least(Column):
    """The smallest of a list."""

    def number(self, row):
        return min(row[self.field])


@dataclasses.dataclass(frozen=True)
class Topic:
    """A table of README.md.

    Attributes:
        file: of `results/`, without ".jsonl".
        configuration: columns that say what was measured; of rows that agree in these the newest is shown.
        measured: columns of numbers.
        hidden: further fields of the configuration, which have no column.
        about: sentences above the table.
        is_sorted: whether rows are shown by configuration, not by the order in the file.
    """

    file: str
    name: str
    configuration: tuple
    measured: tuple
    hidden: tuple = ()
    about: str = ""
    is_sorted: bool = False

    def fields(self):
        """All names of fields that are the topic's own."""
        return {column.field for column in (*self.configuration, *self.measured)} | set(self.hidden)

    def shows(self, field):
        """Whether a field has a column."""
        return any(column.field == field for column in (*self.configuration, *self.measured))

    def key(self, row):
        """Equal for rows of one configuration; sorts by text and size of number."""
        values = [row[name] for name in (*(column.field for column in self.configuration), *self.hidden)]
        return tuple((value, "") if isinstance(value, int) else (0, str(value)) for value in values)


def texts(*fields):
    """Columns of texts, with their names as headings."""
    return tuple(Column(field, field.replace("_", " ")) for field in fields)


SECONDS = Column("seconds", "seconds", ".2f", " s")
PEAK_GB = Column("peak_gb", "peak GB", ".2f", " GB")
PEAK_MIB = Column("peak_mib", "peak MiB", ",.0f", " MiB")
PEAK_GIB = Column("peak_gib", "peak GiB", ".2f", " GiB")
COMPILE = Column("compile_s", "compile, s", ".1f", " s to compile")
FIRST_TOKEN = Column("first_token_ms", "first token, ms", ",.0f", " ms to the first token")
MEMORY_GB = Column("memory_gb", "GB", ".1f", " GB")
WORK_GB = Column("work_gb", "of them at work", ".1f", " GB at work")

TOPICS = (
    Topic(
        "checkpoints",
        "From file to file",
        texts("encoder", "decoder", "dtype"),
        (SECONDS, PEAK_MIB, Column("largest_tensor_mib", "largest tensor MiB", ",.0f")),
        about="`adapt` of random weights, beside `cp -r` of the output; both end with `sync`.",
    ),
    Topic(
        "checkpoints",
        "Loading",
        texts("backend", "format"),
        (SECONDS, PEAK_MIB, Column("peak_to_weights", "peak / weights", ".2f", " of the weights")),
        ("model", "dtype", "weights_mib"),
        "Small-Small, 596 MiB of bfloat16 weights; memory above the bare import.",
    ),
    Topic(
        "tests",
        "Faults",
        texts("what"),
        (Column("cases", "cases", ","), Column("outcome", "outcome of each")),
        about="Part of the test suite. Each case is held to 10 seconds and 16 MB.",
    ),
    Topic(
        "objectives",
        "Objectives",
        texts("objective"),
        (
            Column("joined_million_ids_per_s", "joined", ".1f"),
            Column("whole_million_ids_per_s", "whole documents", ".1f"),
            Column("packed_million_ids_per_s", "packed", ".1f"),
            Column("fill_percent", "fill, %", ".1f"),
        ),
        ("encoder_length", "decoder_length", "cores"),
        "Million raw ids per second on one core. Fill is the share of positions in use on the fuller side of packed "
        "rows.",
    ),
    Topic(
        "tests",
        "Going on after a stop",
        texts("backend"),
        (Column("kills", "kills", ","), Column("difference", "difference", ".0e"), Column("outcome", "outcome")),
        about="Weights, optimizer and random state after seeded SIGKILLs, against the uninterrupted run.",
    ),
    Topic(
        "tests",
        "Several devices",
        texts("backend", "what"),
        (Column("difference", "difference", ".0e"),),
        about="Loss and weights after a step, against one device, on simulated CPU devices.",
    ),
    Topic(
        "train",
        "A training step",
        texts("backend", "dtype", "batch", "encoder_length", "decoder_length", "environment"),
        (SECONDS, PEAK_GB),
        ("model", "vocabulary_size"),
        "Small-Small, vocabulary 256,000, AdamW; peak memory above the bare import.",
        is_sorted=True,
    ),
    Topic(
        "float16_loss",
        "Float16",
        texts("backend"),
        (Column("hidden_states_percent", "hidden states, %", ".3f"), Column("table_percent", "table, %", ".3f")),
        ("pieces", "tokens", "width"),
        "Distance of the chunked loss's gradients in float16 from float32's, 256,000 pieces and 4,096 target tokens.",
    ),
    Topic(
        "learning_rates",
        "Learning rates",
        texts("optimizer", "width", "what_trains"),
        (
            Column("loss_before_nats", "before", ".2f"),
            BestRate("rates", "best rate"),
            Least("loss_nats", "loss there", ".2f"),
            Column("loss_nats", "loss by rate"),
        ),
        ("backend", "rates", "steps", "batch"),
        "Loss per target token on 200 dates never seen, in nats; one seed. "
        "The rates are 2e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2.",
    ),
    Topic(
        "claims",
        "The papers' claims at toy size",
        texts("arm"),
        (Column("loss_nats_mean", "loss, nats", ".3f"), Column("loss_nats_deviation", "standard deviation", ".3f")),
        ("backend", "seeds", "steps"),
    ),
    Topic(
        "claims",
        "Differences between arms",
        texts("claim"),
        (
            Column("difference_nats_mean", "difference, nats", ".3f"),
            Column("difference_nats_deviation", "standard deviation", ".3f"),
            Column("seeds_in_favour", "seeds in favour", ""),
        ),
        ("backend", "seeds", "steps"),
    ),
    Topic(
        "decode",
        "A decoding step",
        texts("backend", "dtype", "batch", "inputs", "encoder_layers", "environment"),
        (Column("step_ms", "ms per step", ".1f", " ms"), FIRST_TOKEN, COMPILE),
        ("model", "vocabulary_size"),
        "Small-Small, vocabulary 256,000, greedy. The floor is the time in which memory gives the bytes of a step.",
        is_sorted=True,
    ),
    Topic(
        "long_inputs",
        "Long inputs",
        texts("backend", "dtype", "length"),
        (
            Column("first_run_s", "first run, s", ".1f"),
            Column("seconds", "second run, s", ".1f"),
            Column("model_gib", "GiB of the model", ".2f"),
            PEAK_GIB,
        ),
        ("model", "vocabulary_size"),
        "The encoder of Small-Small, one input; memory above the bare import.",
    ),
    Topic(
        "long_inputs",
        "Long inputs by the way in",
        texts("backend", "way_in", "layers", "length", "rematerialize"),
        (Column("seconds", "seconds", ".1f"), PEAK_GIB),
        ("dtype", "vocabulary_size", "targets"),
        "Stacks of Small's width, 16 target tokens, vocabulary 32,000; memory above the level that short calls left.",
        is_sorted=True,
    ),
    Topic(
        "shapes",
        "Programs compiled",
        texts("backend", "program", "requests"),
        (Column("compiled", "compiled", ",", " compiled"),),
        about="Requests of 1 to 5 prompts of up to 200 tokens for up to 60 tokens, drawn with seed 0.",
    ),
    Topic(
        "shapes",
        "The cost of compiling",
        texts("backend", "given_s"),
        (
            Column("requests", "requests", ",", " requests"),
            Column("compiled", "compiled", ",", " compiled"),
            Column("seconds_per_request", "seconds per request", ".2f", " s"),
        ),
        about="Such requests for a given time: two layers of width 128 per stack.",
    ),
    Topic(
        "multiple_choice",
        "Many answers to one document",
        texts("backend", "answers", "tokens"),
        (
            Column("seconds", "all in one call, s", ".2f", " s"),
            Column("seconds_single", "one answer, s", ".2f", " s"),
            Column("share", "share of a call for each", ".3f"),
        ),
        about="Small-Small with 32,000 pieces, answers of 2 to 12 tokens. Single calls are a sample.",
    ),
    Topic(
        "harness",
        "Multiple choice by lm-evaluation-harness",
        texts("backend", "options", "tokens"),
        (
            Column("requests_per_s", "requests/s", ".2f", " requests/s"),
            Column("difference_nats", "largest difference, nats", ".0e", " nats"),
        ),
        ("contexts", "batch"),
        "Small-Small with 32,000 pieces; options of one to six words. Both in one process, in turn.",
    ),
    Topic(
        "serve",
        "Requests over HTTP",
        texts("backend", "size", "slots", "requests", "rate"),
        (
            Column("tokens_per_s", "tokens/s", ",.1f", " tokens/s"),
            Column("first_p50_s", "first token p50, s", ".2f", " s"),
            Column("first_p99_s", "p99, s", ".2f", " s"),
            Column("token_p50_ms", "per token p50, ms", ",.1f", " ms"),
            Column("token_p99_ms", "p99, ms", ",.1f", " ms"),
        ),
        about="Continuous batching beside batches of waiting requests by `generate` (dynamic) and one by one (single). "
        "The rate is in requests per second. The time per token includes waiting.",
    ),
    Topic(
        "by_hand",
        "Programs kept between processes",
        texts("backend", "kept"),
        (Column("seconds_least", "least, s", ".1f"), Column("seconds_most", "most, s", ".1f")),
        ("model", "vocabulary_size", "dtype"),
        "The first `generate` less the second. Measured by hand.",
    ),
    Topic(
        "attention",
        "Attention's kernels",
        texts("backend", "length", "kind", "way"),
        (
            Column("forward_ms", "forward, ms", ".2f"),
            Column("with_gradients_ms", "with gradients, ms", ".2f"),
            Column("error", "error", ".1e"),
        ),
        ("dtype", "batch"),
        "2B's heads, bfloat16, batch 1; the error is against float32.",
    ),
    Topic(
        "latency",
        "Latency of an encoder-decoder",
        texts("backend", "program", "dtype", "scale", "inputs", "tokens"),
        (
            Column("total_s", "total, s", ".2f", " s"),
            Column("step_ms", "ms per step", ".2f", " ms"),
            FIRST_TOKEN,
            Column("bandwidth_gb_s", "GB/s of the copy", ",.0f"),
            Column("bandwidth_share", "bandwidth used", ".2f", " of the bandwidth"),
            COMPILE,
        ),
        ("batch",),
        "Greedy, batch 1, random weights, beside Gemma 2 of the decoder's size.",
    ),
    Topic(
        "utilisation",
        "Model FLOP utilisation",
        texts("backend", "pair", "length", "activations", "batch"),
        (
            MEMORY_GB,
            Column("seconds", "s per step", ".3f"),
            Column("tokens_per_s", "tokens/s", ",.0f"),
            Column("tflop_per_s", "TFLOP/s", ".0f"),
            Column("share_of_peak", "of the peak", ".2f"),
            Column("share_of_product", "of a product", ".2f"),
            COMPILE,
        ),
        ("dtype",),
        "The peak is 989 TFLOP/s by the data sheet; 73.2 GB may be used.",
        is_sorted=True,
    ),
    Topic(
        "fits",
        "Batches that fit, by XLA's account",
        texts("device", "pair", "length", "activations", "batch"),
        (MEMORY_GB, WORK_GB, COMPILE),
        ("dtype", "layers"),
        "Compiled for a card of 80 GB without having one; 73.2 GB may be used.",
        is_sorted=True,
    ),
    Topic(
        "fits",
        "Published recipes, by XLA's account",
        texts("recipe", "devices", "length"),
        (MEMORY_GB, WORK_GB, COMPILE),
        ("layers",),
        "Memory per device. Nothing ran there.",
    ),
    Topic(
        "by_hand",
        "Decoding with PyTorch on a GPU",
        texts("pair", "dtype", "way"),
        (Column("step_ms", "ms per step", ".1f"),),
        ("backend", "batch", "inputs", "tokens"),
        "Greedy. Measured by hand.",
    ),
    Topic(
        "quality",
        "Quantized",
        texts("backend", "weights"),
        (
            Column("loss_nats", "loss, nats", ".4f"),
            Column("perplexity", "perplexity", ".1f"),
            Column("perplexity_change_percent", "to float32, %", "+.2f"),
            Column("as_float32_percent", "as float32, %", ".0f"),
            Column("weights_mb", "MB", ".2f"),
            Column("size_to_float32", "to float32", ".2f"),
        ),
        about="Held-out text, by the demo's toy of 3.2 million weights. "
        '"As float32" is the share of greedy answers before the first token that differs.',
    ),
    Topic(
        "quality",
        "Memory of quantized weights",
        texts("backend", "weights"),
        (
            Column("promised_mb", "promised, MB", ",.0f"),
            Column("loaded_mb", "loaded, MB", ",.0f"),
            Column("load_peak_mb", "load peak, MB", ",.0f"),
            Column("generate_peak_mb", "generate peak, MB", ",.0f"),
            Column("token_ms", "ms per token", ".1f"),
        ),
        ("model", "vocabulary_size"),
        'Small-Small, vocabulary 256,000, above the import; "promised" are the bytes of the weights.',
        is_sorted=True,
    ),
)
BY_NAME = {topic.name: topic for topic in TOPICS}
