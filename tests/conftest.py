"""Settings for every test: one thread a process (workers share the cores), no network, no deadlines of hypothesis."""

import os
from pathlib import Path

# Before torch or transformers is imported, here or in a command that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# A command that a test starts in another folder runs this tree's source too.
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1] / "src")

from hypothesis import settings

# Examples are the same in every run; a busy machine is no failure.
settings.register_profile("fireflyer", deadline=None, derandomize=True)
settings.load_profile("fireflyer")
