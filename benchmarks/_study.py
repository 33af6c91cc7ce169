"The simulated study against what real recordings give (SIMULATOR's targets): every column that can be computed, the checks, and the directions. Finished people are kept in a folder."
import json
from pathlib import Path

import numpy as np

HELD = (300, 301)                       # people that nothing was set on
# preset: (low, high) in %: genie top-1, top-5; ridge top-1, top-5 on single trials; linear on the mean of 12 trials, of 80 trials, top-1; 27 categories by genie, by a linear decoder
TARGETS = {"easy": dict(genie1=(75, 100), ridge1=(25, 100), genie27=(40, 100), linear27=(25, 100)),
           "meg": dict(genie1=(10, 14), genie5=(28, 34), ridge1=(1, 2.5), ridge5=(5, 9), linear12=(6, 13), genie27=(8, 10), linear27=(5, 6)),
           "eeg2": dict(genie1=(2.5, 4), genie5=(9, 13), ridge1=(.8, 1.3), ridge5=(3.5, 6), linear80=(10, 25), genie27=(5.5, 7), linear27=(4.2, 5)),
           "eeg1": dict(genie1=(1.5, 2.5), genie5=(6, 9), ridge1=(.6, 1), ridge5=(3, 4.5), linear12=(2, 5), genie27=(5, 6), linear27=(3.9, 4.4))}
LOOSE = ("genie1", "genie5", "genie27", "linear27")                      # defaults of the specification, to be kept within a factor 1.5
NAMES = dict(genie1="genie, top-1", genie5="genie, top-5", ridge1="ridge, single trials, top-1", ridge5="ridge, single trials, top-5", linear12="ridge, mean of 12, top-1", linear80="ridge, mean of 80, top-1", genie27="genie, 27 categories",
             linear27="ridge, 27 categories", net1="best network, single trials, top-1", net5="best network, single trials, top-5", net80="best network, mean of 80, top-1")
BACK = "Pz P3 P7 O1 Oz O2 P4 P8 P1 P5 PO7 PO3 POz PO4 PO8 P6 P2".split()  # THINGS-EEG2's seventeen
unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)


def row(what, ours, bar, holds): return dict(what=what, ours=ours, peer=None, ratio=None, bar=bar, holds=bool(holds))


def kept(folder, name, make):
    "A result that is computed once: JSON in `folder`."
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True); v = make()
        tmp = path.with_suffix(".tmp"); tmp.write_text(json.dumps(v, default=float)); tmp.replace(path)
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------------------------ who knows all but the picture
def of_category(b, g, mean, cov):
    "Log likelihood (n,) of trials (b (n, K), G (n, K, K)) when the drives are N(mean, cov): the picture is any of its category."
    u = b - g @ mean; m = np.eye(len(mean)) + cov @ g
    return b @ mean - np.einsum("k,nkl,l->n", mean, g, mean) / 2 + (u * np.linalg.solve(m, (u @ cov)[..., None])[..., 0]).sum(1) / 2 - np.linalg.slogdet(m)[1] / 2


def genie(preset, seed, repeats=2):
    "Top-1, top-5, two-way of 200 and balanced accuracy of 27 categories for one who knows all but the picture (%)."
    from synapse_nb.evaluate.ceiling import log_likelihood, ranks
    from synapse_nb.studies.simulate import evidence, make_things, plan_trials, trial_blocks
    d = plan_trials(preset, 12, seed, test_repeats=repeats, subject_sd=0.); m, plan, cat = d["model"], d["plan_test"], d["table_test"].category.to_numpy()
    many, t = make_things(27 * 150, 1, seed, key="candidates"); names = np.unique(t.category); drives = m.drives(many)
    groups = [(v.mean(0), np.cov(v.T)) for c in names for v in [drives[(t.category == c).to_numpy()]]]
    b, g = (np.concatenate(v) for v in zip(*[evidence(m, x - known, plan, rows) for rows, x, known in trial_blocks(m, d["z_test"], "test", plan=plan, block=200)]))
    r = ranks(log_likelihood(b, g, m.drives(d["gallery"])), d["target"]); hit = names[np.stack([of_category(b, g, *v) for v in groups], 1).argmax(1)] == cat
    return dict(genie1=100 * (r < 1).mean(), genie5=100 * (r < 5).mean(), genie2=100 * (1 - r.mean() / 199), genie27=100 * np.mean([hit[cat == c].mean() for c in np.unique(cat)]))


