"""The layer-0 CLT of the bundled demo VLM: its features are read off layer 0's MLP input and write to layers 1 to 5.

    python capture/run.py --model examples/shapes/model
    python train.py --config configs/demo.py
    python evaluate.py --clt runs/L0 --store activations --ridge

1,024,000 tokens, under a minute on two idle cores. On 21,941 test rows, FVU of targets 1 to 5 (ridge regression from
the same input): .033 (.195), .111 (.262), .156 (.335), .354 (.549), .335 (.492); mean .198 (.367); L0 15.6, 28 % dead.
"""

from cltjax.config import ModelConfig, TrainConfig

config = TrainConfig(layer="0", steps=2000, batch_size=512, lr=4e-3, model=ModelConfig(features=1024, k=16))
