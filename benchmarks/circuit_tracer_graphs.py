"""Are our attribution graphs circuit-tracer's?

    python -m benchmarks.circuit_tracer_graphs write FOLDER        # here: models, CLTs, and the graphs that we make
    OTHER/bin/python benchmarks/circuit_tracer_graphs.py check FOLDER     # where circuit-tracer is installed

circuit-tracer needs packages of its own: pip install circuit-tracer nnsight==0.6.1 transformers==4.57.3 torch.

Cases are text-only Llamas, and LLaVAs with an image. circuit-tracer knows no images: of a LLaVA it gets the language
model, with the projected image features as further rows of `embed_tokens` and ids V, V + 1, ... where the image stands.
It knows no topk either: a topk CLT is exported with thresholds, and both programs use what was exported.

For each case `check` prints, as shares of the largest value: the largest differences of logits, of activations, of the
logits' probabilities, of all edges, and of the edges from features, errors and embeddings alone (shares of the largest
of their kind); the differences of replacement and completeness; and how many nodes only one of the two has, before and
after pruning at .8 and .98. It exits with 1 where a difference is above 1e-4 or a node is another.

    OTHER/bin/python benchmarks/circuit_tracer_graphs.py time FOLDER BATCH     # used by benchmarks/attribution.py

times circuit-tracer on FOLDER/llama and FOLDER/tracer with the token ids of FOLDER/ids.safetensors.
"""

import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from capture.vlm import VLM, Encoded
    from cltjax.clt_directory import Description, Site

MOST = 1e-4
SHARES = 0.8, 0.98  # of prune_graph
KINDS = ("features", "errors", "embeddings")  # by number, as in cltjax/replacement/graph.py
PACKAGES = ("circuit-tracer", "nnsight", "transformers", "torch")
# Of each case: which model, (activation, sources, offset, n_targets, site), and next tokens that are given.
CASES: dict[str, tuple[str, tuple[str, tuple[int, ...], int, int, "Site"], tuple[int, ...]]] = {
    "llama-joint": ("llama", ("jumprelu", (0, 1, 2, 3, 4), 0, 16, "mlp_in"), ()),
    "llama-resid": ("llama", ("jumprelu", (0, 1, 2, 3, 4), 0, 16, "resid_mid"), ()),
    "llama-window": ("llama", ("relu", (1, 3), 0, 2, "mlp_in"), (5, 71, 2)),
    "llama-topk": ("llama", ("topk", (0, 1, 2), 1, 2, "mlp_in"), ()),
    "llava-joint": ("llava", ("jumprelu", (0, 1, 2, 3, 4, 5), 0, 16, "mlp_in"), ()),
    "llava-topk": ("llava", ("topk", (0, 2, 3), 0, 2, "mlp_in"), (3, 50)),
    "demo-joint": ("demo", ("jumprelu", (0, 1, 2, 3, 4, 5), 0, 16, "mlp_in"), ()),
}
FEATURES, TOKENS, VOCABULARY = 53, 13, 97
QUESTION = "USER: <image>\nWhat color is the middle right thing? ASSISTANT:"

# Here ---------------------------------------------------------------------------------------------------------------


def write(folder: Path) -> None:
    """Of each case a folder: llama/, tracer/ (the CLT as circuit-tracer reads it), ours.safetensors."""
    torch.set_num_threads(1)
    prompts = {"llama": text_only(), "llava": with_image(), "demo": with_image("examples/shapes/model")}
    for name, (model, (kind, sources, offset, n_targets, site), given) in CASES.items():
        vlm, encoded = prompts[model]
        described = describe(vlm, FEATURES, kind, sources, offset, n_targets, site)
        write_case(folder / name, vlm, encoded, described, given)
        print(f"{folder / name}: written", flush=True)


