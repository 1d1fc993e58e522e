"""Several devices: the numbers of one device, and each device with no more than its part.

JAX has eight devices here, by `keras.distribution`, and two processes; TensorFlow two devices, by `MirroredStrategy`;
PyTorch two processes, by `DistributedDataParallel`. Each backend runs its own part.
"""

import re

import keras
import numpy as np
import pytest
from helpers import distributed
from helpers.distributed import CONFIG, LAYOUTS
from helpers.launch import PROCESSES, finish, free_address, start
from helpers.peers import hf_gemma2, tiny_gemma_stack
from helpers.tiny import loud_backbone

import keras_t5gemma as kt
from keras_t5gemma.checkpoints.tensor_table import tensor_specs

BACKEND = keras.config.backend()
on_jax = BACKEND == "jax"


def begin(path, job, *arguments, devices=1):
    return start(distributed.__file__, job, path, *arguments, devices=devices)


def run(path, *job, **kwargs):
    finish(begin(path, *job, **kwargs))
    return found_in(path)


def run_processes(folder, job, meeting, *arguments):
    """The job in as many processes, told their index and where to meet."""
    paths = [folder / f"{index}.npz" for index in range(PROCESSES)]
    finish(*(begin(path, job, index, meeting, *arguments) for index, path in enumerate(paths)))
    return map(found_in, paths)


def found_in(path):
    with np.load(path) as found:
        return dict(found)


def weights(found):
    return {path: value for path, value in found.items() if re.fullmatch(r"(encoder|decoder)/[^ ]+", path)}


def assert_same_step(found, one_device, tolerance=1e-5):
    assert abs(found["loss"] - one_device["loss"]) < tolerance
    assert weights(found).keys() == weights(one_device).keys()
    for path, value in weights(one_device).items():
        np.testing.assert_allclose(found[path], value, rtol=0, atol=tolerance, err_msg=path)


def mesh(shape, axes=("batch", "model")):
    return keras.distribution.DeviceMesh(shape, axes, [f"cpu:{i}" for i in range(int(np.prod(shape)))])


def cut(layouts, path):
    return None if layouts[path] is None else layouts[path].axes


def test_matrices_are_cut_in_columns_then_rows_and_along_the_width():
    layouts = kt.layout_map(mesh((2, 4)))
    assert cut(layouts, "encoder/token_embedding/embeddings") == ("model", "batch")
    for name in ("self_attention/query", "self_attention/key", "self_attention/value", "feed_forward/gate"):
        assert cut(layouts, f"encoder/layer_0/{name}/kernel") == ("batch", "model")
        assert cut(layouts, f"encoder/layer_0/{name}/output") == ("batch", "model")
    for name in ("self_attention/output", "cross_attention/output", "feed_forward/down"):
        assert cut(layouts, f"decoder/layer_11/{name}/kernel") == ("model", "batch")
        assert cut(layouts, f"decoder/layer_11/{name}/output") == ("batch", None)
    assert cut(layouts, "decoder/final_norm/scale") is None
    assert cut(layouts, "logits/output") == ("batch", None, "model")


def test_lora_is_cut_where_its_kernel_is():
    layouts = kt.layout_map(mesh((2, 4)))
    assert cut(layouts, "encoder/layer_0/self_attention/query/lora_kernel_a") == ("batch", None)
    assert cut(layouts, "encoder/layer_0/self_attention/query/lora_kernel_b") == (None, "model")


def test_heads_stay_whole_where_there_are_fewer_than_devices():
    layouts = kt.layout_map(mesh((2, 4)), CONFIG)
    assert cut(layouts, "encoder/layer_0/self_attention/key/kernel") == ("batch", "model")  # four heads
    assert cut(layouts, "decoder/layer_0/self_attention/key/kernel") == ("model", "batch")  # two
    assert cut(layouts, "decoder/layer_0/self_attention/key/output") == ("batch", None)


