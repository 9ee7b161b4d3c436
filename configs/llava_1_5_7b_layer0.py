"""LLaVA-1.5-7B, layer 0 alone: its features write to layers 1 to 16. One GPU with 80 GB.

    python capture/run.py --model llava-hf/llava-1.5-7b-hf --dataset questions.json --image-dir images \
        --layers 0-16 --generate 64 --image-tokens 0.25
    python train.py --config configs/llava_1_5_7b_layer0.py --store activations
    python evaluate.py --clt runs/L0 --store activations

No such run has been made yet. What it needs, computed; where disks are slower than the store's rate, they set the time:

    cltjax estimate --config configs/llava_1_5_7b_layer0.py
    model       sources 0 -> targets 1-16, F=32768, 32 slots
    parameters  2,281,799,680: encoder 134,217,728, decoder 2,147,483,648, biases 98,304
    memory      44.6 GiB on the device
    a token     281.3 MFLOP, 136.0 KiB from the store
    a step      8,192 tokens: 149.8 ms, at least 42.5 ms
    the run     20,000 steps, 163,840,000 tokens: 49.9 min, at least 14.2 min
    the store   20.8 TiB read, 7.61 GB/s at 54,668 tokens/s; 259.4 GiB per million rows
    checkpoint  25.5 GiB; the last and the best are kept
    assumed     400.0 TFLOP/s, 3.0 TB/s of memory,
                3.0 TB/s in rows at random places, top-k of 46.9 Gnumbers/s

Layer 0 cannot see what attention brings to a token later: expect errors to grow with the distance of the target.
"""

from cltjax.config import DataConfig, LogConfig, ModelConfig, TokensConfig, TrainConfig
from cltjax.estimate import ModelShape

model_shape = ModelShape(n_layers=32, d_model=4096)
config = TrainConfig(
    layer="0",
    offset=1,
    n_targets=16,
    batch_size=8192,
    steps=20_000,
    warmup=1000,
    dtype="bfloat16",
    model=ModelConfig(features=32768, k=32),
    tokens=TokensConfig(image_share=0.5),
    data=DataConfig(buffer_mib=16384),
    log=LogConfig(checkpoint_every=1000, val_rows=8192),
)
