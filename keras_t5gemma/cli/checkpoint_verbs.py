"""The verbs adapt, export, average, inspect and verify."""

from typing import TYPE_CHECKING, Annotated

import typer

from keras_t5gemma.cli.options import (
    BackendOption,
    Dtype,
    DtypeOption,
    Format,
    FormatOption,
    Model,
    NonFiniteOption,
    Out,
    Part,
    PartOption,
    ShardOption,
)
from keras_t5gemma.cli.runtime_formats import check_options, check_runtime, export_to_runtime
from keras_t5gemma.cli.session import (
    check_free,
    load_model,
    one_line_errors,
    remove_empty,
    save_model,
    use_backend,
    wide_console,
)
from keras_t5gemma.config import ENCODER_ATTENTIONS
from keras_t5gemma.suggestions import check_choice

if TYPE_CHECKING:
    from keras_t5gemma.checkpoints.verify import Difference


def add_checkpoint_verbs(app: typer.Typer) -> None:
    """Adds the verbs of this module to the command line."""
    for verb in (adapt, export, average, inspect, verify):
        app.command()(verb)


def adapt(
    gemma2: Annotated[list[str], typer.Argument(metavar="ENCODER [DECODER]", help="One Gemma 2 for both, or two.")],
    out: Out,
    cross_attention: Annotated[
        str, typer.Option(help="auto, self-attention or random; auto: random only if the two differ.")
    ] = "auto",
    encoder_attention: Annotated[str, typer.Option(help="bidirectional, or causal as an ablation.")] = "bidirectional",
    encoder_heads: Annotated[
        str, typer.Option(help="grouped, or multi: each query head gets a copy of its key and value head.")
    ] = "grouped",
    dtype: DtypeOption = None,
    max_shard_size: ShardOption = "5GB",
    seed: Annotated[int, typer.Option(min=0, help="Seed of random weights.")] = 0,
    allow_non_finite: NonFiniteOption = False,
) -> None:
    """Make a T5Gemma of one or two Gemma 2: folders, hf://owner/name, or keras-hub's names such as gemma2_2b_en."""
    if len(gemma2) > 2:
        raise typer.BadParameter(f"expected ENCODER [DECODER] OUT, got {len(gemma2) + 1} arguments.")
    with one_line_errors():
        check_free(out)
        _check_size(max_shard_size)
        from keras_t5gemma.checkpoints.adapt import CROSS_ATTENTIONS, ENCODER_HEADS

        for option, value, choices in (
            ("--cross-attention", cross_attention, CROSS_ATTENTIONS),
            ("--encoder-attention", encoder_attention, ENCODER_ATTENTIONS),
            ("--encoder-heads", encoder_heads, ENCODER_HEADS),
        ):
            check_choice(value, option, choices)
        import keras_t5gemma as kt

        remove_empty(out)
        kt.adapt_gemma2_files(
            gemma2[0],
            gemma2[-1],
            out,
            cross_attention=cross_attention,
            encoder_attention=encoder_attention,
            encoder_heads=encoder_heads,
            dtype=dtype and str(dtype),
            max_shard_size=max_shard_size,
            seed=seed,
            allow_non_finite=allow_non_finite,
        )
        typer.echo(f"Wrote {out}.")


def export(
    model: Model,
    out: Out,
    format: FormatOption = Format.hf,
    part: PartOption = Part.all,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Dtype of the weights that are written, rounded to the nearest. Default: the source's, bit for bit; "
            "with --format keras float32."
        ),
    ] = None,
    max_shard_size: ShardOption = "5GB",
    allow_non_finite: NonFiniteOption = False,
    quantization: Annotated[
        str | None, typer.Option(help="Of --format ctranslate2: int8, int8_float16, int16, float16, bfloat16, ...")
    ] = None,
    input_length: Annotated[
        int | None, typer.Option(min=1, help="Of --format saved_model: the most tokens of a prompt. Default: 512.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Of --format saved_model: the most tokens of an answer. Default: 128.")
    ] = None,
    no_strings: Annotated[
        bool, typer.Option("--no-strings", help="Of --format saved_model: ids in and out, without the tokenizer.")
    ] = False,
    backend: BackendOption = None,
) -> None:
    """Write a checkpoint in another format, or in another dtype."""
    with one_line_errors():
        check_free(out)
        _check_size(max_shard_size)
        given = {
            "--part": None if part == Part.all else part,
            "--dtype": dtype,
            "--max-shard-size": None if max_shard_size == "5GB" else max_shard_size,
            "--allow-non-finite": allow_non_finite,
            "--quantization": quantization,
            "--input-length": input_length,
            "--max-length": max_length,
            "--no-strings": no_strings,
        }
        check_options(format, given)
        if format not in (Format.hf, Format.keras):
            check_runtime(format, backend, quantization)
            options = {"quantization": quantization, "input_length": input_length, "max_length": max_length}
            options["strings"] = False if no_strings else None
            export_to_runtime(format, model, out, dtype=dtype, backend=backend, options=options)
            return
        if format == Format.keras:
            if part != Part.all:
                kind = "T5GemmaEncoder" if part == Part.encoder else "T5GemmaTextEmbedder"
                raise ValueError(
                    f"--part {part} writes Hugging Face's format only. A Keras preset: "
                    f"`{kind}.from_preset(MODEL).save_to_preset(OUT)`."
                )
            save_model(load_model(model, dtype, backend), out, keras_format=True)
            return
        import keras_t5gemma as kt

        remove_empty(out)
        kt.convert_checkpoint(
            model,
            out,
            part=str(part),
            dtype=dtype and str(dtype),
            max_shard_size=max_shard_size,
            allow_non_finite=allow_non_finite,
        )
        typer.echo(f"Wrote {out}.")


