"""Workers of a sweep that believe in GPUs: what each would see is written down, and it trains on the CPU."""

import json
import os
from pathlib import Path

from spectraformer.sweep import worker

VISIBLE = "CUDA_VISIBLE_DEVICES"


def serve(text, log):
    """A worker process, see spectraformer.sweep.worker.serve; it runs in a process of its own."""
    told = json.loads(text)
    seen = {"device": told["device"], "visible": os.environ[VISIBLE], "shared": told["shared"]}
    (Path(told["runs"]).parent / f"seen.{os.getpid()}.json").write_text(json.dumps(seen))
    worker.device_identity = lambda device: f"GPU {os.environ[VISIBLE]}"
    worker.serve(json.dumps(told | {"device": "cpu"}), log)
