"""What the loop costs and whether many ranks do the sums of one.

    python benchmarks/training.py [--quick] [--pairs N]

1. Loop overhead: `fit` against a bare PyTorch loop (the same model, loader and optimizer; loss added up per sample), EEGNet at 63 x 250, batch 64, on the CPU. ABBA pairs, process CPU time,
   bootstrap interval of the mean ratio; judged by the interval's bad end.
2. Two gloo ranks (DDP, FSDP2) against one process: the same global batch, dropout 0, float32 and float64; each gradient tensor by relative L2, the worst one is judged.
   Tensors whose exact gradient is zero (a bias before a norm or a softmax) have no relative error and are left out: norm below 1e-7 of the model's largest.
3. Bytes of parameters and Adam moments that one rank holds under FSDP2, against DDP, for a 150 M-parameter encoder.
4. Seconds from the start of a resumed program to its first step (printed).
5. On a GPU: FLOP utilisation of a 24-layer 1024-wide encoder in bf16 (printed; skipped without one).
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from synapse_nb.dist import init_from_env, is_main, leave, run_ranks, world_size  # noqa: E402
from synapse_nb.models.convnets import EEGNet  # noqa: E402
from synapse_nb.train.callbacks import LastCheckpoint  # noqa: E402
from synapse_nb.train.checkpoint import read_tensors, write_tensors  # noqa: E402
from synapse_nb.train.loop import fit, param_groups  # noqa: E402


def data(n=256, seed=0):
    "Noise and one planted pattern for each class: something to learn, as in training, so that a gradient is more than rounding."
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=g)
    wave = torch.sin(torch.arange(250) / 250 * 2 * torch.pi * torch.arange(2, 6)[:, None])
    return torch.randn(n, 63, 250, generator=g) + torch.randn(4, 63, 1, generator=g)[y] * wave[y][:, None], y


class Named(torch.utils.data.Dataset):
    "Batches as dicts, taken with one index: what data.windows does."
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)
    def __getitems__(self, rows): rows = torch.as_tensor(rows); return {"x": self.x[rows], "y": self.y[rows]}


def as_is(batch): return batch


def step(model, batch):
    logits = model(batch["x"])
    return {"loss": nn.functional.cross_entropy(logits, batch["y"]), "n": len(logits)}


class LayerNormEncoder(nn.Module):
    def __init__(self, width=64, depth=3, heads=4, n_chans=63, patch=25, n_out=4):
        super().__init__()
        self.patch, self.embed = patch, nn.Linear(n_chans * patch, width)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, n_out)

    def forward(self, x):
        h = self.embed(x.unflatten(2, (-1, self.patch)).permute(0, 2, 1, 3).flatten(2))
        for b in self.blocks: h = b(h)
        return self.head(self.norm(h.mean(1)))


def make(name):
    torch.manual_seed(0)
    return EEGNet(63, 250, 4, sfreq=250.0, drop=0.0) if name == "eegnet" else LayerNormEncoder()


# --- 1. overhead

def bare(model, loader, optimizer):
    model.train()
    total, n = 0.0, 0
    for batch in loader:
        loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total, n = total + loss.item() * len(batch["y"]), n + len(batch["y"])
    return total / n


def overhead(pairs, n):
    x, y = data(n)
    loader = DataLoader(Named(x, y), 64, shuffle=True, collate_fn=as_is)
    torch.manual_seed(0)
    model = EEGNet(63, 250, 4, sfreq=250.0)
    opt = torch.optim.AdamW(param_groups(model, 1e-3, 0.01))
    ours = lambda: fit(model, step, loader, n_epochs=1, optimizer=opt, device="cpu")
    peer = lambda: bare(model, loader, opt)
    def cpu(f): t = time.process_time(); f(); return time.process_time() - t
    ours(), peer()
    a, b = [], []
    for _ in range(pairs):                                     # A B B A
        a1, b1, b2, a2 = cpu(ours), cpu(peer), cpu(peer), cpu(ours)
        a.append(a1 + a2); b.append(b1 + b2)
    a, b, r = np.array(a), np.array(b), np.random.default_rng(0)
    boot = [a[i].sum() / b[i].sum() for i in r.integers(0, pairs, (2000, pairs))]
    return a.sum() / b.sum(), *np.quantile(boot, [0.025, 0.975]), b.mean() / 2 / (n // 64)


# --- 2. gradients

class Keep:
    def __init__(self): self.grads = {}
    def on_gradients(self, run):
        if not self.grads: self.grads = {n: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).detach().clone() for n, p in run.model.named_parameters() if p.grad is not None}


def one_step(name, dtype, how, out):
    "The first step's gradients, and the loss and accuracy of an epoch with an uneven last batch (100 samples in batches of 64)."
    x, y = data(100)
    x, keep, model = x.to(getattr(torch, dtype)), Keep(), make(name).to(getattr(torch, dtype))
    def counted(model, batch):
        logits = model(batch["x"])
        return {"loss": nn.functional.cross_entropy(logits, batch["y"]), "n": len(logits), "correct": logits.argmax(1) == batch["y"]}
    row = fit(model, counted, DataLoader(Named(x, y), 64, collate_fn=as_is), n_epochs=1, optimizer=torch.optim.SGD, lr=0.0, callbacks=[keep], device="cpu", parallel=how,
              val_loader=DataLoader(Named(x, y), 64, collate_fn=as_is))[0]
    if is_main():
        write_tensors(out / f"{name}-{dtype}-{how}.safetensors", keep.grads)
        (out / f"{name}-{dtype}-{how}.json").write_text(json.dumps({**row, "ranks": world_size()}))


def worst(out, name, dtype, how):
    a, b = (read_tensors(out / f"{name}-{dtype}-{h}.safetensors")[0] for h in (how, "auto"))
    rows = [json.loads((out / f"{name}-{dtype}-{h}.json").read_text()) for h in (how, "auto")]
    assert rows[0]["ranks"] == 2 and rows[1]["ranks"] == 1 and a.keys() == b.keys()
    biggest = max(v.double().norm() for v in b.values())
    errors = {k: float((a[k].double() - b[k].double()).norm() / b[k].double().norm()) for k in a if b[k].double().norm() > 1e-7 * biggest}
    at = max(errors, key=errors.get)
    loss = max(abs(rows[0][k] - rows[1][k]) / rows[1][k] for k in ("train_loss", "val_loss"))
    return errors[at], at, loss, all(rows[0][k] == rows[1][k] for k in ("train_correct", "val_correct"))


def noise(out, name):
    "What float32 itself costs: one process in float32 against one in float64, the worst tensor."
    a, b = (read_tensors(out / f"{name}-{t}-auto.safetensors")[0] for t in ("float32", "float64"))
    biggest = max(v.norm() for v in b.values())
    return max(float((a[k].double() - b[k]).norm() / b[k].norm()) for k in a if b[k].norm() > 1e-7 * biggest)


# --- 3. bytes

def local_bytes(how, out, width, depth):
    torch.manual_seed(0)
    model, heads = LayerNormEncoder(width, depth, 16, n_out=4), Bytes()
    x, y = data(4)
    fit(model, step, DataLoader(Named(x, y), 4, collate_fn=as_is), n_epochs=1, callbacks=[heads], device="cpu", parallel=how)
    if is_main(): (out / f"bytes-{how}.json").write_text(json.dumps({"bytes": heads.bytes, "n": sum(p.numel() for p in model.parameters()), "rss": rss()}))


class Bytes:
    def on_step_end(self, run):
        local = lambda t: (t.to_local() if hasattr(t, "to_local") else t).numel() * t.element_size()
        self.bytes = sum(local(p) for p in run.model.parameters()) + sum(local(t) for s in run.optimizer.state.values() for t in s.values() if torch.is_tensor(t))


def rss():
    text = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
    return next((int(s.split()[1]) / 2**20 for s in text.splitlines() if s.startswith("RssAnon")), float("nan"))


# --- 4. resume

def resumable(folder):
    class Say:
        def on_step_end(self, run):
            (folder / "stepped").write_text(str(time.time()))
            time.sleep(0.05)
    x, y = data(256)
    fit(make("eegnet"), step, DataLoader(Named(x, y), 32, collate_fn=as_is), n_epochs=50, callbacks=[LastCheckpoint(folder / "checkpoints", every_steps=1), Say()],
        resume=folder / "checkpoints", device="cpu")


def resume_seconds(folder):
    took = []
    for _ in range(2):
        (folder / "stepped").unlink(missing_ok=True)
        began = time.time()
        p = subprocess.Popen([sys.executable, __file__, "--resumable", folder], env=env())
        while not (folder / "stepped").exists(): time.sleep(0.01)
        took.append(time.time() - began)
        time.sleep(0.5); p.send_signal(signal.SIGKILL); p.wait()
    return took


# --- 5. GPU

def utilisation(steps=20, batch=64):
    "Model FLOP utilisation of the 24-layer, 1024-wide encoder in bf16: 6 x parameters x tokens + attention, over the card's dense bf16 peak."
    peak = next((v for k, v in {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}.items() if k in torch.cuda.get_device_name(0)), None)
    torch.manual_seed(0)
    model, tokens = LayerNormEncoder(1024, 24, 16, n_chans=64, patch=4), 256
    x, y = torch.randn(batch, 64, 4 * tokens).pin_memory(), torch.randint(0, 4, (batch,))
    times = []
    class Clock:
        def on_step_end(self, run): torch.cuda.synchronize(); times.append(time.perf_counter())
    fit(model, step, [{"x": x, "y": y}] * (steps + 5), n_epochs=1, precision="bf16", callbacks=[Clock()], compile=True)
    per_step = (times[-1] - times[4]) / (len(times) - 5)
    n = sum(p.numel() for p in model.blocks.parameters())
    flops = batch * tokens * (6 * n + 12 * 24 * 1024 * tokens)
    return flops / per_step / peak if peak else float("nan"), per_step


def env(): return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def ranks(*args): run_ranks([__file__, *args], 2, env=env(), on_line=None, timeout_s=900)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--quick", action="store_true")
    p.add_argument("--pairs", type=int)
    p.add_argument("--ranks"), p.add_argument("--out", type=Path), p.add_argument("--resumable", type=Path), p.add_argument("--width", type=int), p.add_argument("--depth", type=int)
    p.add_argument("--only", default="overhead gradients bytes resume gpu")
    a = p.parse_args()
    torch.set_num_threads(1)
    if a.resumable: return resumable(a.resumable)
    if a.ranks:
        init_from_env()
        if a.ranks.startswith("bytes"): local_bytes(a.ranks.split("-")[1], a.out, a.width, a.depth)
        else:
            for dtype in ("float32", "float64"):
                for name, how in (("eegnet", "ddp"), ("encoder", "ddp"), ("encoder", "fsdp")): one_step(name, dtype, how, a.out)
        return leave()
    rows = []
    def row(what, ours, peer, ratio, bar, holds, text): rows.append({"what": what, "ours": ours, "peer": peer, "ratio": ratio, "bar": bar, "holds": bool(holds)}); print(f"{'ok  ' if holds else 'MISS'} {what}: {text}", flush=True)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        if "overhead" in a.only:
            pairs = a.pairs or (20 if a.quick else 100)
            mid, low, high, s = overhead(pairs, 256 if a.quick else 512)
            row("loop overhead, EEGNet 63x250, batch 64", mid * s, s, high, "<= 1.05", high <= 1.05, f"{mid:.3f} [{low:.3f}, {high:.3f}] of a bare loop ({1e3 * s:.1f} ms CPU a step, {pairs} ABBA pairs)")
        if "gradients" in a.only:
            for dtype in ("float32", "float64"):
                for name in ("eegnet", "encoder"): one_step(name, dtype, "auto", d)
            ranks("--ranks", "gradients", "--out", d)
            for dtype, bar in (("float32", 1e-6), ("float64", 1e-12)):
                for name, how in (("eegnet", "ddp"), ("encoder", "ddp"), ("encoder", "fsdp")):
                    err, at, loss, exact = worst(d, name, dtype, how)
                    if dtype == "float32": at += f"; rounding of one process, against float64: {noise(d, name):.1e}"
                    row(f"2 ranks ({how}) against 1, {name}, {dtype}", err, 0.0, err, f"<= {bar:g}", err <= bar and loss <= bar and exact,
                        f"worst gradient {err:.1e} ({at}), losses {loss:.1e}, counts {'equal' if exact else 'DIFFER'}")
        if "bytes" in a.only:
            width, depth = (256, 4) if a.quick else (1024, 12)
            for how in ("ddp", "fsdp"): ranks("--ranks", f"bytes-{how}", "--out", d, "--width", width, "--depth", depth)
            ddp, fsdp = (json.loads((d / f"bytes-{h}.json").read_text()) for h in ("ddp", "fsdp"))
            row(f"bytes of parameters and moments per rank, {fsdp['n'] / 1e6:.0f} M parameters", fsdp["bytes"], ddp["bytes"], fsdp["bytes"] / ddp["bytes"], "<= 0.52", fsdp["bytes"] <= 0.52 * ddp["bytes"],
                f"{fsdp['bytes'] / ddp['bytes']:.3f} of DDP's {ddp['bytes'] / 2**30:.2f} GiB (anonymous memory of the process {fsdp['rss']:.2f} and {ddp['rss']:.2f} GiB, not judged on a CPU)")
        if "resume" in a.only:
            first, again = resume_seconds(d)
            print(f"--   first step after {first:.1f} s when fresh, {again:.1f} s when resumed after kill -9")
        if "gpu" in a.only:
            if torch.cuda.is_available():
                mfu, s = utilisation()
                row("FLOP utilisation, 24 x 1024 encoder, bf16", mfu, 1.0, mfu, ">= 0.40", mfu >= 0.40, f"{100 * mfu:.0f} % of the card's peak, {1e3 * s:.0f} ms a step")
            else: print("--   no GPU here: FLOP utilisation not measured")
    print(json.dumps({"rows": rows, "holds": all(r["holds"] for r in rows)}))


if __name__ == "__main__": main()
