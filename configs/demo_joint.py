"""All layers of the bundled demo VLM, jointly: every source writes to its own layer and all later ones.

    python capture/run.py --model examples/shapes/model --max-samples 19000
    python train.py --config configs/demo_joint.py
    python evaluate.py --clt runs/L0-5 --store activations

921,600 tokens, 175 s of training on two idle cores of an Intel Xeon, 209 s with start-up, validation and measuring. On
105,107 test rows: mean FVU .0119 (text .020, image .010), worst target .0221; slopes 1.000 to 1.001; L0 15.3 a source;
.8 % dead.

Of all rules jumprelu reconstructs best (docs/training.md). Its penalty is steered until 16 features of a token and
source are active on average. Many more are at first, and on some tokens at the end: hence 64 slots, from which most of
the cost comes. Longer runs come apart (docs/training.md): for them configs/demo_replacement.py has batchtopk.
"""

from cltjax.config import ModelConfig, SparsityConfig, TrainConfig

config = TrainConfig(
    layer="all",
    offset=0,
    steps=1800,
    batch_size=512,
    lr=4e-3,
    model=ModelConfig(features=1024, k=16, activation="jumprelu", slots=64),
    sparsity=SparsityConfig(revive=1e-4, dead_after=20_000),
)
