"""All layers of the bundled demo VLM, jointly: every source writes to its own layer and all later ones.

    python capture/run.py --model examples/shapes/model --max-samples 19000
    python train.py --config configs/demo_joint.py
    python evaluate.py --clt runs/L0-5 --store activations

1,331,200 tokens, 178 s of training on two idle cores, under four minutes with start-up, validation and measuring. On
105,107 test rows, FVU of targets 0 to 5: .0034, .0077, .0127, .0174, .0317, .0270; mean .0167 (text .027, image .011);
slopes 1.000 to 1.001; L0 15.5 a source; 0.2 to 1.1 % dead, mean 0.5 %.
"""

from cltjax.config import ModelConfig, SparsityConfig, TrainConfig

config = TrainConfig(
    layer="all",
    offset=0,
    steps=2600,
    batch_size=512,
    lr=4e-3,
    model=ModelConfig(features=1024, k=16),
    sparsity=SparsityConfig(revive=2e-4, dead_after=20_000),
)