def test_what_does_not_divide_is_cut_elsewhere_or_whole():
    """Nothing is a multiple of 11; of 16 the decoder's width is (32), but neither the encoder's (40) nor any heads."""
    assert {cut(kt.layout_map(mesh((1, 11)), CONFIG), tensor.path) for tensor in tensor_specs(CONFIG)} <= {
        None,
        ("batch", None),
        (None, "batch"),
    }
    layouts = kt.layout_map(mesh((1, 16)), CONFIG, fully_sharded=False)
    assert cut(layouts, "decoder/layer_0/self_attention/query/kernel") == ("model", None)
    assert cut(layouts, "encoder/layer_0/self_attention/query/kernel") == (None, None)


def test_backbone_gives_the_same_layouts_as_keras_hubs_do():
    ours = kt.T5GemmaBackbone.get_layout_map(mesh((2, 4), ("data", "tensor")), "tensor", "data")
    expected = kt.layout_map(mesh((2, 4), ("data", "tensor")), data_axis="data", model_axis="tensor")
    assert {path: layout.axes for path, layout in ours.items()} == {path: x.axes for path, x in expected.items()}


def test_mesh_without_an_axis_for_the_batch_is_refused():
    with pytest.raises(ValueError, match="needs the axis 'batch'"):
        kt.layout_map(mesh((8,), ("model",)))
    with pytest.raises(ValueError, match="DeviceMesh"):
        kt.layout_map((2, 4))


@pytest.fixture(scope="module")
def one_device():
    return distributed.step(generate=on_jax)[1]


def test_the_step_on_one_device_moves_every_weight(one_device):
    """So that equal weights afterwards say something."""
    before = distributed.weights(distributed.compiled().backbone)
    assert all(np.abs(before[path] - value).max() > 1e-4 for path, value in weights(one_device).items())


