"""Shared by all tests: nothing may depend on the machine's number of threads or on leftover random state."""

import pytest
import torch

# Tests run side by side in processes; threads on top would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
