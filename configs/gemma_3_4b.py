"""Gemma-3-4B, all layers together, each writing to its own and the next seven. One GPU with 80 GB.

    python capture/run.py --model google/gemma-3-4b-it --dataset questions.json --image-dir images \
        --generate 64 --image-tokens 0.25
    python train.py --config configs/gemma_3_4b.py --store activations
    python evaluate.py --clt runs/L0-33 --store activations

No such run has been made yet. The rule, batchtopk with room for 2 k features of a token, is the best but
one on the demo VLM, where the weight of `revive` was chosen too (docs/training.md): the best, jumprelu, needs twice the
room, and its penalty is slow to settle at a low rate. Nothing has been compared at this size.

What it needs, computed; where disks are slower than the store's rate, they set the time:

    cltjax estimate --config configs/gemma_3_4b.py
    model       sources 0-33 -> targets 0-33, F=4096, 32 slots
    parameters  2,915,267,584: encoder 356,515,840, decoder 2,558,525,440, biases 226,304
    memory      52.5 GiB on the device
    a token     1.0 GFLOP, 340.0 KiB from the store
    a step      2,048 tokens: 316.7 ms, at least 52.7 ms
    the run     40,000 steps, 81,920,000 tokens: 3.5 h, at least 35.2 min
    the store   25.9 TiB read, 2.25 GB/s at 6,467 tokens/s; 324.2 GiB per million rows
    checkpoint  32.6 GiB; the last and the best are kept
    assumed     400.0 TFLOP/s, 3.0 TB/s of memory,
                3.0 TB/s in rows at random places, top-k of 46.9 Gnumbers/s
"""

from cltjax.config import DataConfig, LogConfig, ModelConfig, SparsityConfig, TokensConfig, TrainConfig
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
    model=ModelConfig(features=4096, k=16, activation="batchtopk", slots=32),
    sparsity=SparsityConfig(revive=6e-5),
    tokens=TokensConfig(image_share=0.5),
    data=DataConfig(buffer_mib=32768),
    log=LogConfig(checkpoint_every=2000, val_rows=4096),
)
