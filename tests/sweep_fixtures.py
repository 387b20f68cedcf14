"""A plugin of the tests of sweeps: data, and a folder for runs."""

import pytest

from small_runs import prepared
from spectraformer.tasks.dataset import open_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of all data, with the task that counts digits."""
    folder = tmp_path_factory.mktemp("data")
    prepared(folder / "counting-tiny")
    return folder


@pytest.fixture(scope="module")
def dataset(data):
    return open_dataset(data / "counting-tiny")


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"
