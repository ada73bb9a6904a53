"""pytest's settings: the scripts are importable, tests marked slow run only with --slow."""
import os
import sys
import threading
from pathlib import Path

import pytest
import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on the CPU, where results are exact; also on a machine with a GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are fastest on one thread
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub
tqdm.tqdm.monitor_interval = 0  # no thread of tqdm's: it could hold a lock while a test forks
tqdm.tqdm.set_lock(threading.RLock())  # not shared between processes: one that a test kills could hold it


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
