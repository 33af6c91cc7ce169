"""Does the simulated study rank networks as real recordings do? braindecode's six, an MLP and ridge on preset eeg2, one recipe and one number of epochs for all, against NeuralBench's published order.

    .venv-bench/bin/python benchmarks/fidelity.py [--quick] [--models …] [--seeds 0 1 2] [--epochs 6] [--report] [--out FOLDER]

One person of typical strength, 20,000 single trials, 0-0.8 s at 100 Hz, tested on 200 unseen pictures shown 80 times; a network's answers are averaged over the repeats, as NeuralBench does, which makes even a weak one measurable.
As is usual for THINGS-EEG2: baseline, sensors whitened on training trials (MVNN), loss contrastive, one way, target normalised. The epoch is chosen on concepts taken from the training trials. bfloat16 where the processor has it.
Each cell (seed, model) is one file in FOLDER and is not run again; cells that are not there print 'not run'. --quick: a toy that only shows that everything runs; its numbers mean nothing.
"""
import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch

torch.set_num_threads(1)
warnings.simplefilter("ignore")
sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 0)]
from decoding import PUBLISHED, Sampled  # noqa: E402
from synapse_nb.train.loop import Callback  # noqa: E402

PRESET, SFREQ, WINDOW = "eeg2", 100., (0., .8)
MODELS = ["ridge", "mlp", "EEGNet", "Deep4Net", "ShallowFBCSPNet", "ATCNet", "EEGConformer", "BrainModule", "encoding"]
PAD = {"ShallowFBCSPNet": 120, "EEGConformer": 120}     # their pooling needs 99 samples: their trials end in zeros (the mean, after whitening)
unit = lambda a: a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-9)


# ------------------------------------------------------------------------------------------------ trials
def windows(x, times, sfreq):
    "Trials (n, C, T) without their baseline, at `SFREQ` (periodic windows: exact), cut to `WINDOW`."
    from scipy.signal import resample
    x = resample(x - x[:, :, times < 0].mean(-1, keepdims=True), round(x.shape[-1] * SFREQ / sfreq), axis=-1)
    t = times[0] + np.arange(x.shape[-1]) / SFREQ
    return x[:, :, (t >= WINDOW[0] - 1e-9) & (t < WINDOW[1] - 1e-9)]


