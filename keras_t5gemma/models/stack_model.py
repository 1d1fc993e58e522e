"""What the backbone and the encoder alone have in common: LoRA, quantization, layouts, saving and loading."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import h5py
import keras
import keras_hub

from keras_t5gemma._keras_internals import flatten_layers
from keras_t5gemma.checkpoints.load import load
from keras_t5gemma.checkpoints.sources import Source, open_t5gemma
from keras_t5gemma.config import T5GemmaConfig, T5GemmaEncoderConfig
from keras_t5gemma.hub import PresetFolder
from keras_t5gemma.layers import lora
from keras_t5gemma.layers.initialization import weights_from
from keras_t5gemma.models.guarded import Guarded
from keras_t5gemma.models.quantization import QuantizationMixin, unquantized
from keras_t5gemma.models.saved_state import backbone_from_config, state_config
from keras_t5gemma.models.sharding import layout_map
from keras_t5gemma.presets import PRESETS


class StackModel(Guarded, QuantizationMixin, keras_hub.models.Backbone):
    """The base class of `T5GemmaBackbone` and `T5GemmaEncoder`, which build the stacks.

    Attributes:
        config: the model's config.
        trainable_before_lora: the paths of the weights that were trainable before `enable_lora`.
    """

    presets = PRESETS
    config: T5GemmaConfig | T5GemmaEncoderConfig
    trainable_before_lora: list[str]
    # Opens a preset's folder as the `Source` of the class's weights.
    _open: Callable[[PresetFolder], Source]

    def default_lora_layer_names(self) -> list[str]:
        """The default targets of `enable_lora`: the query and value projections of each attention."""
        return ["query", "value"]

    def enable_lora(
        self,
        rank: int | Mapping[str, int],
        target_layer_names: str | Sequence[str] | None = None,
        *,
        lora_alpha: float | None = None,
    ) -> None:
        """Adds LoRA (arXiv 2106.09685) to some layers and freezes all other weights.

            backbone.enable_lora(8)  # queries and values of each attention
            backbone.enable_lora(8, "decoder/*/cross_attention/*")
            backbone.enable_lora(8, ["query", "key", "value", "output", "gate", "up", "down"])
            backbone.enable_lora({"decoder/layer_2[0-5]/*": 16, "encoder/*": 4})

        Args:
            rank: the rank of LoRA's matrices; or a dict of targets and their ranks, in which the first target that
                matches a layer gives its rank.
            target_layer_names: one target or several: layer names ("query"), paths
                ("decoder/layer_0/self_attention/query"), or patterns of paths, in which `*` matches any text. Patterns
                match no embedding table; name it by its own name or path.
            lora_alpha: LoRA's product is multiplied by `lora_alpha / rank`; None for a factor of 1.

        Raises:
            ValueError: if a target matches no layer, a rank is not a positive integer, or the model already has LoRA.
        """
        targets = target_layer_names
        if targets is None and not isinstance(rank, dict):
            targets = self.default_lora_layer_names()
        self.enable_lora_on({path: (value, lora_alpha) for path, value in lora.select(self, rank, targets).items()})

    def enable_lora_on(self, layers: Mapping[str, tuple[int, float | None]]) -> None:
        """Adds LoRA to layers selected by path and freezes all other weights.

        Args:
            layers: `{path: (rank, lora_alpha)}`.

        Raises:
            ValueError: if the model already has LoRA.
        """
        trainable_before = lora.enable(self, layers)
        self.lora_enabled_on({path: rank for path, (rank, _) in layers.items()}, trainable_before)

    def lora_enabled_on(self, ranks: Mapping[str, int], trainable_before: list[str]) -> None:
        """Notes LoRA that layers have got.

        Args:
            ranks: the layers' ranks by path.
            trainable_before: the paths of the weights that were trainable before.
        """
        self.trainable_before_lora = trainable_before
        # keras-hub's `save_lora_weights` reads these: the layers' indices among those with weights, and one rank.
        with_weights = [layer for layer in flatten_layers(self)[1:] if layer.weights]
        self._lora_enabled_layers = [i for i, layer in enumerate(with_weights) if layer.path in ranks]
        self._lora_rank = max(ranks.values())

    def merge_lora(self) -> None:
        """Adds LoRA's products to the weights and removes LoRA. The weights that were trainable before are so again.

        Outputs change only by rounding in the weights' dtype.

        Raises:
            ValueError: if the model has no LoRA, or has it on quantized weights, which cannot store the sum.
        """
        lora.merge(self)
        lora.set_trainable(self, self.trainable_before_lora)
        self._lora_enabled_layers, self.trainable_before_lora = [], []

    def save_lora_weights(self, filepath: str | Path) -> None:
        """Writes LoRA in keras-hub's own format, a `.lora.h5` file.

        Raises:
            ValueError: if the model has no LoRA, or if its LoRA has several ranks or a `lora_alpha`, which the format
                cannot store. `save_lora` writes both.
        """
        if any({layer.lora_rank, layer.lora_alpha} != {self._lora_rank} for layer in lora.lora_layers(self).values()):
            raise ValueError(
                "keras-hub's `.lora.h5` holds one rank and no `lora_alpha`, and this model's LoRA has others. Call "
                "`keras_t5gemma.save_lora(model, folder)`, whose format holds them."
            )
        super().save_lora_weights(filepath)

    def load_lora_weights(self, filepath: str | Path) -> None:
        """Reads LoRA from keras-hub's own format. If the model has no LoRA, enables it on the file's layers.

        Raises:
            ValueError: if the model and the file have LoRA on different layers or of different rank.
        """
        with h5py.File(filepath, "r") as file:
            in_file = sorted(int(name) for name in file["lora"] if name.isdigit())
            rank = int(file["lora/vars/rank"][()])
        with_weights = [layer for layer in flatten_layers(self)[1:] if layer.weights]
        if not lora.lora_layers(self):
            self.enable_lora_on({with_weights[i].path: (rank, None) for i in in_file})
        elif in_file != self._lora_enabled_layers:
            i = min(set(in_file) ^ set(self._lora_enabled_layers))
            has, lacks = ("file", "model") if i in in_file else ("model", "file")
            raise ValueError(f"{filepath}: the {has} has LoRA on {with_weights[i].path}, the {lacks} does not.")
        super().load_lora_weights(filepath)

    def get_config(self) -> dict:
        """The constructor's arguments and the entries of `models.saved_state`, JSON-ready."""
        return {"name": self.name, "trainable": self.trainable, **self.config.to_dict(), **state_config(self)}

    @classmethod
    def from_config(cls, config: Mapping) -> Self:
        """Creates a model from the result of `get_config`, with new weights."""
        return backbone_from_config(config, super().from_config)

    @staticmethod
    def get_layout_map(
        device_mesh: keras.distribution.DeviceMesh,
        model_parallel_dim_name: str = "model",
        data_parallel_dim_name: str = "batch",
        config: T5GemmaConfig | T5GemmaEncoderConfig | None = None,
    ) -> keras.distribution.LayoutMap:
        """The layouts of weights and activations on several devices, through keras-hub's interface.

        Args:
            device_mesh: a `keras.distribution.DeviceMesh`.
            model_parallel_dim_name: the axis of the mesh along which each layer is divided.
            data_parallel_dim_name: the axis along which the batch and the weights are divided.
            config: the model's `config`, needed if sizes do not divide by the mesh. See `layout_map`.

        Returns:
            A `keras.distribution.LayoutMap`.

        Raises:
            ValueError: if `device_mesh` is not a `DeviceMesh`, or has no axis for the batch.
        """
        return layout_map(device_mesh, config, data_axis=data_parallel_dim_name, model_axis=model_parallel_dim_name)

    @classmethod
    def from_preset(cls, preset: str | Path | PresetFolder, load_weights: bool = True, **kwargs) -> Self:
        """Loads the model of a preset.

        Args:
            preset: a built-in name (`keras-t5gemma presets` lists them), "hf://owner/name", "kaggle://...", or a folder
                in Keras or Hugging Face format. keras-hub's own T5Gemma presets are read too. A model that was saved
                quantized, with LoRA or partly frozen is restored as such.
            load_weights: False for the architecture with random weights.
            **kwargs: arguments of the class, such as `dtype`. If `dtype` is left out, it is Keras's policy
                (`keras.config.dtype_policy()`), whatever the dtype of the stored weights. Keras's names of quantized
                policies load first and quantize afterwards. "int8_from_bfloat16" loads in bfloat16 and calls
                `quantize("int8")`. "int4/32_from_bfloat16" calls
                `quantize(config=keras.quantizers.Int4QuantizationConfig(block_size=32))`.

        Raises:
            ValueError: if the preset is unknown, or is not a T5Gemma.
            ConnectionError: if a download failed.
            CheckpointError: if the folder's tensors are not those of its config.
        """
        return cls.from_folder(open_t5gemma(preset), cls._open, load_weights, **kwargs)

    @classmethod
    def from_folder(
        cls, folder: PresetFolder, open_source: Callable[[PresetFolder], Source], load_weights: bool = True, **kwargs
    ) -> Self:
        """Loads the model of a folder, of which a function opens the weights; otherwise as `from_preset`.

        Args:
            folder: a `PresetFolder`.
            open_source: gives the `Source` with the class's tensors.
            load_weights: as for `from_preset`.
            **kwargs: as for `from_preset`.
        """
        saved = _saved_config(folder)
        if has_saved_layers(folder, cls):
            # Only Keras's own format has these. Keras builds the whole model first: zeros need no random draws.
            with weights_from(_zeros) if load_weights else contextlib.nullcontext():
                return super().from_preset(str(folder), load_weights=load_weights, **kwargs)
        kwargs = {name: saved[name] for name in ("name", "trainable") if name in saved} | kwargs
        kwargs["dtype"], mode, config = unquantized(kwargs.get("dtype"))
        source = open_source(folder)

        def build():
            return cls(**{**source.config.to_dict(), **kwargs})

        backbone = load(build, source.config, source.tensors) if load_weights else build()
        if "trainable_weights" in saved and kwargs.get("trainable", True):
            lora.set_trainable(backbone, saved["trainable_weights"])
        if mode is not None:
            backbone.quantize(mode, config=config)
        return backbone


def has_saved_layers(folder: PresetFolder, cls: type) -> bool:
    """Whether a folder is the Keras preset of a model of a class that was saved quantized or with LoRA."""
    saved = _saved_config(folder)
    of_class = folder.config is not None and folder.config.get("registered_name") == f"keras_t5gemma>{cls.__name__}"
    return of_class and bool({"quantization", "lora"} & set(saved))


def _zeros(path, shape, dtype):
    del path
    return keras.ops.zeros(shape, dtype)


def _saved_config(folder: PresetFolder) -> dict:
    """The arguments that `save_to_preset` wrote; empty if another program wrote the folder."""
    saved = folder.config or {}
    return saved["config"] if str(saved.get("registered_name")).startswith("keras_t5gemma>") else {}
