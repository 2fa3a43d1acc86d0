"""The tests import the project from its root. No deadlines: machines differ; CI always draws alike."""
import os
import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # "the same, bit for bit" is said of a CPU

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; run by -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"
