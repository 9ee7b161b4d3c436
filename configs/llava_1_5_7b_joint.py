"""LLaVA-1.5-7B, all layers together, each writing to its own and all later ones. Eight GPUs with 80 GB each.

    python capture/run.py --model llava-hf/llava-1.5-7b-hf --dataset questions.json --image-dir images \
        --generate 64 --image-tokens 0.25
    python train.py --config configs/llava_1_5_7b_joint.py --store activations
    python evaluate.py --clt runs/L0-31 --store activations

No such run has been made yet. The rule, batchtopk with room for 2 k features of a token, is the best but
one on the demo VLM, where the weight of `revive` was chosen too (docs/training.md): the best, jumprelu, needs twice the
room, and its penalty is slow to settle at a low rate. Nothing has been compared at this size.

What it needs, computed; where disks are slower than the store's rate, they set the time:

    cltjax estimate --config configs/llava_1_5_7b_joint.py
    model       sources 0-31 -> targets 0-31, F=8192, 32 slots
    parameters  18,790,875,136: encoder 1,073,741,824, decoder 17,716,740,096, biases 393,216
    memory      51.1 GiB on each of 1x8 devices
    a token     3.1 GFLOP, 512.0 KiB from the store
    a step      4,096 tokens: 391.7 ms, at least 52.6 ms
    the run     20,000 steps, 81,920,000 tokens: 2.2 h, at least 17.5 min
    the store   39.1 TiB read, 5.48 GB/s at 10,457 tokens/s; 488.3 GiB per million rows
    checkpoint  210.0 GiB; the last and the best are kept
    assumed     400.0 TFLOP/s, 3.0 TB/s of memory,
                3.0 TB/s in rows at random places, top-k of 46.9 Gnumbers/s, 450.0 GB/s between devices

A machine with fewer GPUs can train the layers in turn (--given), or a shorter window (--n-targets).
"""

from cltjax.config import DataConfig, LogConfig, ModelConfig, SparsityConfig, TokensConfig, TrainConfig
from cltjax.estimate import ModelShape

model_shape = ModelShape(n_layers=32, d_model=4096)
config = TrainConfig(
    layer="all",
    offset=0,
    n_targets=32,
    batch_size=4096,
    steps=20_000,
    warmup=1000,
    dtype="bfloat16",
    mesh="1x8",
    model=ModelConfig(features=8192, k=16, activation="batchtopk", slots=32),
    sparsity=SparsityConfig(revive=6e-5),
    tokens=TokensConfig(image_share=0.5),
    data=DataConfig(buffer_mib=32768),
    log=LogConfig(checkpoint_every=2000, val_rows=4096),
)