# ------------------------------------------------------------------------------------------------ linear decoders
def steps(m, z, key, plan):
    "Trials as means of 24 ms from 40 to 640 ms after onset, (n, C, steps) float32, in units of their spread; and the steps' centres (s)."
    from synapse_nb.studies.simulate import trial_blocks
    at, step = np.flatnonzero((m.times >= .04) & (m.times < .64)), max(1, round(.024 * m.sfreq)); at = at[:len(at) // step * step]
    means = lambda x: x[:, :, at].reshape(*x.shape[:2], -1, step).mean(-1)
    x = np.concatenate([means(x) for _, x, _ in trial_blocks(m, z, key, plan=plan, block=200)])
    return x / (m._white ** .5), m.times[at].reshape(-1, step).mean(1)


def whitener(X, n=80, clip=4.):
    "A function of trials (n, C, steps): channels limited to `clip` sd, then the `n` largest whitened directions, from what training trials say."
    mean = X.mean(0); sd = (X - mean).std((0, 2))[:, None]; a = ((X - mean) / sd).clip(-clip, clip)
    v, u = np.linalg.eigh(np.einsum("nct,ndt->cd", a, a, optimize=True).astype(float) / a[:, 0].size); space = (u / np.sqrt(v + 1e-3 * v.mean())).T[-n:].astype(np.float32)
    return lambda x: space @ ((x - mean) / sd).clip(-clip, clip)


class Ridge:
    "Least squares with a penalty, from sums over trials, so that parts of the trials and other penalties cost little."
    def __init__(self, A, Y): self.mean, self.n = A.mean(0), len(A); self.C, self.R = ((A - self.mean).T @ (A - self.mean)).astype(float), (A - self.mean).T @ Y
    def __call__(self, B, penalty): return (B - self.mean) @ np.linalg.solve(self.C + penalty * self.n * np.eye(len(self.C)), self.R)


def two_way(P, G, right): from synapse_nb.evaluate.ceiling import ranks; return 100 * (1 - ranks(unit(P) @ unit(G).T, right).mean() / (len(G) - 1))


def linear(preset, seed, n=20_000, penalties=(.1, .3, 1, 3, 10), slim=False):
    """Ridge on `n` single trials to the picture's features and to its category, its penalties chosen on concepts taken from training: scores of single trials and of answers averaged over a picture's trials (%).

    And what the study must show: more trials help, another person's trials help less, most lies at the back (EEG), and when."""
    from synapse_nb.evaluate.ceiling import ranks
    from synapse_nb.studies.simulate import _plan_trials, make_things, plan_trials
    k = 80 if preset == "eeg2" and not slim else 12
    d = plan_trials(preset, n, seed, test_repeats=k, subject_sd=0.); m, z, target, concept = d["model"], d["z"], d["target"], d["table"].concept.to_numpy()
    X, centre = steps(m, z, "train", d["plan"]); Xt, _ = steps(m, d["z_test"], "test", d["plan_test"])
    zc, tc = make_things(27 * 60, 1, seed, key="categories"); Xc, _ = steps(m, zc, "categories", _plan_trials(m, zc, "categories"))
    w = whitener(X); flat = lambda x: np.concatenate([w(x[i:i + 500]).reshape(len(x[i:i + 500]), -1) for i in range(0, len(x), 500)])
    names = np.unique(tc.category); one = (d["table"].category.to_numpy()[:, None] == names) - 1 / 27; zm = z.mean(0); G = d["gallery"] - zm
    groups = np.unique(concept); held = np.isin(concept, np.random.default_rng(seed).permutation(groups)[:len(groups) // 8])
    A, B = flat(X), flat(Xt); Y = np.column_stack([z - zm, one]); part = Ridge(A[~held], Y[~held]); pictures, right = np.unique(z[held], axis=0, return_inverse=True)
    tried = {p: part(A[held], p) for p in penalties}; best = {p: two_way(v[:, :64], pictures - zm, right.ravel()) for p, v in tried.items()}; p = max(best, key=best.get)
    pc = max(tried, key=lambda q: (tried[q][:, 64:] * one[held]).sum() / np.linalg.norm(tried[q][:, 64:]))
    whole = Ridge(A, Y); P, logits = whole(B, p)[:, :64], whole(flat(Xc), pc)[:, 64:]
    mean = lambda s, j: np.stack([s[:200 * j][target[:200 * j] == i].mean(0) for i in range(200)])
    tops = lambda s, t: [100 * float((ranks(s, t) < j).mean()) for j in (1, 5)] + [100 * (1 - ranks(s, t).mean() / 199)]
    out, similar, y = dict(penalty=p, penalty_category=pc, validation=best[p], repeats=k), unit(P) @ unit(G).T, np.searchsorted(names, tc.category)
    for j in {1, 12, k}: out[f"linear_{j}"] = tops(similar, target) if j == 1 else tops(mean(similar, j), np.arange(200))
    out["linear27"] = 100 * np.mean([(logits.argmax(1) == y)[y == c].mean() for c in range(27)])
    out["pairs"] = 100 * np.mean([((logits[i, a] > logits[i, b]) == (y[i] == a)).mean() for a in range(27) for b in range(a) for i in [np.flatnonzero((y == a) | (y == b))]])
    return out | directions(d, m, A, B, X, Xt, Y, G, p, w, centre, seed, slim)


def directions(d, m, A, B, X, Xt, Y, G, p, w, centre, seed, slim):
    "Two-way identification (%) of the mean of 12 trials by ridge: from fewer trials, with another person's, from the back only, from one step in time."
    from synapse_nb.studies.simulate import EEG_NAMES, plan_trials
    n, target = len(A), d["target"][:2400]; Y = Y[:, :64]
    score = lambda P: two_way(np.stack([P[:2400][target == i].mean(0) for i in range(200)]), G, np.arange(200)); out = {}
    out["trials"] = {j: score(Ridge(A[:j], Y[:j])(B[:2400], p)) for j in (n // 8, n // 4, n // 2, n)}
    S = lambda x: w(x).transpose(2, 0, 1); a, b = S(X), S(Xt[:2400])
    out["times"] = dict(zip(np.round(1000 * centre).astype(int).tolist(), [score(Ridge(u, Y)(v, p)) for u, v in zip(a, b)]))
    if m.modality == "eeg":
        back = [EEG_NAMES.index(c) for c in BACK]; wb = whitener(X[:, back]); F = lambda x: wb(x[:, back]).reshape(len(x), -1)
        out["back"] = score(Ridge(F(X), Y)(F(Xt[:2400]), p)); out["all"] = out["trials"][n]
    if m.preset.name == "eeg2" and not slim:
        o = plan_trials(m.preset, n // 2, seed, "sub-02", subject_sd=0.); other, _ = steps(o["model"], o["z"], "train", o["plan"]); other = w(other).reshape(len(other), -1); h = n // 2
        out["with_other"] = score(Ridge(np.concatenate([A[:h], other]), np.concatenate([Y[:h], o["z"] - o["z"].mean(0)]))(B[:2400], p))
    return out


def four_electrodes(seed, n=1000):
    "AUC of LDA between two categories on TP9, AF7, AF8, TP10, as an N170 study with a headset has it: preset easy as EEG, a picture a second; means of 24 ms to 640 ms, five-fold over pictures."
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import cross_val_predict
    from synapse_nb.studies.simulate import EEG_NAMES, TrialModel, _plan_trials, make_things
    m = TrialModel("easy", seed, modality="eeg", soa=1., subject_sd=0.); z, t = make_things(n, 1, seed, n_categories=2, key="twin")
    x, _ = steps(m, z, "twin", _plan_trials(m, z, "twin")); y = t.category.to_numpy() == t.category[0]
    x = x[:, [EEG_NAMES.index(c) for c in "TP9 AF7 AF8 TP10".split()]].reshape(n, -1)
    return float(roc_auc_score(y, cross_val_predict(LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"), x, y, method="decision_function")))


# ------------------------------------------------------------------------------------------------ bounds
def knows_more(seed, n=600, repeats=3):
    "Top-1 of 200 of the genie, the encoding decoder and ridge on the same trials of one person of preset easy (60 sensors; every second person answers more weakly); `errors`: by how many standard errors (over pictures) each decoder is above the genie."
    from synapse_nb.evaluate.ceiling import oracle, ranks
    from synapse_nb.models.encoding import EncodingDecoder
    from synapse_nb.studies.simulate import simulate_trials
    d = simulate_trials("easy", n, seed, test_repeats=repeats, n_meg=60, snr=(1.6, .6)[seed % 2]); m, X, Xt, G, target = d["model"], d["X"], d["X_test"], d["gallery"], d["target"]
    w = tuple(np.searchsorted(m.times, (.04, .6)).tolist())
    e = EncodingDecoder(step=5, window=w, rounds=40).fit(X, d["z"], d["table"].concept.to_numpy())
    means = lambda x: x[:, :, w[0]:w[1]][:, :, :(w[1] - w[0]) // 5 * 5].reshape(*x.shape[:2], -1, 5).mean(-1)
    white = whitener(means(X)); short = lambda x: white(means(x)).reshape(len(x), -1)
    zm = d["z"].mean(0); similar = dict(genie=oracle(m, Xt, d["plan_test"], np.arange(len(Xt)), G, d["known_test"]), encoding=e.log_likelihood(Xt, G),
                                        ridge=unit(Ridge(short(X), d["z"] - zm)(short(Xt), .3)) @ unit(G - zm).T)
    hit = {k: np.array([(ranks(s, target) < 1)[target == i].mean() for i in range(len(G))]) for k, s in similar.items()}
    more = [hit[k] - hit["genie"] for k in ("encoding", "ridge")]
    return {k: float(v.mean()) for k, v in hit.items()} | dict(errors=[float(v.mean() / max(v.std(ddof=1) / len(v)**.5, 1e-9)) for v in more])


def without_signal(seed, n=200, n_test=60, draws=199):
    "p of two-way identification by ridge when pictures are exchanged, in a study whose responses are zero (preset easy, 30 sensors at 100 Hz); ties broken at random, so that it can be uniform."
    from synapse_nb.evaluate.ceiling import ranks
    from synapse_nb.studies.simulate import simulate_trials
    d, g = simulate_trials("easy", n, seed, n_test=n_test, test_repeats=2, snr=0., n_meg=30, window=(-.1, 60, 100.)), np.random.default_rng(seed)
    flat = lambda x: (x[:, :, 10:50].reshape(len(x), x.shape[1], -1, 5).mean(-1).reshape(len(x), -1)); A, B = flat(d["X"]), flat(d["X_test"]); sd = A.std(0); zm = d["z"].mean(0)
    similar = unit(Ridge(A / sd, d["z"] - zm)(B / sd, .3)) @ unit(d["gallery"] - zm).T
    value = lambda t: ranks(similar, t).mean()
    own, null = value(d["target"]), np.array([value(g.permutation(n_test)[d["target"]]) for _ in range(draws)])
    return float(((null < own).sum() + g.uniform() * (1 + (null == own).sum())) / (draws + 1))


# ------------------------------------------------------------------------------------------------ rows
def networks(folder):
    "Best network of fidelity.py's finished cells on preset eeg2 (%), or None."
    cells = []
    for f in sorted(Path(folder).glob("[0-9]*-*.npz")):
        if f.name.endswith((".part.npz", ".tmp.npz")) or f.stem.split("-")[1] in ("ridge", "encoding"): continue
        with np.load(f) as c:
            if "mean_80" in c.files: cells.append((f.stem.split("-")[1], 100 * (c["rank"] < 1).mean(), 100 * (c["rank"] < 5).mean(), 100 * (c["mean_80"] < 1).mean()))
    return {k: max((c[i], c[0]) for c in cells) for i, k in ((1, "net1"), (2, "net5"), (3, "net80"))} if cells else {}


def judge(preset, version, key, value, note=""):
    low, high = TARGETS[preset][key]; slack = 1.5 if key in LOOSE else 1
    return row(f"preset {preset} {version}, {NAMES[key]}{note} (%)", round(float(value), 2), f"{low}-{high}" + (" x 1.5" if slack > 1 else ""), low / slack - 1e-9 <= value <= high * slack + 1e-9)


def calibration(quick, folder="runs/truth"):
    "Frozen presets against what real recordings give, on people and pictures that nothing was set on."
    from synapse_nb.evaluate.ceiling import expected_topk
    from synapse_nb.studies.simulate import PRESETS
    mean, genies, linears = lambda vs, k: float(np.mean([v[k] for v in vs])), {}, {}
    for p in TARGETS:
        v = PRESETS[p].version
        if quick:
            yield judge(p, v, "genie1", 100 * np.mean([expected_topk(expected_s(p, s)) for s in range(300, 304)]), ", closed form")
            continue
        g = genies[p] = [kept(folder, f"genie-{p}-{v}-{s}", lambda p=p, s=s: genie(p, s)) for s in range(300, 308)]
        for k in ("genie1", "genie5", "genie27"):
            if k in TARGETS[p]: yield judge(p, v, k, mean(g, k), ", 8 people")
        l = linears[p] = [kept(folder, f"linear-{p}-{v}-{s}", lambda p=p, s=s: linear(p, s)) for s in HELD]; at = lambda k, i=0: float(np.mean([x[k][i] for x in l]))
        for k, value in (("ridge1", at("linear_1")), ("ridge5", at("linear_1", 1)), ("linear12", at("linear_12")), ("linear80", at("linear_80") if p == "eeg2" else 0), ("linear27", mean(l, "linear27"))):
            if k in TARGETS[p]: yield judge(p, v, k, value, f", {len(l)} people")
        print(f"  preset {p}, ridge, top-1 / top-5 / two-way: " + "   ".join(f"mean of {k}: " + " / ".join(f"{at(f'linear_{k}', i):.2f}" for i in range(3)) for k in (1, 12, 80) if f"linear_{k}" in l[0]), flush=True)
    v = film_second(range(300, 304)); yield row(f"preset film {PRESETS['film'].version}, genie: a second is worth so many pictures of meg", round(v, 2), "2-4 (set: 3)", 2 <= v <= 4)
    if not quick: yield from checks(genies, linears, folder)
    best = networks("runs/fidelity")
    for p, k, goal in (("eeg2", "net1", (1.5, 2.2)), ("eeg2", "net5", (6, 8)), ("eeg2", "net80", (50, 91)), ("meg", "net5", (14, 20)), ("eeg1", "net5", (4, 6))):
        if p == "eeg2" and k in best: yield row(f"preset eeg2, {NAMES[k]} ({best[k][1]}, %)", round(float(best[k][0]), 2), f"{goal[0]}-{goal[1]}", goal[0] <= best[k][0] <= goal[1])
        else: print(f"  preset {p}, {NAMES[k]}: not run (bar {goal[0]}-{goal[1]})", flush=True)


def checks(genies, linears, folder):
    "The specification's checks (line 27) and directions (line 34)."
    at = lambda p, k: float(np.mean([x[k] for x in linears[p]]))
    for p in ("meg", "eeg2"): v = at(p, "pairs"); yield row(f"pairs of categories, linear, single trials, {p} (%)", round(v, 2), "53-58", 53 <= v <= 58)
    v = float(np.mean([kept(folder, f"four-{s}", lambda s=s: dict(auc=four_electrodes(s)))["auc"] for s in (*HELD, 302, 303)])); yield row("two categories on four electrodes, preset easy, AUC", round(v, 3), "0.66-0.70", .66 <= v <= .70)
    e = [x["trials"] for x in linears["eeg2"]]; t = [float(np.mean([list(x.values())[i] for x in e])) for i in range(4)]; gains = np.diff(t)
    yield row("more trials (2.5, 5, 10, 20 thousand), two-way of the mean of 12, gain a doubling, least", round(float(gains.min()), 2), "> 0, no plateau", gains.min() > 0 and gains[-1] > gains.mean() / 2)
    other = at("eeg2", "with_other"); yield row("10 thousand trials and 10 thousand of another person / of one's own: part of the gain", round((other - t[2]) / max(t[3] - t[2], 1e-9), 2), "< 1", other - t[2] < t[3] - t[2])
    order = [np.mean([g["genie5"] for g in genies[p]]) for p in ("meg", "eeg2", "eeg1")]; lin = [np.mean([x["linear_1"][1] for x in linears[p]]) for p in ("meg", "eeg2", "eeg1")]
    yield row("meg > eeg2 > eeg1, genie and ridge, top-5 of single trials", " > ".join(f"{a:.1f}" for a in order) + ", " + " > ".join(f"{a:.1f}" for a in lin), "both falling", order[0] > order[1] > order[2] and lin[0] > lin[1] > lin[2])
    v = float(np.mean([(x["back"] - 50) / (x["all"] - 50) for x in linears["eeg2"]])); yield row("17 electrodes at the back / all 63, two-way above chance, mean of 12", round(v, 3), ">= 0.9", v >= .9)
    times = {int(k): np.mean([x["times"][k] for x in linears["eeg2"]]) for k in linears["eeg2"][0]["times"]}; peak = max(times, key=times.get); yield row("peak of decoding over time, eeg2 (ms)", peak, "110-200", 110 <= peak <= 200)


# ------------------------------------------------------------------------------------------------ film
def expected_s(preset, seed, n=24, **changes):
    "S of one unseen picture of 200 for the genie, from the closed form (no noise is drawn): two-way identification averaged over `n` trials, in a typical state of the noise."
    from scipy.stats import norm
    from synapse_nb.evaluate.ceiling import s_eff
    from synapse_nb.studies.simulate import evidence, plan_trials
    d = plan_trials(preset, 12, seed, subject_sd=0., **changes); m, plan, rows = d["model"], d["plan_test"], np.arange(60, 60 + n)
    plan["alpha"][:], plan["drift"][:] = 2, 1
    g, drives, own = evidence(m, np.zeros((n, m.n_chans, m.n_times)), plan, rows)[1], m.drives(d["gallery"]), d["target"][rows]
    delta = drives[own][:, None] - drives[None]; size = np.sqrt(np.einsum("ngk,nkl,ngl->ng", delta, g, delta))
    return s_eff(norm.cdf(size[np.arange(200)[None] != own[:, None]] / 2).mean(), 2, 1)


def film_second(seeds):
    "S of a second of film over that of a picture of preset meg (geometric mean over people)."
    from synapse_nb.studies.simulate import PRESETS
    ratio = [expected_s("film", s) / expected_s("meg", s) for s in seeds]
    return float(np.exp(np.mean(np.log(ratio))) / PRESETS["film"].soa)
