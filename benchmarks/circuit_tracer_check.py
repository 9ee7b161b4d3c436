"""Does circuit-tracer take what `cltjax export --circuit-tracer` writes, and find the same features with it?

    python -m benchmarks.circuit_tracer_check write FOLDER     # here: a tiny Llama, a CLT, what it does to a prompt
    OTHER/bin/python benchmarks/circuit_tracer_check.py check FOLDER     # where circuit-tracer is installed

circuit-tracer needs packages of its own: pip install circuit-tracer nnsight==0.6.1 transformers==4.57.3 torch.
For each kind of activation and window it prints the largest difference of pre-activations and of reconstructions, as
shares of the largest value, and exits with 1 where one is above 1e-4 or another feature is active.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

D, F, LAYERS, VOCABULARY, TOKENS = 24, 53, 5, 97, 13
CASES = {"jumprelu": ((0, 1, 2, 3, 4), 0, 16), "relu": ((1, 3), 0, 2), "topk": ((0, 1, 2), 1, 2)}
MOST = 1e-4


def write(folder: Path) -> None:
    """The Llama, the CLTs in circuit-tracer's form, and by case what our CLT makes of the Llama's activations."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from cltjax.circuit_tracer import topk_thresholds, write_circuit_tracer
    from cltjax.clt_directory import Activation, CLTDirectory, Description, write_clt
    from cltjax.replacement.clt import CLT

    torch.manual_seed(0)
    shape = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    shape |= {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    llama = cast(Any, LlamaForCausalLM)(cast(Any, LlamaConfig)(**shape))
    llama.save_pretrained(folder / "llama")
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", pad_token="w2", unk_token="w2"
    ).save_pretrained(folder / "llama")
    about = folder / "llama/tokenizer_config.json"  # transformers 5 names a class that transformers 4 does not have
    about.write_text(json.dumps(json.loads(about.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    ids = torch.randint(3, VOCABULARY, (1, TOKENS))
    x: list[torch.Tensor] = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args: x.append(args[0][0].detach()))
        for layer in llama.model.layers
    ]
    with torch.no_grad():
        llama(ids)
    for handle in handles:
        handle.remove()
    found: dict[str, np.ndarray] = {"ids": ids.numpy(), "x": torch.stack(x).numpy()}
    rng = np.random.default_rng(0)
    model = {"id": "llama", "revision": None, "class": "LlamaForCausalLM", "n_layers": LAYERS, "d_model": D}
    for kind, (sources, offset, n_targets) in CASES.items():
        active = Activation(kind, (5,) * len(sources) if kind == "topk" else (), kind)  # type: ignore[arg-type]
        described = Description(model, "mlp_in", F, sources, offset, n_targets, active, "joint", "float32")
        files = {
            name: {key: np.abs(w) if key.startswith("threshold") else w for key, w in tensors.items()}
            for name, tensors in (
                (name, {key: rng.normal(size=size).astype(np.float32) for key, size in sizes.items()})
                for name, sizes in described.files.items()
            )
        }
        write_clt(folder / kind / "clt", described, files.items())
        directory = CLTDirectory.open(folder / kind / "clt")
        clt = CLT.from_pretrained(directory.path)
        thresholds = None
        h = {layer: clt.pre_activations(layer, x[layer]).numpy() for layer in sources}
        if kind == "topk":
            thresholds = topk_thresholds(described, partial(pieces, h))
        write_circuit_tracer(directory, folder / kind / "tracer", thresholds)
        codes = np.zeros((LAYERS, TOKENS, F), np.float32)
        y_hat = np.zeros((LAYERS, TOKENS, D), np.float32)
        for layer in sources:
            limit = files[f"W_enc_{layer}.safetensors"].get(f"threshold_{layer}", np.zeros(F))
            limit = limit if thresholds is None else thresholds[layer]
            codes[layer] = np.where(h[layer] > limit, h[layer], 0)
            for j, target in enumerate(described.wiring.targets_of(layer)):
                y_hat[target] += codes[layer] @ files[f"W_dec_{layer}.safetensors"][f"W_dec_{layer}"][:, j]
        for target in described.wiring.targets:
            y_hat[target] += files["b_dec.safetensors"][f"b_dec_{target}"]
        found |= {f"{kind}.codes": codes, f"{kind}.y_hat": y_hat}
    save_file(found, folder / "expected.safetensors")


def pieces(h: dict[int, np.ndarray], layer: int) -> list[np.ndarray]:
    return [h[layer]]


def check(folder: Path) -> int:
    """Compare with what circuit-tracer finds in its replacement model; the exit status."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from circuit_tracer import ReplacementModel  # type: ignore[import-not-found]

    expected, wrong = load_file(folder / "expected.safetensors"), []
    ids = torch.from_numpy(expected["ids"])[0]
    for kind in CASES:
        model = ReplacementModel.from_pretrained(
            str((folder / "llama").resolve()), str((folder / kind / "tracer").resolve()), backend="nnsight"
        )
        _, acts = model.get_activations(ids)
        codes = acts.to_dense() if acts.is_sparse else acts
        with torch.no_grad():
            y_hat = model.transcoders.decode(codes.to_sparse())
        theirs = {"codes": codes.float().detach().numpy(), "y_hat": y_hat.float().detach().numpy()}
        # It zeroes the first position; leave it out.
        report: dict[str, Any] = {"case": kind}
        for name, value in theirs.items():
            ours = expected[f"{kind}.{name}"][:, 1:]
            report[name] = float(np.abs(value[:, 1:] - ours).max() / np.abs(ours).max())
        report["active"] = int((expected[f"{kind}.codes"][:, 1:] > 0).sum())
        report["others"] = int(((theirs["codes"] > 0) != (expected[f"{kind}.codes"] > 0))[:, 1:].sum())
        print(json.dumps(report))
        if max(report["codes"], report["y_hat"]) > MOST or report["others"]:
            wrong.append(kind)
    return 1 if wrong else 0


if __name__ == "__main__":
    what, where = sys.argv[1:]
    Path(where).mkdir(parents=True, exist_ok=True)
    sys.exit(check(Path(where)) if what == "check" else write(Path(where)))