def trials(seed, a):
    "Training and test trials, float16 in units of the training trials' spread, kept in `a.cache`."
    from synapse_nb.studies.simulate import PRESETS, TrialModel, _plan_trials, make_info, make_things, trial_blocks
    m = TrialModel(PRESET, seed, subject_sd=0.)
    at = a.cache / f"{PRESET}-{PRESETS[PRESET].version}-{a.trials}-{a.repeats}-{seed}"
    z, table = make_things(-(-a.trials // 12), 12, seed); order = np.random.default_rng(seed).permutation(len(z))[:a.trials]
    z, concept = z[order], table.concept.to_numpy()[order]
    zt, _ = make_things(200, 1, seed, key="test")
    shown = np.concatenate([np.random.default_rng([seed, k]).permutation(200) for k in range(a.repeats)])
    if not (at / "done").exists():
        at.mkdir(parents=True, exist_ok=True); scale = None
        for name, zs, plan in (("train", z, _plan_trials(m, z, "train")), ("test", zt[shown], _plan_trials(m, zt[shown], "test", np.repeat(np.arange(a.repeats), 200)))):
            out = None
            for rows, x, _ in trial_blocks(m, zs, name, plan=plan, block=200):
                x = windows(x, m.times, m.sfreq); scale = scale or float(x.std())
                if out is None: out = np.lib.format.open_memmap(at / f"{name}.npy", "w+", np.float16, (len(zs), *x.shape[1:]))
                out[rows] = (x / scale).clip(-1e3, 1e3)
            out.flush()
        (at / "done").touch()
    return dict(X=np.load(at / "train.npy", mmap_mode="r"), Xt=np.load(at / "test.npy", mmap_mode="r"), z=z, zt=zt, shown=shown, concept=concept, sfreq=SFREQ,
                info=make_info(m.modality, SFREQ)["chs"][:m.n_chans], version=PRESETS[PRESET].version)


def halves(d, seed):
    "Training and validation trials: other concepts."
    groups = np.unique(d["concept"]); held = np.isin(d["concept"], np.random.default_rng(seed).permutation(groups)[:max(1, len(groups) // 12)])
    return np.flatnonzero(~held), np.flatnonzero(held)


def whitened(X, rows):
    "A function of trials: sensors whitened with the covariance of training trials (each keeps its place), limited to 5 sd."
    some = X[np.sort(rows[:2000])].astype(np.float32); mean = some.mean(0); some -= mean
    v, u = np.linalg.eigh(np.einsum("nct,ndt->cd", some, some, optimize=True) / (len(some) * some.shape[2]))
    w, mean = torch.as_tensor(((u / np.sqrt(v + 1e-3 * v.mean())) @ u.T).astype(np.float32)), torch.as_tensor(mean)
    return lambda x: (w @ (torch.as_tensor(np.asarray(x, np.float32)) - mean)).clamp(-5, 5)


# ------------------------------------------------------------------------------------------------ one recipe
class Say(Callback):
    "One line a training epoch."
    order = 95
    def on_epoch_end(self, run): print("    " + "  ".join(f"{k} {v:.4g}" for k, v in run.row.items() if k != "lr"), flush=True)


class Clock(Callback):
    "Stop before an epoch that would end after `minutes` of this call; the same command goes on from there."
    order = 110
    def __init__(self, minutes): self.minutes, self.at = minutes, None
    def on_fit_start(self, run): self.start = self.at = time.time()
    def on_epoch_end(self, run):
        now = time.time(); late = (now - self.start + now - self.at) / 60 > self.minutes; self.at = now
        if late and run.epoch_idx < run.n_epochs and not run.stop: run.stop = self.stopped = True
    stopped = False


def network(name, d, seed, a, lr=1e-3, batch=32, patience=2):
    "Every network: AdamW, a cosine with warm-up, contrastive one way with the target normalised, as NeuralBench; the weights of the epoch with the lowest loss on validation concepts."
    from synapse_nb.models.bridge import braindecode_model
    from synapse_nb.models.match import match_loss
    from synapse_nb.models.zoo import create_model
    from synapse_nb.train.callbacks import EarlyStopping, LastCheckpoint, warmup_cosine
    from synapse_nb.train.loop import fit
    torch.manual_seed(seed)
    train, val = halves(d, seed); white, n_times = whitened(d["X"], train), PAD.get(name, d["X"].shape[2]); scale = lambda x: torch.nn.functional.pad(white(x), (0, n_times - d["X"].shape[2]))
    zc = d["z"] - d["z"][train].mean(0)
    d = {**d, "labels": {"z": unit(zc).astype(np.float32), "picture": np.unique(d["z"], axis=0, return_inverse=True)[1].ravel()}}
    kw = dict(n_chans=d["X"].shape[1], n_times=n_times, n_outputs=64, sfreq=d["sfreq"], chs_info=d["info"])
    model = create_model(name, **kw) if name == "mlp" else braindecode_model(name, **kw)

    def step(model, b):
        out = model(b["x"]).float(); similar = out.detach() @ b["z"].T
        two_way = (similar.diagonal()[:, None] > similar).float().mean(1) * len(out) / (len(out) - 1)
        return {"loss": match_loss("clip", out, b["z"], ids=b["picture"], normalise="image", symmetric=False), "n": len(out), "two_way": two_way}
    kept = a.out / "states" / f"{seed}-{name}"
    precision = "bf16" if torch.backends.mkldnn.is_available() and "avx512_bf16" in open("/proc/cpuinfo").read() else "fp32"
    t0 = time.process_time()
    history = fit(model, step, Sampled(d, train, batch, len(train), seed, scale), val_loader=Sampled(d, val, batch, len(val) // batch * batch, None, scale), resume=kept, n_epochs=a.epochs, lr=lr, weight_decay=.01,
                  callbacks=[stop := EarlyStopping(patience), warmup_cosine(.05), Say(), clock := Clock(a.minutes), LastCheckpoint(kept)], device="cpu", precision=precision, grad_clip=1., seed=seed)
    spent = time.process_time() - t0
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"): out = np.concatenate([model(scale(d["Xt"][i:i + 250])).float().numpy() for i in range(0, len(d["Xt"]), 250)])
    return dict(similar=out @ unit(d["zt"] - d["z"][train].mean(0)).T, spent=spent, epochs=len(history), best_epoch=stop.best_epoch, val_loss=float(stop.best), val_two_way=history[stop.best_epoch]["val_two_way"],
                parameters=sum(p.numel() for p in model.parameters()), unfinished=clock.stopped, precision=precision, lr=lr, batch=batch)


def closed(name, d, seed, a):
    "`ridge` and the encoding decoder as in decoding.py, on the same trials: what linear readers of the trials reach."
    import decoding
    r = getattr(decoding, name)({**d, "times": WINDOW[0] + np.arange(d["X"].shape[2]) / SFREQ, "y": np.arange(len(d["z"])) % 27}, seed)
    return dict(similar=r["similar"], val_loss=float(r["val"]))


# ------------------------------------------------------------------------------------------------ scores
def mean_of(similar, shown): return np.stack([similar[shown == i].mean(0) for i in range(similar.shape[1])])


def cell(seed, name, a):
    path = a.out / f"{seed}-{name}.npz"
    if path.exists(): return
    from synapse_nb.evaluate.ceiling import ranks
    t0 = time.process_time(); d = trials(seed, a); print(f"  {name}, seed {seed}", flush=True)
    r = (closed if name in ("ridge", "encoding") else network)(name, d, seed, a); similar = r.pop("similar"); at = {k: mean_of(similar[:200 * k], d["shown"][:200 * k]) for k in (12, a.repeats) if k <= a.repeats}
    facts = r | dict(version=d["version"], trials=len(d["z"]), cpu_s=time.process_time() - t0)
    if facts.get("unfinished"): path = path.with_suffix(".part.npz")
    else: path.with_suffix(".part.npz").unlink(missing_ok=True)
    tmp = path.with_suffix(".tmp.npz"); np.savez_compressed(tmp, rank=ranks(similar, d["shown"]).astype(np.float32), shown=d["shown"], facts=json.dumps(facts, default=float), **{f"mean_{k}": ranks(v, np.arange(200)).astype(np.float32) for k, v in at.items()}); tmp.replace(path)


def load(path):
    f = np.load(path, allow_pickle=False); repeats = max(int(k[5:]) for k in f.files if k.startswith("mean_"))
    one = np.stack([f["rank"][f["shown"] == i] for i in range(200)])                  # (pictures, repeats)
    return dict(one=one, mean=f[f"mean_{repeats}"], mean12=f["mean_12"] if "mean_12" in f.files else None, repeats=repeats, facts=json.loads(str(f["facts"])))


def s_of(rank):
    "S from top-5 of 200, or near chance from two-way identification, to which every rank counts."
    from synapse_nb.evaluate.ceiling import s_eff
    top5, two = float((rank < 5).mean()), float(1 - rank.mean() / 199)
    return s_eff(top5, 200, 5) if top5 > .3 else s_eff(max(two, .5), 2, 1)


def over_pictures(f, cells, draws=500, seed=0):
    "95 % interval of f(pictures) by drawing the pictures again."
    r = np.random.default_rng(seed); v = [f(r.integers(0, 200, 200)) for _ in range(draws)]
    return [float(x) for x in np.nanquantile(v, [.025, .975])]


def describe(name, cells):
    if not cells: return f"  {name:16s} not run"
    one, mean = (np.mean([c[k] for c in cells], 0) for k in ("one", "mean")); two = lambda r: 100 * (1 - r.mean() / 199)
    top5 = lambda k: 100 * np.mean([(c[k] < 5).mean() for c in cells]); low, high = over_pictures(lambda i: two(mean[i]), cells)
    c = cells[0]; f = c["facts"]
    return (f"  {name:16s} {len(cells)} seed{'s' * (len(cells) > 1)}  single: top-5 {top5('one'):5.2f} two-way {two(one):5.2f} S {np.mean([s_of(c['one']) for c in cells]):.3f}   mean of {c['repeats']}: top-1 {100 * np.mean([(c['mean'] < 1).mean() for c in cells]):5.1f} top-5 {top5('mean'):5.1f} "
            f"two-way {two(mean):5.1f} [{low:.1f}, {high:.1f}] S {np.mean([s_of(c['mean']) for c in cells]):6.2f}   {sum(c['facts']['cpu_s'] for c in cells):5.0f} CPU s" + (f", best of {f['epochs']} epochs: {f['best_epoch'] + 1}" if "epochs" in f else "") + (" (UNFINISHED)" if f.get("unfinished") else ""))


def judged(have, a):
    "The bars of the study's own test."
    from scipy.stats import spearmanr
    rows, nets = [], [k for k in PUBLISHED if k in have]; partly = [k for k in nets if any(c["facts"].get("unfinished") for c in have[k])]
    value = lambda k, i=slice(None): np.mean([-c["mean"][i].mean() for c in have[k]])
    rho = lambda i=slice(None): spearmanr([PUBLISHED[k] for k in nets], [value(k, i) for k in nets]).statistic
    above = [k for k in nets if over_pictures(lambda i, k=k: -value(k, i), None)[1] < 99.5]
    if len(nets) > 2: rows.append(dict(what=f"rank correlation with the published order of {len(nets)} networks (answers averaged over repeats)", ours=float(rho()), interval=over_pictures(rho, None), bar=">= 0.8 with all six", holds=bool(rho() >= .8 and len(nets) == len(PUBLISHED))))
    rows.append(dict(what=f"networks above chance (interval over pictures above 50 % two-way), of {len(nets)} run", ours=len(above), bar=f"= {len(PUBLISHED)}", holds=len(above) == len(PUBLISHED)))
    if {"BrainModule", "EEGNet"} <= set(nets):
        s = lambda k, i=slice(None): np.mean([s_of(c["mean"][i]) for c in have[k]]); ratio = lambda i=slice(None): s("BrainModule", i) / max(s("EEGNet", i), 1e-3)
        rows.append(dict(what="S_eff, brain module / EEGNet", ours=float(ratio()), interval=over_pictures(ratio, None, 200), bar="2-8", holds=bool(2 <= ratio() <= 8)))
    if partly: rows = [r | dict(what=f"{r['what']} (unfinished: {', '.join(partly)})", holds=False) for r in rows]
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true"), p.add_argument("--report", action="store_true", help="print what is there, run nothing"), p.add_argument("--models", nargs="*", default=MODELS), p.add_argument("--seeds", nargs="*", type=int, default=[0])
    p.add_argument("--epochs", type=int, default=6), p.add_argument("--minutes", type=float, default=1e9, help="of wall time for a network in this call; what is not finished goes on next time"), p.add_argument("--trials", type=int, default=20000), p.add_argument("--repeats", type=int, default=80), p.add_argument("--out", type=Path, default=Path("runs/fidelity"))
    a = p.parse_args()
    if a.quick: a.trials, a.repeats, a.epochs, a.models, a.out = 960, 2, 1, [m for m in a.models if m != "BrainModule"], a.out / "quick"
    a.cache = a.out / "trials"; a.out.mkdir(parents=True, exist_ok=True)
    for seed, name in [] if a.report else [(s, m) for s in a.seeds for m in a.models]:
        try: cell(seed, name, a)
        except Exception as e: print(f"  {name} failed: {type(e).__name__}: {e}", flush=True)
    have = {m: [load(f) for s in a.seeds for f in [*a.out.glob(f"{s}-{m}.npz"), *a.out.glob(f"{s}-{m}.part.npz")]] for m in MODELS}
    print(f"\npreset {PRESET}, {a.trials:,} training trials, at most {a.epochs} epochs, 200 unseen pictures (chance: top-5 2.5, two-way 50)" + ("   TOY: only shows that it runs" if a.quick else ""))
    for m in MODELS: print(describe(m, have[m]) + (f"   published top-5 {PUBLISHED[m]}" if m in PUBLISHED else ""))
    rows = [dict(what="cells that ran (their numbers mean nothing)", ours=sum(map(bool, have.values())), bar=f"= {len(a.models)}", holds=sum(map(bool, have.values())) == len(a.models))] if a.quick else judged({k: v for k, v in have.items() if v}, a)
    for r in rows: print(f"{'ok  ' if r['holds'] else 'MISS'} {r['what']}: {r['ours']:.3g} (bar {r['bar']})" + (f" [{r['interval'][0]:.2f}, {r['interval'][1]:.2f}]" if "interval" in r else ""))
    print(json.dumps({"rows": rows, "holds": all(r["holds"] for r in rows) if rows else None}))


if __name__ == "__main__": main()
