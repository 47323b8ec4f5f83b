"""One thread per test process, no network, and fresh random inputs whose seed is printed: `--seed N` repeats a run."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported; processes that a test starts inherit it
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import random
import zlib

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("moesaic", deadline=None)
settings.load_profile("moesaic")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of the random inputs; default: a fresh one")
    parser.addoption("--write-pages", action="store_true", help="write the pages of docs/ that tests make")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    terminalreporter.write_line(f"random inputs: --seed {config.option.seed}")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """This test's seed, already given to torch, numpy and random; it depends on --seed and the test's name alone."""
    value = (request.config.option.seed + zlib.crc32(request.node.nodeid.encode())) % 2**31
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)
    return value
