"""Every test runs offline, on one thread pool, with caches in a folder of its own."""

import os
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="vlm-zoo-tests-"))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

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
