"""The verb serve."""

from pathlib import Path
from typing import Annotated

import typer

from keras_t5gemma.cli.options import BackendOption, InferenceDtype, Model
from keras_t5gemma.cli.session import load_for_inference, one_line_errors


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on. 127.0.0.1 is for this machine only, 0.0.0.0 for all networks.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients. Default: the last part of MODEL.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Requests that are decoded at a time.")] = 32,
    buckets: Annotated[
        str | None,
        typer.Option(
            help="Sizes of prompts in tokens, ascending, separated by commas. A prompt is padded to the smallest that "
            "holds it. Default: a quarter of the preset's longest prompt, and all of it."
        ),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of an answer, plus one. Default: the preset's.")
    ] = None,
    most_waiting: Annotated[
        int, typer.Option(min=1, help="Most requests that wait for a slot; more are refused.")
    ] = 128,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File with a key per line, one of which each request must have. Default: none."),
    ] = None,
    stop_after: Annotated[float, typer.Option(min=0, help="Seconds for open requests after SIGTERM or Ctrl+C.")] = 30,
    dtype: Annotated[
        InferenceDtype | None, typer.Option(help="Dtype of weights and computation, as for `generate`.")
    ] = None,
    backend: BackendOption = None,
) -> None:
    """Answer chats, completions and embeddings over HTTP, with OpenAI's API."""
    with one_line_errors():
        from keras_t5gemma.serving.http.places import check_installed, listening_socket

        check_installed()
        sizes = _sizes(buckets)
        keys = None if api_key_file is None else _keys(api_key_file)
        listening_socket(host, port).close()  # a port that is taken is an error before a model is loaded
        lm = load_for_inference(model, dtype, backend)
        import keras_t5gemma as kt

        if sizes is not None and lm.preprocessor is not None:
            lm.preprocessor.encoder_sequence_length = sizes[-1]
        shown = name or model.rstrip("/").rpartition("/")[2]
        options = {"slots": slots, "buckets": sizes, "max_length": max_length, "most_waiting": most_waiting}
        try:
            server = kt.Server(lm, name=shown, host=host, port=port, api_key=keys, **options)
            server.serve(stop_after, lambda: typer.echo(f"Serving {shown} at {server.url}/v1. Ctrl+C stops it."))
        except MemoryError as error:
            raise ValueError(f"{error} Try fewer --slots, smaller --buckets or a shorter --max-length.") from error
        typer.echo("Stopped.")


def _sizes(text: str | None) -> tuple[int, ...] | None:
    """The value of --buckets."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    sizes = tuple(int(part) for part in parts if part.isascii() and part.isdigit())
    if len(sizes) != len(parts) or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ValueError(f"--buckets must be ascending sizes such as 128,512. Received: {text!r}.")
    return sizes


def _keys(path: Path) -> tuple[str, ...]:
    """The keys in the file of --api-key-file. Messages do not hold them."""
    from keras_t5gemma.serving.http.places import checked_keys

    keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not keys:
        raise ValueError(f"--api-key-file {path} holds no key. Write one key per line.")
    try:
        return checked_keys(keys)
    except ValueError as error:
        raise ValueError(f"--api-key-file {path} must hold one key per line, without spaces in it.") from error
