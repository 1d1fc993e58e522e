"""What a recipe names, made: devices, model, data."""

import contextlib

import keras

from keras_t5gemma.models.adapted import adapt_gemma2
from keras_t5gemma.models.distribution import layout_map
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.objectives.dataset import pretraining_dataset
from keras_t5gemma.objectives.sources import text_source
from keras_t5gemma.objectives.supervised import supervised_dataset
from keras_t5gemma.recipes.objectives import SUPERVISED
from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer
from keras_t5gemma.training.evaluation import first_batches, held_out_by_part
from keras_t5gemma.training.losses import VocabularyCrossEntropy
from keras_t5gemma.training.optimizers import optimizer


def distribution(hardware):
    """A context in which models are laid out over the devices of a `HardwareSection`.

    Raises:
        ValueError: where the backend or the machine has no such devices.
    """
    if not hardware.mesh:
        return contextlib.nullcontext()
    if keras.config.backend() != "jax":
        raise ValueError(
            f"[hardware] mesh: `keras.distribution` works on JAX alone. Received: backend {keras.config.backend()!r}. "
            f"Choose --backend jax, or leave `mesh` out for one device."
        )
    if hardware.processes > 1:
        # Addresses and numbers are in the environment: KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES, _PROCESS_ID.
        keras.distribution.initialize()
    names = ("batch", "model")[: len(hardware.mesh)]
    mesh = keras.distribution.DeviceMesh(hardware.mesh, names)
    layouts = layout_map(mesh, fully_sharded=hardware.fully_sharded)
    parallel = keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=hardware.processes == 1
    )
    return parallel.scope()


def process(hardware):
    """Which of the processes this is, from 0.

    Raises:
        ValueError: where there are more or fewer than the recipe says.
    """
    if hardware.processes == 1:
        return 0
    import jax  # `keras.distribution` has processes there alone

    if jax.process_count() != hardware.processes:
        raise ValueError(
            f"[hardware] processes: the recipe says {hardware.processes}, and {jax.process_count()} have met."
        )
    return jax.process_index()


def compiled_model(recipe):
    """The model of a `Recipe`, with its preprocessor, compiled."""
    section, training = recipe.model, recipe.training
    lengths = recipe.objective.encoder_length, recipe.objective.decoder_length
    if section.preset:
        lm = T5GemmaSeq2SeqLM.from_preset(section.preset, dtype=section.dtype)
    else:
        backbone = adapt_gemma2(
            *section.adapt,
            cross_attention=section.cross_attention,
            encoder_attention=section.encoder_attention,
            encoder_heads=section.encoder_heads,
            seed=training.seed,
            dtype=section.dtype,
        )
        tokenizer = T5GemmaTokenizer.from_preset(section.tokenizer or section.adapt[-1])
        lm = T5GemmaSeq2SeqLM(backbone, T5GemmaSeq2SeqLMPreprocessor(tokenizer, *lengths))
    if section.lora_rank:
        lm.backbone.enable_lora(section.lora_rank)
    lm.backbone.rematerialize = section.rematerialize
    lm.compile(optimizer=_optimizer(recipe), loss=_loss(recipe), accumulation_steps=training.accumulation_steps)
    return lm


def training_data(recipe, preprocessor, objective, index):
    """The endless dataset of a `Recipe`, this process's share of it."""
    return _dataset(recipe, recipe.data.sources, preprocessor, objective, index)


def held_out_batches(recipe, preprocessor, objective, index):
    """What `TrainingLog` takes as `held_out`, None where the recipe has none."""
    data, training = recipe.data, recipe.training
    if not data.validation:
        return None
    if objective is None:
        batches = _dataset(recipe, data.validation, preprocessor, None, index, shuffle=False, num_epochs=1)
        return {"supervised": (first_batches(batches, training.evaluate_batches), 1)}
    return held_out_by_part(
        _source(recipe, data.validation, index),
        preprocessor.tokenizer,
        objective,
        num_batches=training.evaluate_batches,
        batch_size=training.batch_size // recipe.hardware.processes,
        seed=training.seed,
        documents=data.documents,
        pack=data.pack,
    )


def _optimizer(recipe):
    section = recipe.optimizer
    betas = {name: getattr(section, name) for name in ("beta_1", "beta_2")}
    return optimizer(
        section.name,
        learning_rate=section.learning_rate,
        steps=section.decay_steps,
        warmup_steps=section.warmup_steps,
        final_fraction=section.final_fraction,
        weight_decay=section.weight_decay,
        clip_norm=section.clip_norm,
        **{name: beta for name, beta in betas.items() if beta is not None},
    )


def _loss(recipe):
    training = recipe.training
    return VocabularyCrossEntropy(z_loss=training.z_loss, label_smoothing=training.label_smoothing)


def _source(recipe, paths, index):
    data = recipe.data
    return text_source(
        list(paths),
        field=data.field if recipe.objective.name != SUPERVISED else None,
        format=data.format,
        sample_by=data.sample_by,
        shard_index=index,
        shard_count=recipe.hardware.processes,
    )


def _dataset(recipe, paths, preprocessor, objective, index, **options):
    data, training = recipe.data, recipe.training
    source = _source(recipe, paths, index)
    options |= {
        "batch_size": training.batch_size // recipe.hardware.processes,
        "seed": training.seed,
        "pack": data.pack,
        "num_workers": data.num_workers,
        "shuffle_buffer": data.shuffle_buffer,
        "pack_buffer": data.pack_buffer,
    }
    if objective is not None:
        return pretraining_dataset(source, preprocessor.tokenizer, objective, documents=data.documents, **options)
    return supervised_dataset(
        source,
        preprocessor,
        encoder_length=recipe.objective.encoder_length,
        decoder_length=recipe.objective.decoder_length,
        fields=data.pair_fields,
        answers=data.answers,
        **options,
    )
