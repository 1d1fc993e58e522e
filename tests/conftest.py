"""One backend a run, chosen by KERAS_BACKEND as for any Keras program; no network."""

import atexit
import gc
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest

# Before Keras is imported. JAX is the reference; `nox -s tests` runs all three.
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if os.environ["KERAS_BACKEND"] == "jax":
    # Compiling is most of the time there, and what is compiled is tiny.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
    # A program is compiled once per run: by one of pytest's processes, for the others and for those that tests start.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE = tempfile.mkdtemp(prefix="jax_programs_")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
# Tiny tensors: threads cost more than they give (on PyTorch ten times over).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that reaches for a hub by mistake fails at once, the same with and without a network.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
# What `datasets` keeps of the rows of a test is removed with it.
os.environ["HF_HOME"] = _HF_HOME = tempfile.mkdtemp(prefix="hf_home_")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
# Figures are drawn into files.
os.environ.setdefault("MPLBACKEND", "agg")

# Asserts outside tests show their values, too.
pytest.register_assert_rewrite("helpers.page_outcomes", "helpers.page_outcomes_of_runtimes")

# Files that take long, or folders, which end with a slash. Their tests are marked slow and come first: last, they would
# leave one of two processes without work. `nox -s tests` runs each slow test on one backend, and on the two others it
# is marked elsewhere; `nox -s full` runs all on all. Most files are dealt out: their first, fourth, seventh test is
# JAX's, and so on. So each backend has a part of each file.
_BACKENDS = ("jax", "tensorflow", "torch")
_DEALT = (
    "checkpoints/test_adapt_files.py",
    "checkpoints/test_checkpoint_export.py",
    "checkpoints/test_checkpoint_sources.py",
    "checkpoints/test_convert.py",
    "checkpoints/test_peft.py",
    "data/test_dataset.py",
    "data/test_supervised.py",
    "evaluation/",
    "exports/test_ctranslate2.py",
    "exports/test_onnx.py",
    "exports/test_saved_model.py",
    "heads/",
    "inference/test_buckets.py",
    "inference/test_control.py",
    "inference/test_encoded.py",
    "inference/test_generate_ids.py",
    "inference/test_load.py",
    "inference/test_scoring.py",
    "inference/test_stop_strings.py",
    "inference/test_streaming.py",
    "inference/test_threads.py",
    "kernels/test_attention_blocks.py",
    "kernels/test_attention_kernels.py",
    "models/test_config_fields.py",
    "models/test_contract.py",
    "models/test_encoder.py",
    "models/test_lora.py",
    "models/test_overrides.py",
    "models/test_quantized.py",
    "models/test_saved_models.py",
    "models/test_saved_optimizer.py",
    "recipes/",
    "reinforcement/",
    "serving/",
    "test_cli.py",
    "test_cli_generate.py",
    "test_cli_serve.py",
    "test_notebook.py",
    "test_pages.py",
    "test_registration.py",
    "training/batches/test_forms_of_data.py",
    "training/callbacks/",
    "training/checkpointing/test_best.py",
    "training/checkpointing/test_resume.py",
    "training/checkpointing/test_resume_early_stopping.py",
    "training/losses/test_distillation.py",
    "training/losses/test_float16_loss.py",
    "training/losses/test_in_batch_negatives.py",
    "training/losses/test_losses.py",
    "training/losses/test_preference.py",
    "training/losses/test_teachers.py",
    "training/optimizers/test_low_precision.py",
    "training/test_accumulation.py",
    "training/test_long_inputs.py",
    "training/test_long_memory.py",
    "training/test_rematerialization.py",
)
# These share what takes long to make, or have devices of JAX: they stay together.
_WHOLE = {
    "journeys/test_dates.py": "tensorflow",
    "journeys/test_rewards.py": "torch",
    "journeys/test_search.py": "jax",
    "test_demo.py": "torch",
    "test_distribution.py": "jax",
    "test_quiet.py": "tensorflow",
    "test_sharded_runs.py": "jax",
    "training/checkpointing/test_killed_runs.py": "jax",
}

# Files that compute nothing with a backend: files, numbers on the host, the text of the repository. Folders end with a
# slash. Their tests are marked `once`: `nox -s tests` runs them in one of its three sessions.
_ONCE = (
    "api/",
    "checkpoints/test_checkpoint_files.py",
    "checkpoints/test_faults.py",
    "checkpoints/test_hf_config.py",
    "checkpoints/test_kills.py",
    "checkpoints/test_orbax.py",
    "checkpoints/test_streamed_files.py",
    "checkpoints/test_tensor_table.py",
    "data/test_example.py",
    "data/test_mixture.py",
    "data/test_noise_masks.py",
    "data/test_packing.py",
    "data/test_prefix_lm.py",
    "data/test_properties.py",
    "data/test_sources.py",
    "data/test_span_corruption.py",
    "data/test_ul2.py",
    "exports/test_fast_tokenizer.py",
    "test_docs_site.py",
    "test_house.py",
    "test_imports.py",
)
_TESTS = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def short_garbage_collections():
    """Garbage collections, Python's own among them, look at what a file makes, not at all that was made before it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before pytest looks at marks
def pytest_collection_modifyitems(items):
    """Slow files are marked and come first, everything else stays as it was. Files that run once are marked."""
    counts = Counter()
    for item in items:
        name = item.path.relative_to(_TESTS).as_posix()
        if name.startswith(_ONCE):
            item.add_marker("once")
        if name.startswith(_DEALT) or name in _WHOLE:
            item.add_marker("slow")
            # Tests that only some backends can run are run by all of these.
            if item.get_closest_marker("skipif") is None and item.get_closest_marker("once") is None:
                home = _WHOLE.get(name, _BACKENDS[counts[name] % 3])
                counts[name] += 1
                if home != os.environ["KERAS_BACKEND"]:
                    item.add_marker("elsewhere")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
