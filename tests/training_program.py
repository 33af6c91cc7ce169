"A small training run as a program, for tests/test_training.py: on one process or many, resumed, slowed down, killed."
import argparse
import json
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from synapse_nb.core import rng
from synapse_nb.dist import init_from_env, is_main, leave, rank, world_size
from synapse_nb.train.callbacks import EMA, CSVLog, LastCheckpoint, warmup_cosine
from synapse_nb.train.checkpoint import full_weights, write_tensors
from synapse_nb.train.loop import fit


class Augmented(Dataset):
    "Vectors with a planted class; noise drawn from (seed, epoch, sample), whichever worker makes it, and some from the global generator, as people do."
    def __init__(self, n=50, augment=True):
        torch.manual_seed(5)
        self.x, self.augment, self.epoch_idx = torch.randn(n, 6, 16), augment, 0
        self.y = (self.x[:, 0].mean(1) + self.x[:, 1].mean(1) > 0).long()

    def set_epoch(self, epoch_idx): self.epoch_idx = epoch_idx
    def __len__(self): return len(self.x)

    def __getitem__(self, i):
        noise = torch.as_tensor(rng(7, self.epoch_idx, i).normal(size=(6, 16)), dtype=torch.float32) * 0.1 + 0.05 * torch.rand(6, 16) if self.augment else 0
        return {"x": self.x[i] + noise, "y": self.y[i], "index": i}


class Conv(nn.Module):
    "Convolutions and batch norm, EEGNet's parts."
    def __init__(self, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(6, 8, 5, padding=2, bias=False), nn.BatchNorm1d(8), nn.ELU(), nn.AvgPool1d(4), nn.Dropout(dropout), nn.Flatten(), nn.Linear(32, 2))

    def forward(self, x): return self.net(x)


class Encoder(nn.Module):
    "A small transformer with layer norm; its blocks lie in an nn.ModuleList, as FSDP wants them."
    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64, dropout, batch_first=True, norm_first=True) for _ in range(3))
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        h = self.embed(x.transpose(1, 2))
        for b in self.blocks: h = b(h)
        return self.head(h.mean(1))


def step(model, batch):
    logits = model(batch["x"])
    return {"loss": nn.functional.cross_entropy(logits, batch["y"]), "n": len(logits), "correct": logits.argmax(1) == batch["y"]}


class KeepGradients:
    "The gradients of the first step, whole."
    def __init__(self): self.grads = {}
    def on_gradients(self, run):
        if self.grads: return
        self.local = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in run.model.parameters()) / sum(p.numel() for p in run.model.parameters())
        self.grads = {n: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).detach().clone() for n, p in run.model.named_parameters()}


class Slow:
    "Sleep at each step, so that somebody can be killed, and say where we are."
    def __init__(self, seconds, folder): self.seconds, self.folder = seconds, folder
    def on_step_end(self, run):
        Path(self.folder, f"at.{rank()}").write_text(f"{os.getpid()} {run.global_step}")
        time.sleep(self.seconds)


class Die:
    "Rank 1 kills itself once; torchrun's restart then finds it alive."
    def __init__(self, at): self.at = at
    def on_step_end(self, run):
        if run.global_step == self.at and rank() == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0": os.kill(os.getpid(), signal.SIGKILL)


def main(argv=None):
    p = argparse.ArgumentParser()
    p.add_argument("--out", required=True)
    p.add_argument("--model", default="conv")
    p.add_argument("--parallel", default="auto")
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--accumulate", type=int, default=1)
    p.add_argument("--slow", type=float, default=0.0)
    p.add_argument("--every-steps", type=int, default=None)
    p.add_argument("--keep-state", action="store_true")
    p.add_argument("--plain-data", action="store_true")
    p.add_argument("--double", action="store_true")
    p.add_argument("--die-at", type=int)
    a = p.parse_args(argv)
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    init_from_env()
    if a.double: torch.set_default_dtype(torch.float64)
    torch.manual_seed(100 + rank() if world_size() > 1 and rank() else 100)          # ranks start apart on purpose: rank 0's weights must win
    model = {"conv": Conv, "encoder": Encoder}[a.model](a.dropout)
    data = Augmented(augment=not a.plain_data)
    loaders = DataLoader(data, a.batch, shuffle=True, num_workers=a.workers), DataLoader(Augmented(27, augment=False), a.batch)
    grads, resume, extra = KeepGradients(), None, []
    if a.keep_state: resume, extra = out / "checkpoints", [LastCheckpoint(out / "checkpoints", every_steps=a.every_steps), EMA(0.9), warmup_cosine(), CSVLog(out / "metrics.csv")]
    if a.die_at: extra.append(Die(a.die_at))
    if a.slow: extra.append(Slow(a.slow, out))
    history = fit(model, step, loaders[0], n_epochs=a.epochs, val_loader=loaders[1], lr=1e-2, device="cpu", parallel=a.parallel, accumulate=a.accumulate,
                  grad_clip=1e6, callbacks=[grads, *extra], resume=resume, seed=3)
    weights = full_weights(model)
    if is_main():
        write_tensors(out / "weights.safetensors", weights)
        write_tensors(out / "gradients.safetensors", grads.grads)
        (out / "history.json").write_text(json.dumps({"rows": list(history), "ranks": world_size(), "local": grads.local}))
    leave()


if __name__ == "__main__": main()
