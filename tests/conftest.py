"""The tests import the project from its root. No deadlines: machines differ; CI always draws alike."""
import os
import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent.parent))
# "the same, bit for bit" is said of a CPU; tests marked cuda need the GPU: FOLORA_TEST_CUDA=1
if os.environ.get("FOLORA_TEST_CUDA") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

settings.register_profile("local", deadline=None, max_examples=40)  # others each time
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; run by -m slow")
    config.addinivalue_line("markers", "cuda: needs a GPU; run by FOLORA_TEST_CUDA=1 and -m cuda")
    config.option.markexpr = config.option.markexpr or "not slow"
