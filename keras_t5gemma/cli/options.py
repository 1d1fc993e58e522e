"""Arguments and options that several verbs share."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from keras_t5gemma.cli.session import Backend


class Dtype(enum.StrEnum):
    """What weights are kept in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class InferenceDtype(enum.StrEnum):
    """What a model answers with."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    int4 = "int4"


class Truncate(enum.StrEnum):
    """What of a text that is too long is cut off."""

    left = "left"
    right = "right"


class Format(enum.StrEnum):
    """How a checkpoint lies on disk."""

    hf = "hf"
    keras = "keras"


BackendOption = Annotated[
    Backend | None,
    typer.Option(help="Keras backend. Default: KERAS_BACKEND, else jax if it is installed, else what Keras chooses."),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        help="Dtype of the weights that are written, rounded to the nearest. Default: the source's, bit for bit."
    ),
]
FormatOption = Annotated[Format, typer.Option(help="hf: safetensors, as `transformers` reads; keras: a Keras preset.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A preset's name, hf://owner/name, kaggle://..., or a folder.")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")]
ShardOption = Annotated[str, typer.Option("--max-shard-size", help="Bytes in a file, e.g. 500MB.")]
NonFiniteOption = Annotated[
    bool, typer.Option("--allow-non-finite", help="Keep infinities and NaNs, which are refused otherwise.")
]