def write_case(folder: Path, vlm: "VLM", encoded: "Encoded", described: "Description", given: tuple[int, ...]) -> None:
    """One case, with a random CLT."""
    from capture.inputs import IMAGE
    from cltjax.circuit_tracer import import_circuit_tracer, topk_thresholds, write_circuit_tracer
    from cltjax.clt_directory import CLTDirectory, write_clt
    from cltjax.replacement.attribution import attribute
    from cltjax.replacement.clt import CLT
    from cltjax.replacement.graph import FEATURE, LOGIT, prune
    from cltjax.replacement.local import linearise
    from cltjax.replacement.targets import likeliest, tokens

    write_clt(folder / "clt", described, random_weights(described).items())
    path, thresholds = folder / "clt", None
    if described.activation.kind == "topk":
        clt = CLT.from_pretrained(path)
        found = vlm.trace(vlm.collate([encoded]), described.site, described.sources).site
        h = {at: clt.pre_activations(at, x[0]).numpy() for at, x in zip(described.sources, found, strict=True)}
        thresholds = topk_thresholds(described, lambda source: [h[source]])
    write_circuit_tracer(CLTDirectory.open(path), folder / "tracer", thresholds)
    if thresholds is not None:
        path = folder / "imported"
        exported, files = import_circuit_tracer(folder / "tracer")
        write_clt(path, exported, files)
    local = linearise(vlm, CLT.from_pretrained(path), encoded)
    graph = attribute(local, tokens(local, given) if given else likeliest(local))
    pruned, ids, features = prune(graph, *SHARES), encoded["input_ids"][0], graph.of(FEATURE)
    embeddings = vlm.base.get_input_embeddings()  # type: ignore[operator]
    is_image = torch.from_numpy(vlm.modality(ids[None])[0] == IMAGE)
    known = ids.clone()
    known[is_image] = embeddings.num_embeddings + torch.arange(int(is_image.sum()))
    save_llama(vlm, folder / "llama", len(known) + embeddings.num_embeddings)
    with torch.no_grad():
        logits = vlm.model(**vlm.collate([encoded]), use_cache=False).logits[0, -1]
    scores = graph.scores()
    save_file(
        {
            "ids": known.numpy(),
            "images": local.entering.embedded[0][is_image].numpy(),
            "logits": logits.numpy(),
            "given": np.array(given, np.int64),
            "explained": graph.nodes.number[graph.of(LOGIT)],
            "kind": graph.nodes.kind,
            "features": np.stack([getattr(graph.nodes, name)[features] for name in ("layer", "position", "number")], 1),
            "values": graph.nodes.value,
            "edges": graph.edges.toarray(),
            "scores": np.array([scores["replacement"], scores["completeness"]]),
            "kept": np.isin(graph.ids(), pruned.graph.ids()),
        },
        folder / "ours.safetensors",
    )


def text_only() -> tuple["VLM", "Encoded"]:
    """A tiny Llama with random weights, and a prompt of TOKENS tokens."""
    torch.manual_seed(0)
    vlm = random_llama(width=24, layers=5, heads=4, vocabulary=VOCABULARY)
    return vlm, random_prompt(vlm, TOKENS)


def random_llama(width: int, layers: int, heads: int, vocabulary: int) -> "VLM":
    from types import SimpleNamespace

    from transformers import LlamaConfig, LlamaForCausalLM

    from capture.vlm import wrap

    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "vocab_size": vocabulary}
    config: Any = LlamaConfig(**shape, bos_token_id=0, eos_token_id=1, pad_token_id=2)  # type: ignore[arg-type]
    llama: Any = LlamaForCausalLM(config)
    randomise(llama)
    words = SimpleNamespace(pad_token_id=2, all_special_ids=[0, 1, 2], decode=lambda ids, **_: f"w{ids[0]}")
    return wrap(llama, SimpleNamespace(tokenizer=words), "llama")


