"""Qwen2.5-VL-7B, all layers together, each writing to its own and the next fifteen. Four GPUs with 80 GB each.

    python capture/run.py --model Qwen/Qwen2.5-VL-7B-Instruct --dataset questions.json --image-dir images \
        --generate 64 --image-tokens 0.25
    python train.py --config configs/qwen2_5_vl_7b.py --store activations
    python evaluate.py --clt runs/L0-27 --store activations

No such run has been made yet. The rule, batchtopk with room for 2 k features of a token, is the best but
one on the demo VLM, where the weight of `revive` was chosen too (docs/training.md): the best, jumprelu, needs twice the
room, and its penalty is slow to settle at a low rate. Nothing has been compared at this size.

What it needs, computed; where disks are slower than the store's rate, they set the time:

    cltjax estimate --config configs/qwen2_5_vl_7b.py
    model       sources 0-27 -> targets 0-27, F=8192, 32 slots
    parameters  10,452,535,296: encoder 822,083,584, decoder 9,630,121,984, biases 329,728
    memory      52.8 GiB on each of 1x4 devices
    a token     2.3 GFLOP, 392.0 KiB from the store
    a step      4,096 tokens: 352.2 ms, at least 55.3 ms
    the run     20,000 steps, 81,920,000 tokens: 2.0 h, at least 18.4 min
    the store   29.9 TiB read, 4.67 GB/s at 11,630 tokens/s; 373.8 GiB per million rows
    checkpoint  116.8 GiB; the last and the best are kept
    assumed     400.0 TFLOP/s, 3.0 TB/s of memory,
                3.0 TB/s in rows at random places, top-k of 46.9 Gnumbers/s, 450.0 GB/s between devices
"""

from cltjax.config import DataConfig, LogConfig, ModelConfig, SparsityConfig, TokensConfig, TrainConfig
from cltjax.estimate import ModelShape

model_shape = ModelShape(n_layers=28, d_model=3584)
config = TrainConfig(
    layer="all",
    offset=0,
    n_targets=16,
    batch_size=4096,
    steps=20_000,
    warmup=1000,
    dtype="bfloat16",
    mesh="1x4",
    model=ModelConfig(features=8192, k=16, activation="batchtopk", slots=32),
    sparsity=SparsityConfig(revive=6e-5),
    tokens=TokensConfig(image_share=0.5),
    data=DataConfig(buffer_mib=32768),
    log=LogConfig(checkpoint_every=2000, val_rows=4096),
)
