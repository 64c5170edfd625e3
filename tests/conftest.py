"""Settings for all tests: one thread (tiny models gain nothing from two), quiet transformers."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Take what is imported by now out of the garbage collector's sight: transformers, accelerate
    and many tests collect by hand, and each time would walk through all modules."""
    gc.collect()
    gc.freeze()