def random_prompt(vlm: "VLM", length: int) -> "Encoded":
    """A first token that is special (circuit-tracer puts one there otherwise), and words."""
    ids = torch.randint(3, vlm.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    ids[0, 0] = 0
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def with_image(model: str | None = None) -> tuple["VLM", "Encoded"]:
    """A VLM, or a LLaVA of the demo's shape with random weights, and a question about a picture."""
    import random

    from transformers import LlavaForConditionalGeneration

    from capture.vlm import load, wrap
    from examples.shapes.scenes import random_scene_of, render
    from examples.shapes.vlm import build_config, build_processor

    if model is None:
        torch.manual_seed(0)
        llava: Any = LlavaForConditionalGeneration(build_config())
        randomise(llava)
        vlm = wrap(llava, build_processor(), "llava")
    else:
        vlm = load(model, "float32", "cpu")
    rng = random.Random(0)
    return vlm, vlm.encode(QUESTION, render(random_scene_of("test", rng), rng))


def randomise(model: Any) -> None:
    """Weights at which no part is without effect: MLPs and attention write as much as they read, norms have gains."""
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.data.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)


def describe(
    vlm: "VLM",
    n_features: int,
    kind: str,
    sources: tuple[int, ...],
    offset: int,
    n_targets: int,
    site: "Site",
    k: int = 7,
) -> "Description":
    from cltjax.clt_directory import Activation, Description

    shape = {"n_layers": vlm.n_layers, "d_model": vlm.d_model}
    model = {"id": vlm.name, "revision": vlm.revision, "class": vlm.class_name, **shape}
    active = Activation(kind, (k,) * len(sources) if kind == "topk" else (), kind)  # type: ignore[arg-type]
    return Description(model, site, n_features, sources, offset, n_targets, active, "joint", "float32")