def average(
    checkpoints: Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", help="Two or more of one config.")],
    out: Out,
    weights: Annotated[
        str | None, typer.Option(help="One number per checkpoint, with commas between them. Default: equal.")
    ] = None,
    dtype: DtypeOption = None,
    max_shard_size: ShardOption = "5GB",
    allow_non_finite: NonFiniteOption = False,
) -> None:
    """Write the mean of several checkpoints, such as the last five of a run."""
    with one_line_errors():
        check_free(out)
        _check_size(max_shard_size)
        if len(checkpoints) < 2:
            raise ValueError(
                f"A mean takes two checkpoints or more, and OUT. Received: {', '.join(checkpoints)}; {out}."
            )
        import keras_t5gemma as kt

        try:
            numbers = None if weights is None else [float(weight) for weight in weights.split(",")]
        except ValueError as error:
            raise ValueError(f"--weights takes numbers with commas between them. Received: {weights!r}.") from error
        remove_empty(out)
        kt.average_checkpoints(
            checkpoints,
            out,
            weights=numbers,
            dtype=dtype and str(dtype),
            max_shard_size=max_shard_size,
            allow_non_finite=allow_non_finite,
        )
        typer.echo(f"Wrote {out}.")


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A T5Gemma or a Gemma 2: a folder or a hub's name.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor: shape, dtype, bytes.")] = False,
) -> None:
    """Show the kind of a checkpoint, its sizes and its tensors, which are checked against its config."""
    with one_line_errors():
        from keras_t5gemma.cli.inspection import config_table, recognize, tensor_table, totals_table

        title, source = recognize(model)
        console = wide_console()
        console.print(config_table(title, source.config))
        if tensors:
            console.print(tensor_table(source.tensors))
        console.print(totals_table(source))


def verify(
    model: Model,
    gemma2: Annotated[
        list[str] | None,
        typer.Option(help="A Gemma 2 it was adapted from; twice for the encoder's and the decoder's."),
    ] = None,
    against: Annotated[str | None, typer.Option(help="Another checkpoint of the same config.")] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="Largest difference, as a fraction of the largest value, with which verify succeeds."),
    ] = 1e-5,
    backend: BackendOption = None,
) -> None:
    """Read every number: compare checksums, or the model with its Gemma 2, or with another checkpoint."""
    if gemma2 and against:
        raise typer.BadParameter("--gemma2 and --against are two questions: ask them one after the other.")
    if gemma2 and len(gemma2) > 2:
        raise typer.BadParameter(f"--gemma2 is given once or twice, not {len(gemma2)} times.")
    with one_line_errors():
        from keras_t5gemma.checkpoints.verify import check_invariants, compare_checkpoints, read_all

        if against:
            differences = compare_checkpoints(model, against)
            if not differences:
                typer.echo("All tensors are the same, bit for bit.")
        elif gemma2:
            use_backend(backend)
            differences = check_invariants(model, *gemma2)
        else:
            count, checked = read_all(model)
            typer.echo(f"{count} tensors read, all finite; {checked} of them have a checksum, and the right one.")
            return
        _print_differences(differences)
        if any(difference.largest > tolerance * difference.scale for difference in differences):
            typer.secho(f"They differ by more than {tolerance:g} of the largest value.", fg="red", err=True)
            raise typer.Exit(1)


def _check_size(text: str) -> None:
    """Checks --max-shard-size before a checkpoint is opened, which may be a download."""
    from keras_t5gemma.checkpoints.hugging_face.writer import byte_count

    byte_count(text)


def _print_differences(differences: "list[Difference]", limit: int = 20) -> None:
    """Prints a table of the first differences, which are the largest."""
    from rich.table import Table

    table = Table()
    for heading in ("", "largest difference", "largest value"):
        table.add_column(heading, justify="right" if heading else "left")
    for difference in differences[:limit]:
        table.add_row(difference.name, f"{difference.largest:.3g}", f"{difference.scale:.3g}")
    if differences:
        wide_console().print(table)
    if len(differences) > limit:
        typer.echo(f"... and {len(differences) - limit} tensors with smaller differences.")
