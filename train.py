"""Train a cross-layer transcoder: python train.py --layer 0 [--store activations] [--config configs/x.py] ..."""

from cltjax.command import run
from cltjax.config import TrainConfig, read_config_file


def work(config: TrainConfig) -> None:
    """Train a cross-layer transcoder on an activation store, and measure it on the store's test rows."""
    from cltjax.evaluation import train_and_measure

    train_and_measure(config)


if __name__ == "__main__":
    run(TrainConfig, work, default=read_config_file)
