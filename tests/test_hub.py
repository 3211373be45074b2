"""What a push uploads is what another machine needs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import hub

from vlm_zoo.testing import tiny_model, tiny_processor


class RecordedHub:
    """Stands in for the Hub's client and keeps what is committed."""

    def __init__(self, folder: Path):
        self.folder = folder

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            target = self.folder / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(Path(operation.path_or_fileobj).read_bytes())


@pytest.fixture
def repository(tmp_path, monkeypatch):
    client = RecordedHub(tmp_path / "repository")
    monkeypatch.setattr(hub, "hf_api", lambda: client)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("# A model"))
    return client.folder


def test_a_pushed_repository_is_complete_and_opens(repository):
    model, processor = tiny_model("zoo_llava"), tiny_processor("zoo_llava")
    model.push_to_hub("someone/model")
    processor.push_to_hub("someone/model")
    names = {path.name for path in repository.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "README.md"} <= names
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert {"llava.py", "modeling_vlm.py", "processing_vlm.py", "image_processing_vlm.py"} <= names
    assert {"configuration_vlm.py", "parts_vlm.py"} <= names
    again = AutoModelForImageTextToText.from_pretrained(repository)
    assert type(AutoProcessor.from_pretrained(repository)) is type(processor)
    ids = torch.tensor([[70, 71, 72]])
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
