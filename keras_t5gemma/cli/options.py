"""Arguments and options that several verbs share."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from keras_t5gemma.cli.session import Backend


class Dtype(enum.StrEnum):
    """Dtypes of weights in a checkpoint."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class InferenceDtype(enum.StrEnum):
    """Dtypes of a model for inference."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    int4 = "int4"


class Truncate(enum.StrEnum):
    """The end at which a text that is too long is cut."""

    left = "left"
    right = "right"


class Format(enum.StrEnum):
    """Formats of a checkpoint on disk."""

    hf = "hf"
    keras = "keras"
    onnx = "onnx"
    ctranslate2 = "ctranslate2"
    saved_model = "saved_model"


class Part(enum.StrEnum):
    """What is written of a checkpoint."""

    all = "all"
    encoder = "encoder"
    sentence_transformers = "sentence-transformers"


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
FormatOption = Annotated[
    Format,
    typer.Option(
        help="hf: safetensors for `transformers`; keras: a Keras preset; onnx: for ONNX Runtime; ctranslate2; "
        "saved_model: for TensorFlow."
    ),
]
PartOption = Annotated[
    Part,
    typer.Option(
        help="all; encoder: the encoder alone, for `transformers.T5GemmaEncoderModel`; sentence-transformers: a text "
        "embedder, for `SentenceTransformer`."
    ),
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A preset's name, hf://owner/name, kaggle://..., or a folder.")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")]
ShardOption = Annotated[str, typer.Option("--max-shard-size", help="Maximum bytes per file, e.g. 500MB.")]
NonFiniteOption = Annotated[
    bool, typer.Option("--allow-non-finite", help="Keep infinities and NaNs, which are refused otherwise.")
]
