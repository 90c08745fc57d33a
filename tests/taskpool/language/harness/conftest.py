"""What the tests of the harness's tasks share."""

from pathlib import Path
from typing import Any

import pytest
from fixtures_harness import CHAT, byte_tokenizer, tiny_llama, write_tasks
from lightning.fabric import Fabric
from torch import nn


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def chatting() -> Any:
    return byte_tokenizer(chat=CHAT)


@pytest.fixture(scope="session")
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture(scope="session")
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)
