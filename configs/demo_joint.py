"""All layers of the bundled demo VLM, jointly: every source writes to its own layer and all later ones.

    python capture/run.py --model examples/shapes/model --max-samples 19000
    python train.py --config configs/demo_joint.py
    python evaluate.py --clt runs/L0-5 --store activations

921,600 tokens, 132 s of training on two idle cores, under three minutes with start-up, validation and measuring. On
105,107 test rows, FVU of targets 0 to 5: .0029, .0072, .0110, .0153, .0254, .0189; mean .0135 (text .023, image .011);
slopes .994 to .999; L0 16.0 a source; 1.0 % dead. With --steps 2400: 189 s, mean .0121, 0.8 % dead.

batchtopk is the best of the rules tried at this number of active features: at 2,600 steps .0118, where topk has .0167
(benchmarks/quality.py). Its step takes 1.6 times as long as topk's. No more than 32 features of a token and source are
active while training; 18 % of the tokens of the source with most reach that.
"""

from cltjax.config import ModelConfig, SparsityConfig, TrainConfig

config = TrainConfig(
    layer="all",
    offset=0,
    steps=1800,
    batch_size=512,
    lr=4e-3,
    model=ModelConfig(features=1024, k=16, activation="batchtopk", slots=32),
    sparsity=SparsityConfig(revive=6e-5, dead_after=20_000),
)
