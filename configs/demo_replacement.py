"""The joint CLT of the demo VLM that a replacement model is made of: trained on answers too, and longer.

    python capture/run.py --model examples/shapes/model --max-samples 19000 --generate 64 --out runs/replacement/store
    python train.py --config configs/demo_replacement.py --store runs/replacement/store --out runs/replacement/all
    cltjax export runs/replacement/all --out runs/replacement/clt
    python evaluate.py --clt runs/replacement/clt --model examples/shapes/model --store runs/replacement/store \\
        --max-samples 5000

A replacement model reads its features at the tokens of its own answers as well, hence `--generate`; and what it says
is decided at text tokens, of which a prompt has few beside its image: half of every batch are text. 2,560,000 tokens:
under 15 minutes of training on two cores, also with `--model.k 4 --steps 8000`. Figures are in docs/clt.md, under
Fidelity.
"""

from cltjax.config import ModelConfig, SparsityConfig, TokensConfig, TrainConfig

config = TrainConfig(
    layer="all",
    offset=0,
    steps=5000,
    batch_size=512,
    lr=4e-3,
    model=ModelConfig(features=1024, k=16, activation="batchtopk", slots=32),
    sparsity=SparsityConfig(revive=6e-5, dead_after=20_000),
    tokens=TokensConfig(image_share=0.5),
)
