"""Command line of the capture: parse and call."""

import os

# The model's idle threads must not spin on cores that prepare images and write shards. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from capture.config import CaptureConfig
from capture.recorder import capture
from cltjax.command import run

if __name__ == "__main__":
    run(CaptureConfig, capture)