if on_jax:

    @pytest.mark.parametrize(("name", "part"), [("fully sharded", (1, 12, 4, 2, 6)), ("both", (4, 12, 1, 2, 6))])
    def test_kernel_gives_the_plain_output_and_each_device_computes_its_rows_and_heads(tmp_path, name, part):
        found = run(tmp_path / "found.npz", "kernel", name, devices=8)
        assert tuple(found["shape"]) == part
        np.testing.assert_allclose(found["kernel"], found["plain"], rtol=2e-6, atol=2e-6)

    @pytest.fixture(scope="module", params=LAYOUTS)
    def layout(request):
        return request.param

    @pytest.fixture(scope="module")
    def eight_devices(layout, tmp_path_factory):
        return run(tmp_path_factory.mktemp("found") / "found.npz", "sharded", layout, devices=8)

    def test_step_on_eight_devices_is_that_of_one(eight_devices, one_device):
        assert_same_step(eight_devices, one_device)

    @pytest.fixture(scope="module")
    def taught_on_one_device():
        return distributed.distilled()

    def test_step_with_a_teacher_on_eight_devices_is_that_of_one(eight_devices, taught_on_one_device):
        taught = {path.removeprefix("distilled "): x for path, x in eight_devices.items() if "distilled" in path}
        assert_same_step(taught, taught_on_one_device[1])

    def test_step_of_a_classifier_on_eight_devices_is_that_of_one(eight_devices, layout):
        if layout == "both":
            found = {path.removeprefix("classified "): x for path, x in eight_devices.items() if "classified" in path}
            assert_same_step(found, distributed.classified())

    def test_each_device_holds_its_part_of_each_matrix_of_a_teacher(eight_devices, taught_on_one_device, layout):
        for variable in (variable for variable in taught_on_one_device[0].variables if len(variable.shape) > 1):
            parts = {"data parallel": 1, "fully sharded": 8, "tensor parallel": 8, "both": 8}[layout]
            if re.search("/(key|value)/", variable.path):  # by the width alone
                parts = {"tensor parallel": 1, "both": 2}.get(layout, parts)
            held = np.prod(eight_devices[f"shape of {variable.path}"])
            assert held * parts == np.prod(variable.shape), variable.path

    def test_generate_on_eight_devices_gives_the_ids_of_one(eight_devices, one_device):
        np.testing.assert_array_equal(eight_devices["generated"], one_device["generated"])

    def test_each_device_holds_its_part_of_each_weight_but_norms(eight_devices, layout):
        parts = 1 if layout == "data parallel" else 8
        for tensor in tensor_specs(CONFIG):
            held = np.prod(eight_devices[f"shape of {tensor.path}"])
            assert held * (1 if len(tensor.shape) == 1 else parts) == np.prod(tensor.shape), tensor.path

    def test_the_optimizers_state_lies_as_its_weights_do(eight_devices):
        for tensor in tensor_specs(CONFIG):
            state = f"shape of sgd/{tensor.path.replace('/', '_')}_momentum"
            np.testing.assert_array_equal(eight_devices[state], eight_devices[f"shape of {tensor.path}"])

    def test_no_device_computes_with_the_whole_batch(eight_devices, layout):
        """XLA, left alone, gathers the batch of a fully sharded model on every device rather than a weight."""
        widths = {int(width) for width in re.findall(r"f32\[8,(?:14|10),(\d+)\]", str(eight_devices["forward"]))}
        if layout == "tensor parallel":
            assert {CONFIG.encoder.hidden_dim, CONFIG.decoder.hidden_dim} <= widths
        else:
            # Each device looks up its columns of the embeddings for all, then they exchange: no more than its own rows.
            assert widths <= {stack.hidden_dim // 2 for stack in (CONFIG.encoder, CONFIG.decoder)}

    def test_devices_meet_once_for_the_gradient_of_the_table_and_not_after_each_chunk(eight_devices, layout):
        """XLA, left alone, would gather the table, and sum its gradient over the devices, in the loop over chunks."""
        collective = r"= (.*) (?:all-reduce|all-gather|reduce-scatter|all-to-all)\(.*op_name=\"[^\"]*while/body"
        exchanged = re.findall(collective, str(eight_devices["training"]))
        # Tensor parallelism has to exchange hidden states, and what a softmax has to know of all logits.
        assert bool(exchanged) == (layout in ("tensor parallel", "both"))
        rows = {int(rows) for rows in re.findall(rf"\[(\d+),{CONFIG.decoder.hidden_dim}\]", " ".join(exchanged))}
        assert rows <= {1, 4, 8}  # tokens

    @pytest.fixture(scope="module")
    def folders(tmp_path_factory):
        """A T5Gemma and a Gemma 2."""
        root = tmp_path_factory.mktemp("checkpoints")
        kt.export_to_hugging_face(loud_backbone(CONFIG), root / "t5gemma")
        hf_gemma2(tiny_gemma_stack(num_layers=1)).save_pretrained(root / "gemma2")
        return root / "t5gemma", root / "gemma2"

    def test_checkpoints_are_loaded_and_adapted_into_shards(folders, tmp_path):
        found = run(tmp_path / "found.npz", "loaded", "both", *folders, devices=8)
        expected = {"loaded": kt.T5GemmaBackbone.from_preset(folders[0]), "adapted": kt.adapt_gemma2(folders[1])}
        for title, backbone in expected.items():
            for variable in backbone.weights:
                whole = np.array(variable.value)
                np.testing.assert_array_equal(found[f"{title} {variable.path}"], whole)
                shards = [found[f"{title} {variable.path} on {device}"] for device in range(8)]
                assert all(shard.size * (8 if whole.ndim == 2 else 1) == whole.size for shard in shards)

    def test_two_processes_that_read_a_share_each_make_the_step_of_one(folders, tmp_path):
        backbone = kt.T5GemmaBackbone.from_preset(folders[0])
        lm = kt.T5GemmaSeq2SeqLM(backbone)
        lm.compile("sgd")
        expected = float(lm.test_on_batch(*distributed.whole_batch(), return_dict=True)["loss"])
        for found in run_processes(tmp_path, "process", free_address(), folders[0]):
            assert abs(found["loss"] - expected) < 1e-5
            for tensor in tensor_specs(CONFIG):
                held = np.prod(found[f"shape of {tensor.path}"])
                assert held * len(tensor.shape) == np.prod(tensor.shape), tensor.path


if BACKEND == "tensorflow":

    def test_step_on_two_mirrored_devices_is_that_of_one(one_device, tmp_path):
        assert_same_step(run(tmp_path / "found.npz", "mirrored"), one_device)


if BACKEND == "torch":

    def test_step_of_two_processes_is_that_of_one(one_device, tmp_path):
        for found in run_processes(tmp_path, "replica", tmp_path / "meeting"):
            assert_same_step(found, one_device)
