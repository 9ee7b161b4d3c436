"""benchmarks/circuit_tracer_graphs.py: our graphs are circuit-tracer's, where it is installed; differences show."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks import circuit_tracer_graphs as graphs

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
OTHER = os.environ.get("CLTJAX_CIRCUIT_TRACER")


@pytest.mark.skipif(not OTHER, reason="CLTJAX_CIRCUIT_TRACER names no python where circuit-tracer is installed")
def test_our_graphs_are_circuit_tracers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    graphs.write(tmp_path)
    command = [str(OTHER), "benchmarks/circuit_tracer_graphs.py", "check", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"all {len(graphs.CASES)} cases within" in done.stdout


def found() -> dict[str, np.ndarray]:
    """Two features, an error, two embeddings, two logits."""
    rng = np.random.default_rng(0)
    return {
        "logits": rng.normal(size=11),
        "explained": np.array([3, 7]),
        "kind": np.array([0, 0, 1, 2, 2, 3, 3]),
        "features": np.array([[0, 1, 5], [1, 2, 3]]),
        "values": rng.random(7),
        "edges": rng.normal(size=(7, 7)),
        "scores": np.array([0.4, 0.7]),
        "kept": np.array([True, False, True, True, True, True, True]),
    }


@pytest.mark.parametrize(
    ("name", "place", "change", "told"),
    [
        ("logits", 4, 0.01, "final_logits"),
        ("values", 0, 0.01, "activations"),
        ("values", 6, 0.01, "probabilities"),
        ("edges", (0, 1), 0.01, "edges_from_features"),
        ("edges", (0, 2), 0.01, "edges_from_errors"),
        ("edges", (5, 4), -0.01, "edges_to_logits"),
        ("scores", 1, 0.001, "scores_off"),
        ("kept", 1, True, "other_kept"),
        ("features", (1, 2), 1, "other_features"),
        ("explained", 0, 1, "other_logits"),
    ],
)
def test_a_difference_is_told(name: str, place: int | tuple[int, int], change: float, told: str) -> None:
    ours, theirs = found(), found()
    assert not graphs.is_wrong(graphs.differences(ours, theirs))
    ours[name][place] += change
    report = graphs.differences(ours, theirs)
    assert graphs.is_wrong(report) and report[told] > graphs.MOST
