"""An offline environment for the tests: set when this is imported, which is before anything that reads it.

Nothing of the person's own caches, tokens or W&B account is seen by a test.
"""

import os
import tempfile
from pathlib import Path

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
# The main process makes the folder; xdist's workers inherit its name and have a sub-folder each.
if WORKER == "main":
    os.environ["DPO_TEST_ROOT"] = tempfile.mkdtemp(prefix="dpo-tests-")
ROOT = Path(os.environ["DPO_TEST_ROOT"])
SCRATCH = ROOT / WORKER

for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
    os.environ.pop(_name, None)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(SCRATCH / "huggingface"),
    "HF_DATASETS_CACHE": str(SCRATCH / "datasets"),
    "DPO_CACHE": str(SCRATCH / "dpo"),
    "WANDB_MODE": "disabled",
    "WANDB_SILENT": "true",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.setdefault("OMP_NUM_THREADS", "1")
