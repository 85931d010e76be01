"""`model.py`: what people read and keep has to be the network, to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from app.network.architecture import Preprocessing
from app.network.graph import Graph, build_graph
from app.network.layers.names import LONGEST_NAME
from app.network.layers.registry import CONTAINERS, LAYERS, read_layers
from tests.support.networks.topologies import CLASSES, TOPOLOGIES, conv, layer, pictures, topology, trained
from worker.export.files import export_network, portable_tensors
from worker.export.pytorch_source import model_source

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

NAMES = ("cat", 'it\'s a "dog"', "é\\n🦊")
PREPROCESSING = Preprocessing(1 / 255, (0.25, 0.5, 0.125), (0.5, 0.25, 1.0))


def source_of(graph: Graph) -> str:
    channels = graph.input_shape[0]
    return model_source(graph, NAMES, Preprocessing(1 / 255, (0.25,) * channels, (0.5,) * channels))


def module_of(source: str) -> ModuleType:
    module = ModuleType("model")
    exec(compile(source, "model.py", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_source_gives_the_bits_of_the_network_and_the_same_keys(name: str) -> None:
    network = trained(topology(name))
    delivered = module_of(source_of(network.graph)).build()
    delivered.load_state_dict(portable_tensors(network))
    images = torch.from_numpy(pictures(network.graph, 7))
    with torch.no_grad():
        assert torch.equal(delivered(images), network(images))
    assert delivered.state_dict().keys() == network.state_dict().keys()


def test_the_topologies_use_every_layer_of_the_language() -> None:
    used = {node.type for name in TOPOLOGIES for node in topology(name).nodes}
    containers = {kind.model_fields["type"].default for kind in CONTAINERS}
    assert used == set(LAYERS) - containers


def test_the_source_is_laid_out_as_ruff_does_it_also_with_long_names_and_many_branches(tmp_path: Path) -> None:
    long = "a" * LONGEST_NAME
    many = [conv(2, 1, inputs=["input"], name=f"branch_with_a_name_{index}") for index in range(30)]
    names = [branch["name"] for branch in many]
    wide = [
        *many,
        layer("add", inputs=names, name="sum"),
        layer("concat", inputs=[*names, "sum"]),
        layer("layer_norm", name=long),
        *[layer("flatten"), layer("linear", out_features=CLASSES, name=f"{long[1:]}b")],
    ]
    graphs = [*map(topology, TOPOLOGIES), build_graph(read_layers(wide), (40, 4, 4))]
    for index, graph in enumerate(graphs):
        (tmp_path / f"model_{index}.py").write_text(source_of(graph))
    ruff = [str(Path(sys.executable).with_name("ruff")), "format", "--isolated", "--no-cache", "--diff", "."]
    done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_class_names_arrive_whatever_they_contain_and_no_text_of_users_is_code() -> None:
    source = source_of(topology("chain"))
    assert list(NAMES) == module_of(source).CLASSES
    assert source.isascii()
    hostile = ["'''\nimport os\n'''", "')", "\\", '"""', "\u2028"]
    module = module_of(model_source(topology("chain"), hostile, PREPROCESSING))
    assert hostile == module.CLASSES
    assert not hasattr(module, "hostile")


def test_preprocess_in_the_source_gives_the_bits_of_the_preprocessing_in_training() -> None:
    graph = topology("residual")
    module = module_of(model_source(graph, NAMES, PREPROCESSING))
    raw = torch.arange(2 * 3 * 64, dtype=torch.uint8).reshape(2, 3, 8, 8)
    assert torch.equal(module.preprocess(raw), torch.from_numpy(PREPROCESSING.apply(raw.numpy())))
    assert graph.input_shape == module.INPUT_SHAPE


def test_build_gives_eval_mode_so_that_dropout_is_off_and_train_mode_turns_it_on() -> None:
    module = module_of(source_of(topology("chain")))
    network = module.build()
    images = torch.from_numpy(pictures(topology("chain"), 4))
    assert not network.training
    assert torch.equal(network(images), network(images))
    network.train()
    assert not torch.equal(network(images), network(images))


def test_the_docstring_states_shapes_and_cost() -> None:
    doc = module_of(source_of(topology("chain"))).__doc__ or ""
    assert "N x 1 x 8 x 8" in doc
    assert f"N x {CLASSES} logits" in doc
    assert "multiply-accumulates" in doc


def test_the_delivered_source_runs_alone_in_an_empty_folder(tmp_path: Path) -> None:
    network = trained(topology("residual"))
    export_network(
        network, tmp_path, stem="pruned", class_names=NAMES, preprocessing=PREPROCESSING, formats={"pytorch"}
    )
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "import json, torch, model\n"
        "network = model.load('pruned.safetensors')\n"
        "logits = network(torch.arange(384.).reshape(2, 3, 8, 8) / 384)\n"
        "ours = [name for name in sys.modules if name.split('.')[0] in ('app', 'worker')]\n"
        "print(json.dumps([logits.tolist(), ours]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    logits, ours = json.loads(done.stdout)
    with torch.no_grad():
        expected = network(torch.arange(384.0).reshape(2, 3, 8, 8) / 384)
    assert torch.allclose(torch.tensor(logits), expected, atol=1e-6)
    assert ours == []
