"""Measure a trained run on a store's test rows.

python evaluate.py --clt runs/L0 --store activations [--best] [--ridge]
"""

from cltjax.command import run
from cltjax.config import EvaluateConfig


def work(config: EvaluateConfig) -> None:
    """Measure a trained run on the test rows of an activation store."""
    from cltjax.evaluation import evaluate

    evaluate(config)


if __name__ == "__main__":
    run(EvaluateConfig, work)
