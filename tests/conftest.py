"Real recordings: a test asks for the fixture `test_data` (a Path) and is skipped where they are absent; the summary counts both."
import os
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("IN_TEST", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long grids and kills, run by `make test-long`")


@pytest.fixture(scope="session")
def test_data() -> Path:
    "The folder of real recordings named by SYNAPSE_TEST_DATA."
    root = os.environ.get("SYNAPSE_TEST_DATA")
    if not root or not Path(root).exists():
        pytest.skip("real recordings absent: set SYNAPSE_TEST_DATA to their folder")
    return Path(root)


@pytest.fixture(scope="session")
def repo() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    out = yield
    if "test_data" in getattr(item, "fixturenames", ()):
        out.get_result().user_properties.append(("real_data", True))


def pytest_terminal_summary(terminalreporter):
    def count(kind, when):
        return len({r.nodeid for r in terminalreporter.stats.get(kind, []) if ("real_data", True) in r.user_properties and r.when in when})
    ran = count("passed", ("call",)) + count("failed", ("call",))
    terminalreporter.write_line(f"real-data tests: {ran} ran, {count('skipped', ('setup', 'call'))} skipped")
