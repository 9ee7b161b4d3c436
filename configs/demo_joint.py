"""All layers of the bundled demo VLM, jointly: every source writes to its own layer and all later ones.

    python capture/run.py --model examples/shapes/model
    python train.py --config configs/demo_joint.py
    python evaluate.py --clt runs/L0-5 --store activations

RESULT
"""

from cltjax.config import ModelConfig, SparsityConfig, TrainConfig

config = TrainConfig(
    layer="all",
    offset=0,
    steps=2600,
    batch_size=512,
    lr=4e-3,
    model=ModelConfig(features=1024, k=16),
    sparsity=SparsityConfig(revive=3e-3),
)
