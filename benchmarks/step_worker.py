"""A process that does training steps when it is told to, for benchmarks/train_step.py.

    python -m benchmarks.step_worker ours|dense D F T k B S float32|bfloat16

Each line of its input is a JSON list, a method's name and its arguments; each line of its output what that gives.
"""

import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

Times = list[float]


class Dense:
    """The dense PyTorch step."""

    def __init__(self, D: int, F: int, T: int, k: int, B: int, S: int, dtype: str) -> None:
        import torch

        from benchmarks.dense_step import DenseStep

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.step = DenseStep(D, F, T, k, B, device, bfloat16=dtype == "bfloat16")
        self.versions = f"torch {torch.__version__}"

    def start(self) -> float:
        """Seconds of the first step, compilation included."""
        return timed(self.step)

    def steps(self, n: int) -> Times:
        """Seconds of each of n steps."""
        return [timed(self.step) for _ in range(n)]

    def memory(self) -> dict[str, int]:
        """Bytes at most in use on the device, where that is counted, and by the process."""
        return {"peak": self.step.peak_bytes() or 0, "resident": resident()}


class Ours:
    """cltjax's own step, topk: S sources from layer 0 on that write to their own and later layers, T at most."""

    def __init__(self, D: int, F: int, T: int, k: int, B: int, S: int, dtype: str) -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np

        from cltjax import step
        from cltjax.allocator import keep_freed_memory, will_use_cpu
        from cltjax.config import ModelConfig, TrainConfig
        from cltjax.estimate import ModelShape
        from cltjax.normalisation import Normalisation
        from cltjax.wiring import wire

        if will_use_cpu():
            keep_freed_memory()  # as train.py does
        self.shape = F, k, B, S
        model = ModelConfig(features=F, k=k, activation="topk")
        layer = f"0-{S - 1}" if S > 1 else "0"
        options: dict[str, Any] = {"layer": layer, "offset": 0, "n_targets": T, "batch_size": B, "dtype": dtype}
        self.config = TrainConfig(**options, model=model)
        self.model_shape = ModelShape(max(S, T), D, dtype)
        wiring = wire(layer, max(S, T), 0, T)
        noise, on_mean = np.random.default_rng(0), np.zeros((max(S, T), D), np.float32)
        scales = Normalisation(on_mean[:S], np.ones(S, np.float32), on_mean, np.ones(len(on_mean), np.float32))
        mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        begun = time.perf_counter()
        initial = jax.jit(lambda: step.initial_state(self.config, wiring, scales))()
        self.state = jax.device_put(initial, step.shardings(initial, mesh))
        self.x = jnp.asarray(noise.normal(size=(1, B, S, D)), jnp.dtype(dtype))
        self.y = jnp.asarray(noise.normal(size=(1, B, len(wiring.targets), D)), jnp.dtype(dtype))
        made = step.make_step(self.config, step.graph_of(self.config, wiring, scales), mesh)
        self.compiled = made.lower(self.state, self.x, self.y, ()).compile()  # type: ignore[attr-defined]
        self.optimiser = step.make_optimiser(self.config)
        self.begun = time.perf_counter() - begun
        self.versions = f"jax {jax.__version__}, {jax.devices()[0].device_kind}"
        self.jax = jax

    def step(self) -> float:
        """One optimiser step; the loss."""
        self.state, figures = self.compiled(self.state, self.x, self.y, ())
        return float(figures["loss"])  # waits for the device

    def start(self) -> float:
        """Seconds until the first step is done: initial weights, compilation and that step."""
        return self.begun + timed(self.step)

    def steps(self, n: int) -> Times:
        """Seconds of each of n steps."""
        return [timed(self.step) for _ in range(n)]

    def memory(self) -> dict[str, int]:
        """Bytes that the compiled step needs at once, arguments included; what the bar allows; the process's."""
        F, _, B, S = self.shape
        found = self.compiled.memory_analysis()
        held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        sizes = sum(leaf.size for leaf in self.jax.tree.leaves(self.state.parameters))
        batch = self.x.nbytes + self.y.nbytes
        return {
            "peak": held + found.temp_size_in_bytes,
            "allowed": 16 * sizes + 3 * (batch + 4 * B * S * F),
            "resident": resident(),
        }

    def rates(self) -> dict[str, float]:
        """What this machine does (cltjax/rates.py)."""
        from cltjax.rates import measure

        return dataclasses.asdict(measure(self.config, self.model_shape))

    def parts(self, n: int) -> dict[str, float]:
        """Median seconds of each part of a step of one source, compiled and run by itself. Sums of parts and step
        differ: XLA fuses across parts, and parts write what a step keeps."""
        jax = self.jax
        from cltjax.decode import decode_source
        from cltjax.encode import pre_activations
        from cltjax.sparse_products import gather_dot, scatter_sum
        from cltjax.sparsity import top_k

        dtype, k = self.config.dtype, self.shape[1]
        W_enc, b_enc = (self.state.parameters[name][...] for name in ("W_enc", "b_enc"))
        W_dec = self.state.parameters["W_dec"]["0"][...]
        x, y = self.x[0].astype("float32"), self.y[0].astype("float32")
        found: dict[str, float] = {}

        def measure(name: str, function: Callable, *inputs: Any) -> Any:
            compiled = jax.jit(function)
            output = jax.block_until_ready(compiled(*inputs))
            found[name] = statistics.median(
                timed(lambda: jax.block_until_ready(compiled(*inputs))) for _ in range(max(1, n))
            )
            return output

        pre = measure("encode", lambda W, b, x: pre_activations(W, b, x, dtype), W_enc, b_enc, x)
        values, indices = measure("select", lambda pre: top_k(pre[0], k), pre)
        del pre
        measure("decode", lambda W, a, i: decode_source(W, a, i, dtype), W_dec, values, indices)

        def backward(W: Any, a: Any, i: Any, error: Any) -> Any:
            return scatter_sum(a, i, error, len(W)), gather_dot(W.astype(dtype), error, i)

        gradient, _ = measure("decode backward", backward, W_dec, values, indices, y)
        F = self.shape[0]
        of_encoder = measure("encode backward", lambda a, i, x: scatter_sum(a, i, x[:, 0], F), values, indices, x)
        parameters = {"W_enc": of_encoder, "W_dec": gradient}
        moments = self.optimiser.init(parameters)
        import optax

        def update(parameters: Any, moments: Any, gradients: Any) -> Any:
            updates, moments = self.optimiser.update(gradients, moments, parameters)
            return optax.apply_updates(parameters, updates), moments

        compiled = jax.jit(update, donate_argnums=(0, 1))
        gradients, times = jax.tree.map(lambda leaf: leaf * 0.5, parameters), []
        for _ in range(n + 1):
            begun = time.perf_counter()
            parameters, moments = jax.block_until_ready(compiled(parameters, moments, gradients))
            times.append(time.perf_counter() - begun)
        return found | {"optimiser": statistics.median(times[1:])}


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def resident() -> int:
    """The most memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    kind, *numbers, dtype = sys.argv[1:]
    worker = {"ours": Ours, "dense": Dense}[kind](*map(int, numbers), dtype)
    print(json.dumps(worker.versions), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
