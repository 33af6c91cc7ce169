"""Which decoder reads most from the same trials: ours and the peers' on the frozen simulated study, each network within the same CPU time, or until it converges before.

    .venv-bench/bin/python benchmarks/decoding.py [--quick | --full] [--presets meg eeg2] [--models …] [--minutes 5] [--out FOLDER]

One person, single trials, unseen pictures. Every network has the same trials, the same loss (contrastive to the picture's 64 features, cross-entropy of 27 categories), optimiser and stopping rule (validation concepts, taken from
the training trials); they differ in the architecture only. Each cell (preset, trials, seed, model) is one file in FOLDER and is not run again; cells that are not there print 'not run'. Ours in the ratio is the encoding decoder, named beforehand; the peer is the one with the best test score, so that the ratio errs against us.
--full: 3 seeds, 1,000 to 20,000 trials (a cluster's work: share the cells among jobs with --models and --presets). --quick: preset easy, 20 s a network.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from synapse_nb.evaluate.metrics import wilson  # noqa: E402
from synapse_nb.train.loop import Callback  # noqa: E402

OURS = ["encoding", "mlp", "spatial_conv", "brain_module", "eegnet", "lf_cnn", "conformer", "linear"]
PEERS = ["ridge", "lda", "braindecode:BrainModule", "braindecode:EEGNet", "braindecode:ShallowFBCSPNet", "braindecode:Deep4Net", "braindecode:EEGConformer", "braindecode:ATCNet"]
CEILINGS = ["attainable", "genie"]
DEFAULT = [("meg", 5000, 0), ("eeg2", 20000, 0)]
FULL = [(p, n, s) for p in ("meg", "eeg2") for n in (1000, 5000, 20000) for s in range(3)]
PUBLISHED = {"BrainModule": 84.5, "Deep4Net": 57.3, "EEGNet": 28.1, "ShallowFBCSPNet": 15.4, "EEGConformer": 10.0, "ATCNet": 5.1}        # NeuralBench, top-5 of 200 on THINGS-EEG2
EIGHT = slice(0, 8)                                     # the eight-way task: the first eight of the 27 categories


# ------------------------------------------------------------------------------------------------ trials
def trials(preset, n, seed, folder, repeats=12, n_test=200):
    "Training and test trials of one person of typical strength, from 100 ms before to 800 ms after onset; kept in `folder` as float16 in units of the training trials' spread."
    from synapse_nb.studies.simulate import PRESETS, TrialModel, _plan_trials, make_things, trial_blocks
    at = Path(folder) / f"{preset}-{PRESETS[preset].version}-{n}-{seed}"
    m = TrialModel(preset, seed, subject_sd=0.)
    near = (m.times >= -.1) & (m.times < .8)
    zt, test = make_things(n_test, 1, seed, key="test")
    shown = np.concatenate([np.random.default_rng([seed, k]).permutation(n_test) for k in range(repeats)])
    z, table = make_things(-(-n // 12), 12, seed)
    order = np.random.default_rng(seed).permutation(len(z))[:n]
    z, table = z[order], table.iloc[order]
    if not (at / "done").exists():
        at.mkdir(parents=True, exist_ok=True)
        for name, zs, plan in (("train", z, _plan_trials(m, z, "train")), ("test", zt[shown], _plan_trials(m, zt[shown], "test", np.repeat(np.arange(repeats), n_test)))):
            out = np.lib.format.open_memmap(at / f"{name}.npy", "w+", np.float16, (len(zs), m.n_chans, int(near.sum())))
            scale = None
            for rows, x, _ in trial_blocks(m, zs, name, plan=plan, block=200):
                if scale is None: scale = np.load(at / "scale.npy") if name == "test" else x.std()
                if name == "train" and not (at / "scale.npy").exists(): np.save(at / "scale.npy", scale)
                out[rows] = x[:, :, near] / scale
            out.flush()
        (at / "done").touch()
    names = np.unique(table.category)
    return dict(X=np.load(at / "train.npy", mmap_mode="r"), Xt=np.load(at / "test.npy", mmap_mode="r"), z=z, zt=zt, shown=shown, y=np.searchsorted(names, table.category), yt=np.searchsorted(names, test.category),
                concept=table.concept.to_numpy(), times=m.times[near], sfreq=float(m.sfreq), info=_channels(m), version=PRESETS[preset].version)


def _channels(m):
    from synapse_nb.studies.simulate import make_info
    return make_info(m.modality, m.sfreq, n_meg=m.n_chans)["chs"][:m.n_chans]


# ------------------------------------------------------------------------------------------------ scores
def scores(d, similar, logits=None):
    "Hits of every test trial and of the mean over each picture's repeats; `similar (n, 200)`, `logits (n, 27)`."
    from synapse_nb.evaluate.ceiling import ranks
    shown, out = d["shown"], {}
    r = ranks(similar, shown)
    out["rank"] = r
    mean = np.stack([similar[shown == i].mean(0) for i in range(similar.shape[1])])
    out["rank_mean"] = ranks(mean, np.arange(len(mean)))
    if logits is not None:
        y = d["yt"][shown]
        out["hit27"] = logits.argmax(1) == y
        eight = y < 8
        out["hit8"] = np.where(eight, logits[:, EIGHT].argmax(1) == y, np.nan)
    return out


def balanced(hit, y):
    ok = ~np.isnan(hit.astype(float))
    return float(np.mean([hit[ok & (y == c)].mean() for c in np.unique(y[ok])]))


def two_way(rank, n=200): return float(1 - np.mean(rank) / (n - 1))


# ------------------------------------------------------------------------------------------------ decoders
class Sampled:
    "Batches for the loop: one epoch is `per_epoch` trials, and the permutation goes on in the next, so that validation comes often."
    def __init__(self, d, rows, batch, per_epoch, seed, scale):
        self.d, self.rows, self.batch, self.per_epoch, self.scale = d, rows, batch, per_epoch, scale
        self.random, self.queue = np.random.default_rng(seed) if seed is not None else None, np.zeros(0, int)

    def __len__(self): return -(-self.per_epoch // self.batch)

    def __iter__(self):
        for k in range(len(self)):
            if self.random is None: rows = self.rows[k * self.batch:(k + 1) * self.batch]
            else:
                if len(self.queue) < self.batch: self.queue = np.concatenate([self.queue, self.random.permutation(self.rows)])
                rows, self.queue = self.queue[:self.batch], self.queue[self.batch:]
            yield {"x": self.scale(self.d["X"][np.sort(rows)]), **{k: torch.as_tensor(v[np.sort(rows)]) for k, v in self.d["labels"].items()}}


def scaler(d, rows):
    "Channel means and spreads of some training trials; clipped at 5 (transients)."
    some = d["X"][np.sort(rows[:1000])].astype(np.float32)
    mean = torch.as_tensor(some.mean((0, 2))[:, None]); sd = torch.as_tensor(some.std((0, 2))[:, None])
    return lambda x: ((torch.as_tensor(np.asarray(x, np.float32)) - mean) / sd).clamp(-5, 5)


def build(name, d):
    from synapse_nb.models.bridge import braindecode_model
    from synapse_nb.models.zoo import create_model
    n_chans, n_times = d["X"].shape[1:]
    kw = dict(n_chans=n_chans, n_times=n_times, n_outputs=64 + 27, sfreq=d["sfreq"], chs_info=d["info"])
    return braindecode_model(name.split(":")[1], **kw) if ":" in name else create_model(name, **kw)


class Clock(Callback):
    "Stops the loop when training has taken `limit` CPU seconds."
    order = 90
    def __init__(self, limit): self.limit, self.t0 = limit, None
    def on_fit_start(self, run): self.t0 = time.process_time()
    def on_epoch_end(self, run): run.stop = run.stop or time.process_time() - self.t0 > self.limit


def network(name, d, seed, cpu_s, lr=1e-3, batch=128, patience=12):
    from synapse_nb.models.match import match_loss
    from synapse_nb.train.callbacks import EarlyStopping
    from synapse_nb.train.loop import fit
    torch.manual_seed(seed)
    groups = np.unique(d["concept"]); held = np.random.default_rng(seed).permutation(groups)[:max(1, len(groups) // 10)]
    val = np.flatnonzero(np.isin(d["concept"], held))[:1000]; train = np.flatnonzero(~np.isin(d["concept"], held))
    scale = scaler(d, train)
    zc = (d["z"] - d["z"][train].mean(0)).astype(np.float32)
    picture = np.unique(d["z"], axis=0, return_inverse=True)[1].ravel()
    d = {**d, "labels": {"z": zc, "y": d["y"].astype(np.int64), "picture": picture.astype(np.int64)}}
    model = build(name, d)
    model.logit_scale = torch.nn.Parameter(torch.tensor(2.0))

    def step(model, b):
        out = model(b["x"])
        loss = match_loss("clip", out[:, :64], b["z"], model.logit_scale.clamp(max=4.6).exp(), ids=b["picture"]) + .2 * torch.nn.functional.cross_entropy(out[:, 64:], b["y"])
        with torch.no_grad():
            similar = torch.nn.functional.normalize(out[:, :64], dim=1) @ torch.nn.functional.normalize(b["z"], dim=1).T
            own = similar.diagonal()[:, None]; other = b["picture"][:, None] != b["picture"]
            two_way = ((own > similar) & other).sum(1) / other.sum(1).clamp(min=1)
        return {"loss": loss, "n": len(out), "two_way": two_way}
    t0 = time.process_time()
    history = fit(model, step, Sampled(d, train, batch, min(2560, len(train)), seed, scale), val_loader=Sampled(d, val, 250, len(val), None, scale), n_epochs=10_000, lr=lr, weight_decay=.05,
                  monitor="val_two_way", callbacks=[stop := EarlyStopping(patience), Clock(cpu_s)], device="cpu", grad_clip=1., seed=seed)
    spent, n_epochs = time.process_time() - t0, len(history)
    model.eval()
    with torch.inference_mode(): out = np.concatenate([model(scale(d["Xt"][a:a + 250])).numpy() for a in range(0, len(d["Xt"]), 250)])
    unit = lambda a: a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-9)
    return dict(similar=unit(out[:, :64]) @ unit(d["zt"] - d["z"][train].mean(0)).T, logits=out[:, 64:], val=float(stop.best), spent=spent, epochs=n_epochs, converged=n_epochs - 1 - stop.best_epoch >= patience,
                parameters=sum(p.numel() for p in model.parameters()))


def _window(d): at = np.flatnonzero((d["times"] >= .04) & (d["times"] < .64)); return int(at[0]), int(at[-1]) + 1


def encoding(d, seed):
    from synapse_nb.models.encoding import EncodingDecoder
    m = EncodingDecoder(step=round(.025 * d["sfreq"]), window=_window(d), seed=seed).fit(d["X"][:], d["z"], d["concept"])
    s = np.concatenate([m.log_likelihood(d["Xt"][a:a + 500], d["zt"]) for a in range(0, len(d["Xt"]), 500)])
    pictures, first = np.unique(d["z"], axis=0, return_index=True)
    p = np.concatenate([m.predict_proba(d["Xt"][a:a + 500], pictures, d["y"][first])[0] for a in range(0, len(d["Xt"]), 500)])
    return dict(similar=s, logits=np.log(p + 1e-12), val=np.inf, shrink=m.shrink_)


def flat(d):
    "Whitened sensors in 25 ms steps, as vectors: what linear decoders get."
    from synapse_nb.models.encoding import Whitener
    a, b = _window(d)
    w = Whitener(80, round(.025 * d["sfreq"])).fit(d["X"][:, :, a:b])
    return [np.concatenate([w(x[i:i + 500, :, a:b]).reshape(len(x[i:i + 500]), -1) for i in range(0, len(x), 500)]) for x in (d["X"], d["Xt"])]


def ridge(d, seed):
    A, B = flat(d)
    groups = np.unique(d["concept"]); held = np.isin(d["concept"], np.random.default_rng(seed).permutation(groups)[:len(groups) // 10])
    z = d["z"] - d["z"].mean(0); target = np.concatenate([z, (d["y"][:, None] == np.arange(27)) - 1 / 27], 1)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
    v, u = np.linalg.eigh((A[~held].T @ A[~held]).astype(float)); at = u.T @ (A[~held].T @ target[~held])
    fits = {k: float((unit(A[held] @ (u @ (at[:, :64] / (v + k * len(A))[:, None]))) * unit(z[held])).sum(1).mean()) for k in (.1, .3, 1, 3, 10)}
    k = max(fits, key=fits.get)
    v, u = np.linalg.eigh((A.T @ A).astype(float)); out = B @ (u @ ((u.T @ (A.T @ target)) / (v + k * len(A))[:, None]))
    return dict(similar=unit(out[:, :64]) @ unit(d["zt"] - d["z"].mean(0)).T, logits=out[:, 64:], val=fits[k], penalty=k)


def lda(d, seed):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    A, B = flat(d)
    return dict(similar=None, logits=LinearDiscriminantAnalysis(solver="lsqr", shrinkage=.5).fit(A, d["y"]).decision_function(B), val=0.)


def ceiling(name, preset, n, seed):
    "`attainable`: what may be hoped for from n trials, knows the family, the noise and the population, not this person. `genie`: knows all but the picture."
    from synapse_nb.evaluate.ceiling import attainable, learn_blocks, oracle, population
    from synapse_nb.studies.simulate import TrialModel, _plan_trials, make_things, trial_blocks
    m = TrialModel(preset, seed, subject_sd=0.); zt, _ = make_things(200, 1, seed, key="test")
    shown = np.concatenate([np.random.default_rng([seed, k]).permutation(200) for k in range(4)]); plan = _plan_trials(m, zt[shown], "test", np.repeat(np.arange(4), 200))
    if name == "genie": return dict(similar=np.concatenate([oracle(m, x, plan, rows, zt, known) for rows, x, known in trial_blocks(m, zt[shown], "test", plan=plan, block=200)]), shown=shown)
    z, _ = make_things(-(-n // 12), 12, seed); z = z[np.random.default_rng(seed).permutation(len(z))[:n]]; told = _plan_trials(m, z, "train")
    post = learn_blocks(m, trial_blocks(m, z, "train", plan=told, block=200), told, population(m))
    return dict(similar=np.concatenate([attainable(m, post, x, plan, rows, zt) for rows, x, *_ in trial_blocks(m, zt[shown], "test", plan=plan, block=200)]), shown=shown)


# ------------------------------------------------------------------------------------------------ cells
def cell(preset, n, seed, name, a):
    "One file: what was scored and every rank, so that models are compared on the same trials."
    path = a.out / f"{preset}-{n}-{seed}-{name.replace(':', '.')}.npz"
    if path.exists(): return path
    t0 = time.process_time()
    if name in CEILINGS: r = ceiling(name, preset, n, seed); d = {"shown": r.pop("shown")}
    else:
        d = trials(preset, n, seed, a.cache); t0 = time.process_time()
        r = globals()[name](d, seed) if name in ("encoding", "ridge", "lda") else network(name, d, seed, 60 * a.minutes)
    hits = scores(d, r["similar"], r.get("logits")) if r["similar"] is not None else {k: v for k, v in scores(d, np.zeros((len(d["shown"]), 200)), r["logits"]).items() if k.startswith("hit")}
    facts = {k: v for k, v in r.items() if k not in ("similar", "logits")} | {"cpu_s": time.process_time() - t0}
    tmp = path.with_suffix(".tmp.npz"); np.savez_compressed(tmp, shown=d["shown"], yt=d.get("yt", 0), facts=json.dumps(facts, default=float), **hits); tmp.replace(path)
    return path


def load(path):
    f = np.load(path, allow_pickle=False)
    return {k: f[k] for k in f.files if k != "facts"} | {"facts": json.loads(str(f["facts"]))}


def _units(easy):
    "Which identification score S is read from: top-5 of 200, or where that is near chance the chance that the right one of two is preferred, to which every rank counts. Values per trial, and how to turn their mean into S."
    from synapse_nb.evaluate.ceiling import s_eff
    grid = np.linspace(.025, 1, 300) if easy else np.linspace(.5, 1, 300)
    s = np.array([s_eff(v, 200, 5) if easy else s_eff(v, 2, 1) for v in grid])
    return (lambda rank: rank < 5) if easy else (lambda rank: 1 - rank / 199), lambda v: np.maximum(np.interp(v, grid, s), 1e-3)


def s_of(rank):
    "S_eff of single trials."
    value, s = _units((rank < 5).mean() > .3)
    return float(s(value(rank).mean()))


def compare(ours, peer, draws=2000, seed=0):
    "Ratio of S_eff, ours over the peer's, with an interval over pictures: one picture's trials stay together."
    value, s = _units(min((c["rank"] < 5).mean() for c in (ours, peer)) > .3)
    a, b = (np.array([value(c["rank"][c["shown"] == i]).mean() for i in range(200)]) for c in (ours, peer))
    i = np.random.default_rng(seed).integers(0, 200, (draws, 200))
    return float(s(a.mean()) / s(b.mean())), *map(float, np.quantile(s(a[i].mean(1)) / s(b[i].mean(1)), [.025, .975]))


def describe(name, c):
    "One line of the table."
    if c is None: return f"  {name:32s} not run"
    f, text = c["facts"], f"  {name:32s}"
    if "rank" in c:
        r, m = c["rank"], c["rank_mean"]; k = int((r < 5).sum()); low, high = wilson(k, len(r))
        text += f" top-1 {100 * (r < 1).mean():5.2f}  top-5 {100 * k / len(r):5.2f} [{100 * low:5.2f}, {100 * high:5.2f}]  S {s_of(r):.3f}  two-way {100 * two_way(r):5.2f}   mean of {len(r) // 200}: {100 * (m < 1).mean():4.1f} / {100 * (m < 5).mean():4.1f}"
    else: text += " " * 81
    if "hit27" in c: y = c["yt"][c["shown"]]; text += f"   27-way {100 * balanced(c['hit27'], y):5.2f}  8-way {100 * balanced(c['hit8'], y):5.2f}"
    return text + f"   {f['cpu_s']:5.0f} CPU s" + ("" if "epochs" not in f else f", {f['epochs']} x 2560 trials" + (", converged" if f["converged"] else ", stopped by the clock"))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true"), p.add_argument("--full", action="store_true"), p.add_argument("--minutes", type=float, default=5.)
    p.add_argument("--presets", nargs="*"), p.add_argument("--models", nargs="*"), p.add_argument("--out", type=Path, default=Path("runs/decoding")), p.add_argument("--cache", type=Path, default=Path("runs/decoding/trials"))
    p.add_argument("--seeds", nargs="*", type=int), p.add_argument("--report", action="store_true", help="print what is there, run nothing")
    a = p.parse_args()
    tasks = FULL if a.full else [("easy", 1000, 0)] if a.quick else DEFAULT
    if a.quick: a.minutes, a.out = min(a.minutes, 1 / 3), a.out / "quick"
    tasks = [(q, n, s) for q, n, s in tasks if (not a.presets or q in a.presets)]
    if a.seeds: tasks = sorted({(q, n, s) for q, n, _ in tasks for s in a.seeds})
    a.out.mkdir(parents=True, exist_ok=True)
    from synapse_nb.studies.simulate import PRESETS
    rows = []
    for preset, n, seed in tasks:
        print(f"\npreset {preset} {PRESETS[preset].version}, {n:,} training trials, seed {seed}; single trials, unseen pictures, one person; 200-way (chance 0.5 / 2.5 %, two-way 50), 27-way (3.70), 8-way (12.5)", flush=True)
        cells = {}
        for name in OURS + PEERS + CEILINGS:
            wanted = not a.report and (not a.models or name in a.models) and not (a.quick and name == "attainable" or preset != "easy" and name == "genie")
            path = a.out / f"{preset}-{n}-{seed}-{name.replace(':', '.')}.npz"
            if wanted and not path.exists():
                try: cell(preset, n, seed, name, a)
                except Exception as e: print(f"  {name:32s} failed: {type(e).__name__}: {e}", flush=True); continue
            cells[name] = load(path) if path.exists() else None
            print(describe(name, cells[name]), flush=True)
        rows += judged(preset, n, seed, cells)
    for r in rows: print(f"{'ok  ' if r['holds'] else 'MISS'} {r['what']}: {r['ours']:.3f} (bar {r['bar']})" + (f" [{r['interval'][0]:.3f}, {r['interval'][1]:.3f}]" if "interval" in r else ""))
    print(json.dumps({"rows": rows, "holds": all(r["holds"] for r in rows) if rows else None}))


def judged(preset, n, seed, cells):
    "The bars that these cells can answer."
    from scipy.stats import spearmanr
    rows, have = [], {k: v for k, v in cells.items() if v is not None and "rank" in v}
    mine, theirs = [k for k in OURS if k in have], [k for k in PEERS if k in have]
    if mine and theirs:
        best = "encoding" if "encoding" in mine else max(mine, key=lambda k: have[k]["facts"]["val"]); peer = min(theirs, key=lambda k: have[k]["rank"].mean())
        ratio, low, high = compare(have[best], have[peer])
        rows.append(dict(what=f"{preset} {n} seed {seed}: {best} / {peer}, S_eff ({len(theirs)} peers run)", ours=ratio, peer=peer, ratio=ratio, interval=[low, high], bar=">= 1.1, interval above 1", holds=bool(ratio >= 1.1 and low > 1)))
    if mine and "attainable" in have:
        top5 = lambda c: (c["rank"] < 5).mean() - .025
        best = "encoding" if "encoding" in mine else mine[0]
        rows.append(dict(what=f"{preset} {n} seed {seed}: {best}, part of attainable({n}) above chance, top-5", ours=float(top5(have[best]) / top5(have["attainable"])), bar=">= 0.5" if preset == "meg" else "told", holds=bool(preset != "meg" or top5(have[best]) >= .5 * top5(have["attainable"]))))
    if mine and preset == "easy" and "genie" in have:
        top1 = lambda c: (c["rank"] < 1).mean() - .005
        rows.append(dict(what=f"easy {n} seed {seed}: encoding, part of the genie bound above chance, top-1", ours=float(top1(have["encoding"]) / top1(have["genie"])), bar=">= 0.85", holds=bool(top1(have["encoding"]) >= .85 * top1(have["genie"]))))
    nets = [k for k in PUBLISHED if f"braindecode:{k}" in have]
    if preset == "eeg2" and len(nets) == len(PUBLISHED):
        rho = spearmanr([PUBLISHED[k] for k in nets], [-have[f"braindecode:{k}"]["rank"].mean() for k in nets]).statistic
        learnt = sum(two_way(have[f"braindecode:{k}"]["rank"]) > .52 for k in nets)                          # 2,400 trials of 200 pictures: the standard error of chance is about 0.8 points
        rows.append(dict(what=f"eeg2 {n} seed {seed}: rank correlation with the published order of {len(nets)} networks, {learnt} of which are above chance", ours=float(rho), bar=">= 0.8, all above chance", holds=bool(rho >= .8 and learnt == len(nets))))
    return rows


if __name__ == "__main__": main()
