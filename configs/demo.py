"""The layer-0 CLT of the bundled demo VLM.

python capture/run.py --model examples/shapes/model
python train.py --config configs/demo.py
python evaluate.py --clt runs/L0 --store activations --ridge
"""

from cltjax.config import ModelConfig, TrainConfig

config = TrainConfig(layer="0", steps=2000, batch_size=512, lr=4e-3, model=ModelConfig(features=1024, k=16))
