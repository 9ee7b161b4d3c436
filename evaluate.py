"""Measure a run or a CLT directory on a store's test rows, or a replacement model on held-out samples.

python evaluate.py --clt runs/L0 --store activations [--best] [--ridge]
python evaluate.py --clt clt --model examples/shapes/model [--dataset shapes] [--per-layer]     (--model M --help)
python evaluate.py --clt clt --model examples/shapes/model --graphs 100     attribution graphs     (--graphs N --help)
"""

import os
import sys
from collections.abc import Sequence

from cltjax.command import run
from cltjax.config import EvaluateConfig
from cltjax.replacement.config import FidelityConfig, GraphsConfig


def reconstruct(config: EvaluateConfig) -> None:
    """Measure a run or a CLT directory on the test rows of an activation store. With --model instead of --store:
    measure the model whose MLPs the CLT replaces (evaluate.py --model M --help)."""
    from cltjax.evaluation import evaluate

    evaluate(config)


def replace(config: FidelityConfig) -> None:
    """Measure a replacement model on held-out samples of a data set, beside the original and ablated ones."""
    from cltjax.replacement.fidelity import evaluate_fidelity

    evaluate_fidelity(config)


def attribute(config: GraphsConfig) -> None:
    """Measure attribution graphs on held-out samples of a data set: scores, and whether what they say comes true."""
    from cltjax.replacement.validation import validate

    validate(config)


def main(args: Sequence[str]) -> None:
    def has(option: str) -> bool:
        return any(arg == option or arg.startswith(f"{option}=") for arg in args)

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in capture/run.py
    if has("--graphs"):
        run(GraphsConfig, attribute, args)
    elif has("--model"):
        run(FidelityConfig, replace, args)
    else:
        run(EvaluateConfig, reconstruct, args)


if __name__ == "__main__":
    main(sys.argv[1:])
