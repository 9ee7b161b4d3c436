"""Command line of the capture: parse and call."""

from capture.config import CaptureConfig
from capture.recorder import capture
from cltjax.command import run

if __name__ == "__main__":
    run(CaptureConfig, capture)
