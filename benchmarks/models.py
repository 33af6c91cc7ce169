"""Training speed of our models at 271 channels x 281 samples against braindecode's EEGNet, and the wavelet packet against ptwt.

    python benchmarks/models.py [--quick]

Pairs in the order A B B A, CPU time of this process on one thread, the median ratio (peer's time / ours) with a bootstrap interval; at least 20 pairs.
A training step is forward, cross-entropy, backward and AdamW, batch 32, 200 outputs, dropout and batch norm on. A row whose peer is not installed says so (run it in .venv-bench).
"""
import argparse
import json
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
from synapse_nb.models.wavelet import packet2d
from synapse_nb.models.zoo import create_model

C, T, FS, BATCH, OUT = 271, 281, 200.0, 32, 200


def compare(what, ours, peer, bar, n_pairs, work=None):
    "One row; `work` samples a call turns seconds into samples/s."
    for _ in range(2): ours(), peer()
    a, b = [], []
    for i in range(n_pairs):
        for f, out in ((ours, a), (peer, b)) if i % 2 == 0 else ((peer, b), (ours, a)):
            t = time.process_time(); f(); out.append(time.process_time() - t)
    a, b = np.array(a), np.array(b)
    g = np.random.default_rng(0).integers(0, n_pairs, (2000, n_pairs))
    ratio, (lo, hi) = float(np.median(b / a)), np.quantile(np.median((b / a)[g], 1), [.025, .975])
    shown = (lambda s: work / s) if work else (lambda s: s * 1e3)
    return {"what": what, "ours": float(shown(np.median(a))), "peer": float(shown(np.median(b))), "unit": "samples/s" if work else "ms", "ratio": ratio,
            "interval": [float(lo), float(hi)], "bar": bar, "holds": None if bar is None else bool(lo >= bar), "n_pairs": n_pairs}


def trainer(model):
    "A closure that makes one training step."
    x, y = torch.randn(BATCH, C, T), torch.randint(0, OUT, (BATCH,))
    opt = torch.optim.AdamW(model.train().parameters(), lr=1e-3)

    def step():
        opt.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return step


def speed_rows(n_pairs, quick):
    try:
        from braindecode.models import EEGNet
    except ImportError:
        print("braindecode is not installed here: training rows not run (bash benchmarks/make_venv.sh, then .venv-bench/bin/python benchmarks/models.py)", file=sys.stderr)
        return [{"what": "training steps against braindecode's EEGNet", "ours": None, "peer": None, "ratio": None, "bar": 3.0, "holds": None}]
    torch.manual_seed(0)
    peer = trainer(EEGNet(n_chans=C, n_outputs=OUT, n_times=T, sfreq=FS))
    bars = {"mlp": 3.0, "spatial_conv": 3.0, "eegnet": 3.0, "lf_cnn": 3.0, "brain_module": None, "cnn_transformer": None}
    if quick: bars = {k: bars[k] for k in ("mlp", "spatial_conv")}
    return [compare(f"training, {name} / braindecode EEGNet", trainer(create_model(name, C, T, OUT, FS)), peer, bar, n_pairs, BATCH) for name, bar in bars.items()]


def packet_rows(n_pairs):
    import ptwt
    x = torch.randn(64, 63, 100, requires_grad=True)

    def theirs(wavelet):
        a, (b, c, d) = ptwt.wavedec2(x, wavelet, level=1, mode="zero")
        second = [ptwt.wavedec2(s, wavelet, level=1, mode="zero") for s in (a, b, c, d)]
        return torch.stack([t for s in second for t in (s[0], *s[1])], 1)

    rows = []
    for wavelet in ("haar", "db4"):
        ours, peer = packet2d(x, wavelet, "zero"), theirs(wavelet)
        assert ours.shape == peer.shape and torch.allclose(ours, peer, atol=1e-4), "the two packets differ"
        g = torch.randn_like(ours)

        def both(f):
            x.grad = None
            f().backward(g)
        rows.append(compare(f"wavelet packet 64x63x100, forward + backward, {wavelet} / ptwt", lambda: both(lambda: packet2d(x, wavelet, "zero")), lambda: both(lambda: theirs(wavelet)), 2.0, n_pairs))
    return rows


def main():
    p = argparse.ArgumentParser(); p.add_argument("--quick", action="store_true")
    quick = p.parse_args().quick
    rows = packet_rows(20 if quick else 60) + speed_rows(20 if quick else 40, quick)
    print(f"torch {torch.__version__}, 1 thread, CPU time; training at {C} x {T}, batch {BATCH}, {OUT} outputs")
    for r in rows:
        if r["ratio"] is None: print(f"{r['what']:<70} not run"); continue
        bar = "" if r["bar"] is None else f"bar {r['bar']:.0f}x {'met' if r['holds'] else 'MISSED'}"
        print(f"{r['what']:<70} {r['ours']:8.1f} {r['peer']:8.1f} {r['unit']:<10} {r['ratio']:6.2f}x [{r['interval'][0]:.2f}, {r['interval'][1]:.2f}]  {bar}")
    print(json.dumps({"rows": rows, "holds": all(r["holds"] for r in rows if r["bar"] is not None)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
