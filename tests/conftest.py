"""Shared by all tests: nothing may depend on the machine's number of threads or on leftover random state."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
