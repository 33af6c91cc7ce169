"""What learning without labels costs, and what it is worth: speed of the masked autoencoder, masked R2 against interpolation, probes and matching after pre-training against the same net from scratch.

    python benchmarks/selfsup.py [--quick] [--only repeat ranks speed bf16 probes heldout matching masked scaled gpu] [--out FOLDER] [--fresh]

1. speed: CPU time of one thread, forward + backward, `paper` preset, 262 tokens, batch 4. ABBA pairs, bootstrap interval of the median ratio; judged by the interval's bad end.
2. masked: windows of a simulated film (22 posterior MEG sensors x 208 samples at 1000 Hz, 2-120 Hz), three quarters hidden in blocks of 16 ms or more; the network alone, and with the linear answer inside
   (`linear=True`), against every polynomial and the Wiener interpolator on the same hidden samples of the same sensors; and what the network adds to that linear answer, which is the untrained model, after
   few steps and after as many as the network alone had. Intervals: bootstrap over test windows, paired (one training run).
3. probes: per seed one simulated person (preset `easy`, 40 posterior MEG sensors x 60 samples), 20,000 windows without labels, then 200 labels of 4 categories; linear probe of the frozen encoder against the same net
   trained from scratch with the same labels (its best epoch by validation). Means over 3 seeds and 3 draws of labels, tested on pictures of unseen concepts; interval: bootstrap over
   people and draws. `scaled`: the same on channels that are scaled but not whitened; `heldout`: pre-trained on four people, asked about a fifth. Both are printed only.
4. matching: the same encoders trained on to match picture features with 1,000 labelled trials, 200-way on unseen pictures, with and without pre-training. Paired difference; interval over pictures and seeds.
5. repeat: the same seed twice, bit by bit. ranks: contrastive losses over two ranks against one. gpu: samples/s of the `paper` preset (printed, skipped without one).

Settings of 3 and 4 were chosen on another person (seed 11). A finished row is kept in FOLDER (runs/bench_selfsup) and not measured again; --fresh forgets them. --quick: smaller everything; what is learnt (2-4)
is then only shown to run and not judged, since a few dozen steps teach nothing.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
warnings.simplefilter("ignore")

from synapse_nb.core import set_seed  # noqa: E402
from synapse_nb.dist import run_ranks  # noqa: E402
from synapse_nb.evaluate.metrics import top_k_hits  # noqa: E402
from synapse_nb.models.base import EncoderModel, Head  # noqa: E402
from synapse_nb.models.match import MatchModel, match_step  # noqa: E402
from synapse_nb.selfsup.mae import MAE, mae_optimizer, mae_step  # noqa: E402
from synapse_nb.selfsup.masking import POLYNOMIALS, WienerInterpolator, expand_mask, interpolate, make_mask  # noqa: E402
from synapse_nb.selfsup.probes import draw_labels, encode, linear_probe  # noqa: E402
from synapse_nb.selfsup.tfc import TFC, tfc_step  # noqa: E402
from synapse_nb.studies.simulate import TrialModel, make_info, make_things, trial_blocks  # noqa: E402
from synapse_nb.train.checkpoint import read_tensors  # noqa: E402

CPU = time.process_time


def row(what, ours, peer, ratio, interval, bar, holds, text): return dict(what=what, ours=ours, peer=peer, ratio=ratio, interval=interval, bar=bar, holds=None if holds is None else bool(holds), text=text)


# ---- data --------------------------------------------------------------------------------------------------------------------------------------------------------------------

def person(preset, seed, n_sensors, **changes):
    "A simulated person under the `n_sensors` most posterior sensors of the MEG helmet."
    m = TrialModel(preset, seed, modality="meg", **changes)
    at = np.array([c["loc"][:3] for c in make_info("meg", n_meg=m.n_chans)["chs"][:m.n_chans]]); at = at - (at.max(0) + at.min(0)) / 2
    keep = np.sort(np.argsort(at[:, 1] / np.linalg.norm(at, axis=1))[:n_sensors])
    noise = m.person.noise["meg"]; noise.update({k: noise[k][keep] for k in ("background", "alpha")})
    m.patterns, m.n_chans = m.patterns[keep], n_sensors; m._spectra()
    return m


def film(n, key, seed=1):
    "Windows (n, 22, 208) of a film at 1000 Hz, 2-120 Hz (linear edges of 2 and 30 Hz)."
    m = person("film", seed, 22, window=(-.12, 448, 1000.)); z, _ = make_things(n, 1, seed, key=key)
    f = np.fft.rfftfreq(448, 1e-3); gain = np.interp(f, [0, 2, 120, 150], [0, 1, 1, 0]).astype(np.float32)
    return np.concatenate([np.fft.irfft(np.fft.rfft(x) * gain, 448)[..., 120:328].astype(np.float32) for _, x, _ in trial_blocks(m, z, key, block=200)])


def pictures(m, key, n, n_categories=4, repeats=1):
    "Windows (n * repeats, C, 60) at 100 Hz of pictures seen for the first 0.6 s, their features and categories; pictures of another `key` are of other concepts."
    z, table = make_things(n, 1, m.seed, n_categories=n_categories, key=key); shown = np.tile(np.arange(n), repeats); at = (m.times >= 0) & (m.times < .6)
    X = np.concatenate([x[:, :, at].reshape(len(x), m.n_chans, -1, 2).mean(-1) for _, x, _ in trial_blocks(m, z[shown], key)]).astype(np.float32)
    return X, z[shown].astype(np.float32), np.searchsorted(np.unique(table.category), table.category)[shown]


ROLES = (("train", None, 1), ("val", 600, 1), ("test", 1500, 1), ("match", 200, 4))


def study(seed, n, white=True, subject="sub-01", roles=ROLES):
    "A person's windows by role (`train`, `val`, `test`, `match`: 200 pictures four times), whitened by what training windows say, or only scaled channel by channel. People of one seed share the sensors and part of what pictures evoke."
    m = person("easy", seed, 40, subject_sd=0., subject=subject); d = {k: pictures(m, k if subject == "sub-01" else f"{k} {subject}", k_n or n, repeats=r) for k, k_n, r in roles}
    X = d["train"][0]; mean = X.mean((0, 2), keepdims=True); v, u = np.linalg.eigh(np.cov((X[:4000] - mean).transpose(1, 0, 2).reshape(m.n_chans, -1))); w = (u / np.sqrt(v + 1e-2 * v.mean())) @ u.T if white else np.diag(1 / X.std((0, 2)))
    return {k: (np.einsum("dc,nct->ndt", w, x - mean, optimize=True).clip(-8, 8).astype(np.float32), z, y) for k, (x, z, y) in d.items()}


def train(model, step, X, steps, lr, batch=128, warm=.15, **columns):
    "AdamW, one cycle, gradients clipped at 1; batches drawn with the global generator."
    opt = mae_optimizer(model, lr); plan = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=warm); losses = []; data = {"x": torch.from_numpy(X), **{k: torch.from_numpy(v) for k, v in columns.items()}}
    for _ in range(steps):
        b = torch.randint(0, len(X), (batch,)); out = step(model.train(), {k: v[b] for k, v in data.items()})
        opt.zero_grad(); out["loss"].backward(); nn.utils.clip_grad_norm_(model.parameters(), 1.0); opt.step(); plan.step(); losses.append(float(out["loss"].detach()))
    return losses


# ---- 1. speed ----------------------------------------------------------------------------------------------------------------------------------------------------------------

def abba(ours, peer, pairs):
    "Median of ours / peer in CPU time, and its bootstrap interval."
    def cpu(f): t = CPU(); f(); return CPU() - t
    ours(), peer(); a, b = [], []
    for i in range(pairs):
        for f, to in ((ours, a), (peer, b)) if i % 2 == 0 else ((peer, b), (ours, a)): to.append(cpu(f))
    r = np.array(a) / np.array(b); boot = np.median(r[np.random.default_rng(0).integers(0, pairs, (2000, pairs))], 1)
    return float(np.median(a)), float(np.median(b)), float(np.median(r)), [float(v) for v in np.quantile(boot, [.025, .975])]


class Bare(nn.Module):
    "The same matrix products, norms and SDPA as an encoder of `depth` blocks of `d`, and nothing else."
    def __init__(self, d, depth, heads, mlp, n_in):
        super().__init__(); self.heads, m = heads, int(d * mlp); self.embed = nn.Linear(n_in, d); self.norm = nn.LayerNorm(d)
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d), nn.LayerNorm(d), nn.Linear(d, m), nn.Linear(m, d)]) for _ in range(depth))

    def forward(self, p):
        h = self.embed(p)
        for n1, qkv, proj, n2, f1, f2 in self.layers:
            q, k, v = qkv(n1(h)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            h = h + proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)); h = h + f2(F.gelu(f1(n2(h))))
        return self.norm(h)


def speed(quick, out):
    set_seed(0); preset = "base" if quick else "paper"; pairs = 3 if quick else 5; m = MAE(22, 261 * 4, 4, preset=preset); e, x = m.encoder, torch.randn(4, 22, 261 * 4); mask = make_mask("random", 4, 261, .75)
    visible = (~mask).nonzero()[:, 1].view(4, -1); n = visible.shape[1] + 1; where = f"{preset}, 262 tokens ({n} visible), batch 4"
    bare = Bare(e.d_model, len(e.blocks), e.blocks[0].n_heads, e.blocks[0].fc1.out_features / e.d_model, 88); tokens = torch.randn(4, n, 88)

    def both(f, model, precision=None):
        def go():
            model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None): loss = f()
            loss.backward()
        return go
    some, every = both(lambda: e(x, visible).square().mean(), e), both(lambda: e(x).square().mean(), e)
    a, b, r, ci = abba(some, every, pairs)
    yield row(f"encoder on visible tokens / on every token, {where}", a, b, r, ci, "<= 0.40", ci[1] <= .40, f"{a:.2f} / {b:.2f} s CPU = {r:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]")
    a, b, r, ci = abba(some, both(lambda: bare(tokens).square().mean(), bare), (7 if quick else 3) * pairs)
    yield row(f"encoder on visible tokens / the bare shapes with SDPA, {where}", a, b, r, ci, "<= 1.05", ci[1] <= 1.05, f"{a:.3f} / {b:.3f} s CPU = {r:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]")
    a, b, r, ci = abba(both(lambda: m(x, mask)["loss"], m, "bf16"), both(lambda: m(x, mask)["loss"], m), pairs)
    yield row(f"bf16 / fp32, encoder and decoder, {where}", a, b, r, ci, "<= 0.70", ci[1] <= .70, f"{a:.2f} / {b:.2f} s CPU = {r:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]")


def losses_of(bf16, quick, out):
    "Losses of the first steps (AdamW, warm-up over a fifth of them, clipped at 0.8); the state is kept every 50 steps, so that an interrupted run goes on."
    preset, n_times, batch, steps = ("tiny", 208, 32, 40) if quick else ("paper", 261 * 4, 4, 200); file = out / f"bf16-{preset}-{'bf16' if bf16 else 'fp32'}.pt"; n = 400
    X = torch.from_numpy(np.cumsum(np.random.default_rng(0).normal(size=(n, 22, n_times)), 2).astype(np.float32)); X = (X - X.mean(2, keepdim=True)) / X.std(2, keepdim=True)
    set_seed(0); m, g, losses = MAE(22, n_times, 4, preset=preset), torch.Generator().manual_seed(0), []; opt = mae_optimizer(m)
    if file.exists():
        losses, random, weights, moments = torch.load(file, weights_only=True).values(); g.set_state(random)
        if weights is not None: m.load_state_dict(weights); opt.load_state_dict(moments)
    while len(losses) < steps:
        for p in opt.param_groups: p["lr"] = 2.5e-4 * min(1, (len(losses) + 1) / (steps / 5))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16): loss = m(X[torch.randint(0, n, (batch,), generator=g)], generator=g)["loss"]
        opt.zero_grad(); loss.backward(); nn.utils.clip_grad_norm_(m.parameters(), .8); opt.step(); losses.append(loss.item()); last = len(losses) == steps
        if last or len(losses) % 50 == 0: torch.save(dict(losses=losses, random=g.get_state(), weights=None if last else m.state_dict(), moments=None if last else opt.state_dict()), f"{file}.part"); os.replace(f"{file}.part", file); print(f"--   {file.stem}, step {len(losses)}: loss {np.mean(losses[-10:]):.4f}", flush=True)
    return losses


def bf16_curve(quick, out):
    "The loss of both precisions over 200 steps of the `paper` preset at 262 tokens and batch 4: the same weights, batches and masks. 25 CPU minutes."
    a, b = (np.convolve(losses_of(on, quick, out), np.ones(10) / 10, "valid") for on in (False, True)); gap = float(np.abs(b / a - 1).max()); end = float(b[-1] / a[-1] - 1)
    yield row(f"bf16's loss curve against fp32's, {'tiny preset, 40' if quick else 'paper preset, 262 tokens, batch 4, 200'} steps, means of 10", float(b[-1]), float(a[-1]), gap, None, "<= 0.02", gap <= .02, f"largest relative difference {100 * gap:.2f} %, at the end {100 * end:+.2f} % (loss {a[0]:.3f} -> {a[-1]:.3f})")


# ---- 2. masked R2 ------------------------------------------------------------------------------------------------------------------------------------------------------------

def sums(pred, x, hidden):
    "Squared error and variance over hidden samples, (n, C) each."
    h = hidden[:, None]; mean = (x * h).sum((0, 2)) / h.sum((0, 2)); return np.stack([((pred - x) ** 2 * h).sum(2), ((x - mean[:, None]) ** 2 * h).sum(2)])


def r2(s, rows=slice(None)): e, v = s[:, rows].sum(1); return float(np.mean(1 - e / v))


def masked(quick, out):
    n, n_test, steps, plus = (1200, 80, 60, 20) if quick else (8000, 400, 1200, 200)
    X, T = film(n, "train"), film(n_test, "test"); sd = X.std((0, 2), keepdims=True); X, T = ((a / sd).clip(-12, 12) for a in (X, T))
    mask = torch.cat([make_mask("block", 8, 52, .75, 4, torch.Generator().manual_seed(i)) for i in range(n_test // 8)]); hidden = expand_mask(mask, 4, 208).numpy(); S = {k: sums(interpolate(T, hidden, k), T, hidden) for k in POLYNOMIALS}
    S["wiener"] = sums(WienerInterpolator().fit(X[:2000]).fill(T, hidden), T, hidden); best = max(POLYNOMIALS, key=lambda k: r2(S[k])); draws = np.random.default_rng(0).integers(0, n_test, (1000, n_test))

    def fill(m):
        with torch.inference_mode(): return np.concatenate([m.eval().reconstruct(a, b).numpy() for a, b in zip(torch.from_numpy(T).split(50), mask.split(50))])
    for name, linear, k, lr in (("network alone", False, steps, 1e-3), ("linear answer inside", True, plus, 5e-4), ("linear answer inside, as many steps as alone", True, steps, 5e-4)):
        file = out / f"masked-{'linear' if linear else 'alone'}-{k}.npz"
        if not file.exists():
            set_seed(0); m = MAE(22, 208, 4, preset="small", mask="block", min_len=4, linear=linear, out_init=0.).fit_linear(X[:2000]); t = CPU(); train(m, mae_step, X, k, lr, 64, .1); np.savez(file, sums=sums(fill(m), T, hidden), cpu=CPU() - t)
        s, cpu = np.load(file).values()
        mine, wiener, poly = r2(s), r2(S["wiener"]), r2(S[best]); ratio = [r2(s, i) / r2(S["wiener"], i) for i in draws]; low, high = np.quantile(ratio, [.025, .975]); gap = np.quantile([r2(s, i) - r2(S[best], i) for i in draws], .025)
        if linear: more = np.quantile([r2(s, i) - r2(S["wiener"], i) for i in draws], [.025, .975])
        text = f"R2 {mine:.4f} after {k} steps of 64 ({cpu:.0f} s CPU)"
        yield row(f"masked R2, small preset, {name}, above every polynomial", mine, poly, None, None, "intervals apart", gap > 0, f"{text}; best polynomial ({best}) {poly:.3f}, difference at least {gap:.3f}")
        yield row(f"masked R2, small preset, {name}, of the Wiener interpolator's", mine, wiener, mine / wiener, [low, high], ">= 0.95", mine / wiener >= .95, f"{mine:.4f} / {wiener:.4f} = {mine / wiener:.3f} [{low:.3f}, {high:.3f}]{', above it' if low > 1 else ''}")
        if linear: yield row(f"masked R2, small preset, {name}: what {k} steps of the network add to the linear answer alone", mine, wiener, mine - wiener, more.tolist(), None, None, f"{mine:.4f} - {wiener:.4f} = {mine - wiener:+.4f} [{more[0]:+.4f}, {more[1]:+.4f}], paired over {n_test} windows")


# ---- 3. probes, 4. matching --------------------------------------------------------------------------------------------------------------------------------------------------

def make(kind): return MAE(40, 60, 4, mask="block", mask_ratio=.5, min_len=2, linear=kind.endswith("linear")) if kind != "tfc" else TFC(40, 60, patch=4, kind="code", lam=.5, augment=dict(jitter=.5))


STEPS = {"mae": (900, 3e-3), "mae+linear": (300, 2e-3), "tfc": (300, 1e-3), "mae, scaled": (900, 3e-3)}


def pretrained(kind, seed, X, quick, out, who=""):
    "An encoder trained on windows without labels; kept in `out`, so that an interrupted run goes on."
    steps, lr = STEPS[kind]; steps = steps // 6 if quick else steps; file = out / f"{kind}-{seed}{who}-{steps}-{len(X)}.pt"; set_seed(seed); m = make(kind)
    if hasattr(m, "fit_linear"): m.fit_linear(X[:500])
    if file.exists(): m.load_state_dict(torch.load(file, weights_only=True)); return m.encoder
    train(m, mae_step if kind != "tfc" else tfc_step, X, steps, lr); torch.save(m.state_dict(), file); return m.encoder


def fresh(kind, seed): set_seed(1000 + seed); return make(kind).encoder


def from_scratch(encoder, d, rows, epochs, seed):
    "Logits of test trials by the net trained with these labels, at its best epoch on validation."
    torch.manual_seed(seed); n_out = int(d["train"][2].max()) + 1; model = EncoderModel(encoder, Head(encoder.n_tokens, encoder.d_model, n_out, kind="linear", dropout=.3)); opt = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=.05)
    X, y = torch.from_numpy(d["train"][0][rows]), torch.from_numpy(d["train"][2][rows]); ask = lambda side: torch.cat([model(x) for x in torch.from_numpy(d[side][0]).split(500)]).argmax(1).numpy(); best = (-1, None)
    for e in range(epochs):
        for g in opt.param_groups: g["lr"] = 1e-3 * min(1, (e + 1) / 3) * (.5 + .5 * np.cos(np.pi * e / epochs))
        for b in torch.randperm(len(X)).split(25): loss = F.cross_entropy(model.train()(X[b]), y[b]); opt.zero_grad(); loss.backward(); opt.step()
        if e % 2:
            with torch.inference_mode():
                model.eval(); v = (ask("val") == d["val"][2]).mean()
                if v > best[0]: best = (v, ask("test"))
    return best[1]


def recall(hit, y): return float(np.mean([hit[y == c].mean() for c in np.unique(y)]))


def probe_scores(kind, seed, d, draws, epochs, encoder):
    "Balanced accuracies of one person: the probe of the pre-trained `encoder` and on random weights, the net from scratch, and a probe of the windows themselves; one for each draw of 200 labels."
    y, yt, pool = d["train"][2][:4000], d["test"][2], d["train"][0][:4000]; labels = [draw_labels(y, 200, s) for s in draws]; flat = lambda a: a.reshape(len(a), -1); r = {}
    features = {"pre-trained": lambda a, e=encoder: encode(e, a, "flatten"), "random": lambda a, e=fresh(kind, seed): encode(e, a, "flatten"), "raw": flat}
    for name, f in features.items(): A, B = f(pool), f(d["test"][0]); r[name] = [linear_probe(A[i], y[i], B, yt) for i in labels]
    r["scratch"] = [recall(from_scratch(fresh(kind, seed), d, i, epochs, s) == yt, yt) for s, i in zip(draws, labels)]
    return r


def probes(quick, out, kinds=("mae", "tfc", "mae+linear"), judged=("mae", "tfc"), white=True):
    n, seeds, draws, epochs = (4000, (0,), (0,), 20) if quick else (20_000, (0, 1, 2), (0, 1, 2), 30); got = {}
    for seed in seeds:
        files = {k: out / f"probe-{k}-{seed}-{n}.json" for k in kinds}; d = study(seed, n, white) if any(not f.exists() for f in files.values()) else None
        for kind, file in files.items():
            if not file.exists(): file.write_text(json.dumps(probe_scores(kind, seed, d, draws, epochs, pretrained(kind, seed, d["train"][0], quick, out))))
            got[kind, seed] = json.loads(file.read_text()); print(f"--   {kind}, person {seed}: " + ", ".join(f"{k} {np.mean(v):.3f}" for k, v in got[kind, seed].items()), flush=True)
    for kind in kinds: yield above_scratch(f"probe, 200 labels after {n} unlabelled windows, {kind}: above chance, of the net from scratch", [got[kind, s] for s in seeds], 1.3 if kind in judged else None)


def above_scratch(what, got, bar):
    "Row of the probe's accuracy above chance, as a part of the net's from scratch; the interval is a bootstrap over people, then over draws of labels (the same for both sides)."
    S = {k: np.array([p[k] for p in got]) - 1 / 4 for k in ("pre-trained", "scratch", "random", "raw")}; a, b = S["pre-trained"], S["scratch"]; g = np.random.default_rng(0); i = [g.integers(0, len(a), len(a)) for _ in range(2000)]

    def ratio(b):
        boot = []
        for rows in i:
            j = g.integers(0, a.shape[1], (len(a), a.shape[1])); boot.append(np.take_along_axis(a[rows], j, 1).mean() / max(1e-3, np.take_along_axis(b[rows], j, 1).mean()))
        return a.mean() / b.mean(), *np.quantile(boot, [.025, .975])
    (r, low, high), (q, q_low, q_high) = ratio(b), ratio(S["random"])
    return row(what, a.mean(), b.mean(), r, [low, high], None if bar is None else f">= {bar}", None if bar is None else r >= bar,
               f"{100 * a.mean():.1f} / {100 * b.mean():.1f} points above chance (25 %) = {r:.2f} [{low:.2f}, {high:.2f}], persons {', '.join(f'{v:.2f}' for v in a.mean(1) / b.mean(1))}; of a random frozen net's {100 * S['random'].mean():.1f}: {q:.2f} [{q_low:.2f}, {q_high:.2f}]; no network {100 * S['raw'].mean():.1f}")


def heldout(quick, out, kinds=("mae", "tfc")):
    "Pre-trained on four people, asked about a fifth whose windows it never saw: a study (seed) each time. Every person is whitened by that person's training windows. Not judged."
    n, seeds, draws, epochs = (1000, (0,), (0,), 20) if quick else (5000, (0, 1, 2), (0, 1, 2), 30); got = {}
    for seed in seeds:
        files = {k: out / f"heldout-{k}-{seed}-{n}.json" for k in kinds}
        if any(not f.exists() for f in files.values()): X, d = np.concatenate([study(seed, n, subject=f"sub-0{k}", roles=ROLES[:1])["train"][0] for k in (1, 2, 3, 4)]), study(seed, 4000, subject="sub-05", roles=ROLES[:3])
        for kind, file in files.items():
            if not file.exists(): file.write_text(json.dumps(probe_scores(kind, seed, d, draws, epochs, pretrained(kind, seed, X, quick, out, "-others"))))
            got[kind, seed] = json.loads(file.read_text()); print(f"--   {kind}, held-out person of study {seed}: " + ", ".join(f"{k} {np.mean(v):.3f}" for k, v in got[kind, seed].items()), flush=True)
    for kind in kinds: yield above_scratch(f"probe of a person held out of pre-training, 200 labels after 4 x {n} windows of other people, {kind}: above chance, of the net from scratch", [got[kind, s] for s in seeds], None)


def scaled(quick, out):
    "The same without whitening (each channel only scaled), not judged: here a net from scratch does better and pre-training is worth less."
    yield from probes(quick, out, ("mae, scaled",), (), white=False)


def match_hits(seed, d, steps, quick, out):
    "Top-1 and top-5 hits of 200 pictures, mean over four showings: (with and without pre-training, top-1 and top-5, 200)."
    X, z, _ = (v[:1000] for v in d["train"]); X_test, z_test, _ = d["match"]; z_mean = d["train"][1].mean(0); t = z_test[:200] - z_mean; t = t / np.linalg.norm(t, axis=1, keepdims=True); hits = []
    for e in (pretrained("mae", seed, d["train"][0], quick, out), fresh("mae", seed)):
        torch.manual_seed(seed); m = MatchModel(e, 64, hidden=128, dropout=.3); train(m, match_step, X, steps, 1e-3, 100, target=z - z_mean)
        with torch.inference_mode(): p = F.normalize(m.eval()(torch.from_numpy(X_test)), dim=1).numpy()
        hits.append([np.asarray(top_k_hits(p @ t.T, np.tile(np.arange(200), 4), k), float).reshape(4, 200).mean(0).tolist() for k in (1, 5)])
    return hits


def matching(quick, out):
    n, seeds, steps = (4000, (0,), 40) if quick else (20_000, (0, 1, 2), 300); hits = []
    for seed in seeds:
        file = out / f"match-{seed}-{n}.json"
        if not file.exists(): file.write_text(json.dumps(match_hits(seed, study(seed, n), steps, quick, out)))
        hits.append(json.loads(file.read_text()))
    H = 100 * np.array(hits)                                                         # persons, with or without, top-1 or top-5, pictures
    for j, k in enumerate((1, 5)):
        D = H[:, 0, j] - H[:, 1, j]; g = np.random.default_rng(0); boot = [np.mean([D[i][g.integers(0, 200, 200)].mean() for i in g.integers(0, len(D), len(D))]) for _ in range(2000)]; low, high = np.quantile(boot, [.025, .975])
        yield row(f"matching, 200-way top-{k}, 1000 labelled trials, with pre-training less without (points)", H[:, 0, j].mean(), H[:, 1, j].mean(), D.mean(), [low, high], "interval above -1" + (", a gain" if k == 1 else ""), low > -1 and (k != 1 or D.mean() > 0),
                  f"{H[:, 0, j].mean():.2f} - {H[:, 1, j].mean():.2f} = {D.mean():+.2f} [{low:+.2f}, {high:+.2f}], persons {', '.join(f'{v:+.2f}' for v in D.mean(1))}; chance {k / 2} %")


# ---- 5. repeat, GPU ----------------------------------------------------------------------------------------------------------------------------------------------------------

def repeat(quick, out):
    X = np.random.default_rng(0).normal(size=(200, 40, 60)).astype(np.float32)
    for kind in ("mae", "tfc"):
        runs = []
        for _ in range(2): set_seed(3); m = make(kind); train(m, mae_step if kind == "mae" else tfc_step, X, 10, 1e-3, 32); runs.append(m.state_dict())
        same = all(torch.equal(v, runs[1][k]) for k, v in runs[0].items()); yield row(f"{kind}: the same seed twice, 10 steps", float(same), 1.0, None, None, "identical", same, "every weight identical" if same else "weights DIFFER")


def ranks(quick, out):
    "NT-Xent, CLIP, SigLIP and queue losses and their gradients over 7 samples, three on one rank and four on the other, against one process (tests/contrast_program.py)."
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"); script = ROOT / "tests" / "contrast_program.py"
    with tempfile.TemporaryDirectory() as d:
        subprocess.run([sys.executable, script, d], env=env, check=True); run_ranks([script, d], 2, env=env, on_line=None, timeout_s=300)
        one, two = (read_tensors(Path(d) / f"ranks{k}.safetensors")[0] for k in (1, 2))
    far = {k: float((two[k] - v).norm() / v.norm().clamp(min=1e-12)) for k, v in one.items()}; worst = max(far, key=far.get)
    yield row("contrastive losses and gradients, 2 ranks against 1", far[worst], 0.0, None, None, "<= 1e-5", far[worst] <= 1e-5, f"worst of {len(far)} tensors {far[worst]:.1e} ({worst})")


def gpu(quick, out):
    if not torch.cuda.is_available(): print("--   no GPU here: samples/s of the paper preset not measured"); return
    m, x = MAE(22, 261 * 4, 4, preset="paper").cuda(), torch.randn(64, 22, 261 * 4, device="cuda")
    def step():
        m.zero_grad()
        with torch.autocast("cuda", torch.bfloat16): loss = m(x)["loss"]
        loss.backward()
    for _ in range(3): step()
    torch.cuda.synchronize(); t = time.time()
    for _ in range(10): step()
    torch.cuda.synchronize(); s = 640 / (time.time() - t); yield row("paper preset on the GPU, bf16, samples/s", s, None, None, None, None, None, f"{s:.0f} windows of 22 x 1044 a second")


PARTS = dict(repeat=repeat, ranks=ranks, speed=speed, bf16=bf16_curve, probes=probes, heldout=heldout, matching=matching, masked=masked, scaled=scaled, gpu=gpu)

LEARNT = ("probes", "heldout", "matching", "masked", "scaled")          # with --quick too little is trained for their bars to mean anything


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0]); ap.add_argument("--quick", action="store_true"); ap.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS)); ap.add_argument("--out", type=Path, default=ROOT / "runs" / "bench_selfsup"); ap.add_argument("--fresh", action="store_true")
    a = ap.parse_args(); out = a.out / ("quick" if a.quick else "full"); rows = []
    if a.fresh: shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    for name in a.only:
        file, t = out / f"{name}.json", time.time(); done = json.loads(file.read_text()) if file.exists() else None; part = []
        for r in done if done is not None else PARTS[name](a.quick, out):
            if a.quick and name in LEARNT: r["holds"] = None
            part.append(r); print(f"{'--  ' if r['holds'] is None else 'ok  ' if r['holds'] else 'MISS'} {r['what']}: {r['text']}" + (f"   bar {r['bar']}" if r["bar"] else "") + ("   (kept)" if done is not None else f"   {time.time() - t:.0f} s"), flush=True)
        if part: file.write_text(json.dumps(part))
        rows += part
    print(json.dumps({"rows": rows, "holds": all(r["holds"] for r in rows if r["holds"] is not None)}))
    return 0


if __name__ == "__main__": sys.exit(main())
