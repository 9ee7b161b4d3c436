"""The training step that one would write first: a dense cross-layer transcoder in PyTorch, to compare with.

Linear, topk, scatter, Linear to T x D, squared error, AdamW. On a GPU under `torch.compile`, with bfloat16 autocast and
a fused AdamW; on a CPU as it is.
"""

import torch
from torch import nn


class DenseCLT(nn.Module):
    """One source layer and T targets; x [B, D] -> y_hat [B, T D]."""

    def __init__(self, D: int, F: int, T: int, k: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.k = nn.Linear(D, F), nn.Linear(F, T * D), k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, indices = self.encoder(x).topk(self.k, dim=-1)
        code = torch.zeros(len(x), self.encoder.out_features, dtype=values.dtype, device=x.device)
        return self.decoder(code.scatter(-1, indices, values.relu()))


class DenseStep:
    """One optimiser step a call, on the same batch of noise again and again; returns the loss."""

    def __init__(self, D: int, F: int, T: int, k: int, B: int, device: str, bfloat16: bool) -> None:
        torch.manual_seed(0)
        self.device, self.bfloat16 = device, bfloat16
        clt = DenseCLT(D, F, T, k).to(device)
        on_gpu = device != "cpu"
        if on_gpu:
            torch.set_float32_matmul_precision("high")
        self.optimiser = torch.optim.AdamW(clt.parameters(), lr=3e-4, fused=on_gpu)
        self.clt = torch.compile(clt) if on_gpu else clt
        self.x, self.y = torch.randn(B, D, device=device), torch.randn(B, T * D, device=device)

    def __call__(self) -> float:
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            y_hat = self.clt(self.x)
        loss = (y_hat.float() - self.y).square().mean()
        loss.backward()
        self.optimiser.step()
        return loss.item()  # waits for the device

    def peak_bytes(self) -> int | None:
        """The most device memory that was in use, where PyTorch counts it."""
        return None if self.device == "cpu" else torch.cuda.max_memory_allocated()