def random_weights(described: "Description", seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Files of a CLT directory; some features in twenty are above their thresholds."""
    rng = np.random.default_rng(seed)
    files = {
        name: {
            key: (rng.standard_normal(size, np.float32) / np.float32(described.d_model**0.5))
            for key, size in of.items()
        }
        for name, of in described.files.items()
    }
    for tensors in files.values():
        for key in tensors:
            if key.startswith("threshold"):
                tensors[key] = 1 + np.abs(tensors[key])
    return files


def save_llama(vlm: "VLM", folder: Path, words: int) -> None:
    """The language model as a LlamaForCausalLM, with a tokenizer of so many words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model: Any = vlm.model
    config = vlm.config.get_text_config(decoder=True)
    llama: Any = LlamaForCausalLM(config)
    llama.model.load_state_dict(getattr(model.model, "language_model", model.model).state_dict())
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    llama.save_pretrained(folder)
    ids = {name: getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    spelled: Any = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w3"))  # type: ignore[call-arg]
    spelled.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {f"{name}_token": f"w{one}" for name, one in ids.items()}
    PreTrainedTokenizerFast(tokenizer_object=spelled, **special).save_pretrained(folder)
    about = folder / "tokenizer_config.json"  # transformers 5 names a class that transformers 4 does not have
    about.write_text(json.dumps(json.loads(about.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))


# Where circuit-tracer is --------------------------------------------------------------------------------------------


def load_model(folder: Path) -> Any:
    """circuit-tracer's replacement model of folder/llama and folder/tracer."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from circuit_tracer import ReplacementModel  # type: ignore[import-not-found]

    paths = (str((folder / name).resolve()) for name in ("llama", "tracer"))
    return ReplacementModel.from_pretrained(*paths, backend="nnsight", device=torch.device("cpu"))


def check(folder: Path) -> int:
    """Print all differences; the exit status."""
    print(", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES), f"Python {platform.python_version()}")
    wrong = []
    for name in CASES:
        report = differences(load_file(folder / name / "ours.safetensors"), theirs_of(folder / name))
        short = {key: float(f"{value:.1e}") if isinstance(value, float) else value for key, value in report.items()}
        print(json.dumps({"case": name} | short), flush=True)
        if is_wrong(report):
            wrong.append(name)
    print(f"limit {MOST}: " + (f"{', '.join(wrong)} above" if wrong else f"all {len(CASES)} cases within"))
    return 1 if wrong else 0


def theirs_of(folder: Path) -> dict[str, np.ndarray]:
    """What ours.safetensors holds, as circuit-tracer finds it."""
    from circuit_tracer import attribute  # type: ignore[import-not-found]
    from circuit_tracer.graph import compute_graph_scores, prune_graph  # type: ignore[import-not-found]

    ours = load_file(folder / "ours.safetensors")
    model, ids = load_model(folder), torch.from_numpy(ours["ids"])
    if len(ours["images"]):
        rows = model.embed_weight
        rows.data = torch.cat([rows.data, torch.from_numpy(ours["images"])])
    given = torch.from_numpy(ours["given"]) if len(ours["given"]) else None
    graph = attribute(ids, model, attribution_targets=given, batch_size=64)
    logits, _ = model.get_activations(ids)
    n, layers = len(graph.active_features), int(graph.cfg.n_layers)
    rest = (layers + 1) * len(ids)
    explained = graph.logit_token_ids.numpy()
    values = np.concatenate([graph.activation_values.detach().numpy(), np.zeros(rest), graph.logit_probabilities])
    return {
        "logits": logits[0, -1].detach().numpy(),
        "explained": explained,
        "kind": np.repeat([0, 1, 2, 3], [n, layers * len(ids), len(ids), len(explained)]),
        "features": graph.active_features.numpy(),
        "values": values,
        "edges": graph.adjacency_matrix.numpy(),
        "scores": np.array(compute_graph_scores(graph)),
        "kept": prune_graph(graph, *SHARES).node_mask.numpy(),
    }


def differences(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, Any]:
    """By name: counts of nodes, and largest differences as shares of the largest value of circuit-tracer's."""
    kind, n = theirs["kind"], int((theirs["kind"] == 0).sum())
    mine, other = ({tuple(row) for row in one["features"].tolist()} for one in (ours, theirs))
    other ^= mine
    same = np.array_equal(ours["explained"], theirs["explained"]) and not other
    report: dict[str, Any] = {"features": n, "logits": int((kind == 3).sum()), "other_features": len(other)}
    report["other_logits"] = int(not np.array_equal(ours["explained"], theirs["explained"]))
    report["final_logits"] = largest(ours["logits"], theirs["logits"])
    if not same:
        return report
    report["activations"] = largest(ours["values"][:n], theirs["values"][:n])
    report["probabilities"] = largest(ours["values"][kind == 3], theirs["values"][kind == 3])
    report["edges"] = largest(ours["edges"], theirs["edges"])
    for number, name in enumerate(KINDS):
        report[f"edges_from_{name}"] = largest(*(one["edges"][:, kind == number] for one in (ours, theirs)))
    report["edges_to_logits"] = largest(*(one["edges"][kind == 3] for one in (ours, theirs)))
    report["scores"] = [round(float(one), 4) for one in theirs["scores"]]
    report["scores_off"] = float(np.abs(ours["scores"] - theirs["scores"]).max())
    report["kept"] = int(theirs["kept"].sum())
    report["other_kept"] = int((ours["kept"] != theirs["kept"]).sum())
    return report


def is_wrong(report: dict[str, Any]) -> bool:
    off = [value for value in report.values() if isinstance(value, float)]
    return any(value > MOST for value in off) or any(value for name, value in report.items() if name[:5] == "other")


def largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def timed(folder: Path, batch: int) -> None:
    """Print as JSON the seconds and the peak of memory of one graph with all active features."""
    from circuit_tracer import attribute  # type: ignore[import-not-found]

    model, ids = load_model(folder), torch.from_numpy(load_file(folder / "ids.safetensors")["ids"])
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    wall, cpu = time.perf_counter(), time.process_time()
    graph = attribute(ids, model, batch_size=batch)
    found = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    versions = {name: metadata.version(name) for name in PACKAGES}
    rows = len(graph.active_features) + len(graph.logit_targets)
    print(json.dumps(found | {"growth": memory("VmHWM") - before, "rows": rows, "versions": versions}))


def memory(name: str) -> float:
    """GB of this process: VmRSS, what is resident; VmHWM, its peak since it was last reset (`clear_refs`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    what, where, *more = sys.argv[1:]
    if what == "write":
        Path(where).mkdir(parents=True, exist_ok=True)
        write(Path(where))
    elif what == "check":
        sys.exit(check(Path(where)))
    else:
        timed(Path(where), int(more[0]))
