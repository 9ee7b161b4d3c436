"""The layer-0 CLT of the bundled demo VLM: its features are read off layer 0's MLP input and write to layers 1 to 5.

    python capture/run.py --model examples/shapes/model
    python train.py --config configs/demo.py
    python evaluate.py --clt runs/L0 --store activations --ridge

1,024,000 tokens, half a minute on two idle cores. On 21,471 test rows, FVU of targets 1 to 5 (ridge regression from the
same input): .033 (.192), .116 (.265), .155 (.336), .379 (.586), .353 (.516); mean .207 (.379); L0 15.8, 1.9 % dead.
"""

from cltjax.config import ModelConfig, SparsityConfig, TrainConfig

config = TrainConfig(
    layer="0",
    steps=2000,
    batch_size=512,
    lr=4e-3,
    model=ModelConfig(features=1024, k=16),
    sparsity=SparsityConfig(revive=2e-4, dead_after=20_000),
)
