"""Every test runs offline, on one thread pool, with caches in a folder of its own."""

import importlib.util
import os
import tempfile
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="vlm-zoo-tests-"))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from conversion import sources
from vlm_zoo.testing import tiny_model, tiny_processor


torch.set_num_threads(1)  # tiny models lose time to thread pools


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved tiny LLaVA with its processor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "llava"
    model = tiny_model("zoo_llava")
    model.save_pretrained(folder)
    tiny_processor("zoo_llava", model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def converted_oracle(tmp_path_factory):
    """Gives the zoo's folder of an oracle, by its name; it is converted when it is asked for first, and not proven."""
    home, made = tmp_path_factory.mktemp("oracles"), {}

    def convert(name):
        if name not in made:
            source = Path(__file__).parent / "oracles" / name
            sources.script_of(source).convert(source, home / name, verify=False)
            made[name] = home / name
        return made[name]

    return convert


@pytest.fixture(scope="session")
def example():
    """Gives an example's module, by its name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
