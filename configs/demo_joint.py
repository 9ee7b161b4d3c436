"""All layers of the bundled demo VLM, jointly: every source writes to its own layer and all later ones.

    python capture/run.py --model examples/shapes/model --max-samples 19000
    python train.py --config configs/demo_joint.py
    python evaluate.py --clt runs/L0-5 --store activations

921,600 tokens, 117 s of training on two idle cores, 139 s with start-up, validation and measuring. On 105,107 test
rows: mean FVU .0134 (text .022, image .010), worst target .0254; slopes .991 to 1.000; L0 16.0 a source; 1.1 % dead.

Of the rules tried batchtopk is the best but for jumprelu, which has been found since (docs/training.md): .0126 with
--model.activation jumprelu --model.slots 64 --sparsity.revive 1e-4 --sparsity.bandwidth 0.3. Its step takes 1.6 times
as long as topk's. No more than 32 features of a token and source are active while training; 16 % of the tokens of the
source with most reach that.
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
