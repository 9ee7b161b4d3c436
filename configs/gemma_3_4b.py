"""Gemma-3-4B, all layers together, each writing to its own and the next seven. One GPU with 80 GB.

    python capture/run.py --model google/gemma-3-4b-it --dataset questions.json --image-dir images \
        --generate 64 --image-tokens 0.25
    python train.py --config configs/gemma_3_4b.py --store activations
    python evaluate.py --clt runs/L0-33 --store activations

No such run has been made yet. What it needs, computed; where disks are slower than the store's rate, they set the time:

    cltjax estimate --config configs/gemma_3_4b.py
    model       sources 0-33 -> targets 0-33, F=4096, 16 slots
    parameters  2,915,267,584: encoder 356,515,840, decoder 2,558,525,440, biases 226,304
    memory      55.3 GiB on the device
    a token     775.8 MFLOP, 340.0 KiB from the store
    a step      2,048 tokens: at least 49.0 ms, 135.0 ms without a cache
    the run     40,000 steps, 81,920,000 tokens: at least 32.6 min, 1.5 h without a cache
    the store   25.9 TiB read, 14.56 GB/s at 41,823 tokens/s; 324.2 GiB per million rows
    checkpoint  32.6 GiB; the last and the best are kept
    assumed     400.0 TFLOP/s and 3.0 TB/s of memory a device
"""

from cltjax.config import DataConfig, LogConfig, ModelConfig, TokensConfig, TrainConfig
from cltjax.estimate import ModelShape

model_shape = ModelShape(n_layers=34, d_model=2560)
config = TrainConfig(
    layer="all",
    offset=0,
    n_targets=8,
    batch_size=2048,
    steps=40_000,
    warmup=1000,
    dtype="bfloat16",
    model=ModelConfig(features=4096, k=16),
    tokens=TokensConfig(image_share=0.5),
    data=DataConfig(buffer_mib=32768),
    log=LogConfig(checkpoint_every=2000, val_rows=4096),
)
