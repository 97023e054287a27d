"""Worker of benchmarks.step: the same ViT in PyTorch, with what PyTorch offers for speed."""

import contextlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Pre-norm transformer block; query, key and value in one product."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, mlp_width)
        self.down = nn.Linear(mlp_width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [B, N, W] to itself."""
        rows, tokens, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(
            rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(mixed.reshape(rows, tokens, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class ViT(nn.Module):
    """Patch embedding, CLS token, position table, blocks, LayerNorm; the CLS token's output."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        width, patch = spec["width"], spec["patch"]
        places = int(np.prod([n // p for n, p in zip(spec["image"], patch, strict=True)]))
        self.embed = nn.Conv3d(1, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        # The released model's table is fixed.
        self.register_buffer("positions", torch.zeros(1, 1 + places, width))
        self.blocks = nn.ModuleList(Block(width, spec["heads"], spec["mlp_width"])
                                    for _ in range(spec["depth"]))
        self.norm = nn.LayerNorm(width)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Maps [B, X, Y, Z] to [B, W]."""
        x = self.embed(image[:, None]).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


def load(model: ViT, file: Path) -> None:
    """Takes over the weights that our worker has drawn."""
    ours = dict(np.load(file))
    tensor = torch.from_numpy
    with torch.no_grad():
        kernel = ours["patch_embed/kernel"]
        model.embed.weight.copy_(tensor(kernel.T.copy()).view_as(model.embed.weight))
        model.embed.bias.copy_(tensor(ours["patch_embed/bias"]))
        model.cls.copy_(tensor(ours["cls"]))
        model.positions.copy_(tensor(ours["positions"])[None])
        for index, block in enumerate(model.blocks):
            mine = {key.removeprefix("layers/blocks/"): tensor(value[index]) for key, value in
                    ours.items() if key.startswith("layers/blocks/")}
            for name in ("attention_norm", "mlp_norm"):
                getattr(block, name).weight.copy_(mine[f"{name}/scale"])
                getattr(block, name).bias.copy_(mine[f"{name}/bias"])
            for name in ("out", "up", "down"):
                getattr(block, name).weight.copy_(mine[f"{name}/kernel"].T)
                getattr(block, name).bias.copy_(mine[f"{name}/bias"])
            parts = ("query", "key", "value")
            block.qkv.weight.copy_(torch.cat([mine[f"{p}/kernel"].T for p in parts]))
            block.qkv.bias.copy_(torch.cat([mine[f"{p}/bias"] for p in parts]))
        model.norm.weight.copy_(tensor(ours["norm/scale"]))
        model.norm.bias.copy_(tensor(ours["norm/bias"]))


def main() -> None:
    """Answers one line after another."""
    spec = json.loads(sys.argv[1])
    gpu = spec["device"] == "gpu"
    device = torch.device("cuda" if gpu else "cpu")
    torch.set_num_threads(spec["threads"])
    torch.set_float32_matmul_precision("high" if gpu else "highest")
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.normal(size=(spec["batch"], *spec["image"])).astype("f4"))
    text = torch.from_numpy(rng.normal(size=(spec["batch"], spec["width"])).astype("f4"))
    images, text = images.to(device), text.to(device)
    model = ViT(spec)
    load(model, Path(spec["folder"]) / "weights.npz")
    model = model.to(device)
    run = torch.compile(model) if spec.get("compiled") else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=1e-4, fused=True)

    def sixteen() -> Any:
        return (torch.autocast(device.type, torch.bfloat16) if spec["dtype"] == "bfloat16"
                else contextlib.nullcontext())

    def encode(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), sixteen():
            return run(x)

    def train() -> torch.Tensor:
        optimizer.zero_grad()
        with sixteen():
            image = run(images)
        logits = F.normalize(image.float()) @ F.normalize(text).T / 0.07
        loss = F.cross_entropy(logits, torch.arange(len(logits), device=device))
        loss.backward()
        optimizer.step()
        return loss

    for line in sys.stdin:
        answer: dict[str, Any] = {}
        match line.strip():
            case "check":
                with torch.inference_mode(), sixteen():
                    # As many rows as the check of the others; compiling it would take long.
                    answer["output"] = model(images[:2])[:, :64].float().flatten().tolist()
            case "version":
                answer["version"] = f"torch {torch.__version__}"
            case "memory":
                answer["bytes"] = (torch.cuda.max_memory_allocated() if gpu else
                                   resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            case "step":
                since = time.perf_counter()
                for _ in range(spec["steps"]):
                    encode(images) if spec["mode"] == "inference" else train()
                if gpu:
                    torch.cuda.synchronize()
                answer["seconds"] = (time.perf_counter() - since) / spec["steps"]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
