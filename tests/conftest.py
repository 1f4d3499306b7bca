"""Put the modules on the path, and leave the slow tests out unless they are asked for."""

import gc
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads only get in the way
# What runs in this process would take a GPU, and inputs of tests are on the CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("EGSPO_TEST_GPU", "")
sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.txt")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


def pytest_collection_finish():
    """What has been imported is no garbage: pytest collects five times at the end, in half a
    million objects of torch and others; a worker that leaves for five seconds is interrupted."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """What tests recorded (record_property), with or without workers: the printed biases."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name:<56} {value}")
