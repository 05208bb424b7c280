"""What every test can rely on: one thread per process, no network, and marks that skip themselves.

make test                   # quick tests
make test-all               # slow ones too
make test ARGS='-k wsp'     # some
"""

import os
import socket

# Before torch or numpy is imported: 2 ranks must not start 2 x cores threads, and idle OpenMP threads must not spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault(
    "TOKENIZERS_PARALLELISM", "false"
)  # tokenizers warns when a process forks after using its threads
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks a hub for weights fails at once, on every machine alike
os.environ["MPLBACKEND"] = "Agg"

import pytest

LONGEST = (
    "test_training.py",
    "test_readme.py",
    "test_stores.py",
    "test_duplicates.py",
    "test_restart.py",
    "test_momentum.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that both workers end at the same time; and skip `gpu` tests where torch sees no
    accelerator. torch is imported only when such a test was collected."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on now: for `deepspeed --master_port`, whose own default may be taken."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
