import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tests run side by side, one on each core; more threads would only wait for each other."""
    torch.set_num_threads(1)
