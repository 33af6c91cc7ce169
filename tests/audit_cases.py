"""A foreign pipeline in plain NumPy, honest and with each known leak planted: what `evaluate.audit` must name, and must not name."""
import numpy as np
import pandas as pd

D, C, T, SFREQ, TMIN = 12, 10, 40, 50.0, -0.2
PROTOCOL = {"task": "category:4"}


def study(seed=0, n_pictures=120, repeats=4, snr=0.25, soa=1.2, n_runs=6, order="random", drift=0.6, n_concepts=30, n_classes=4, same_split="image"):
    "Pictures with features; windows with a response to them, noise that drifts, runs with offsets of their own; events and a split by picture."
    g = np.random.default_rng(seed)
    concept = np.arange(n_pictures) % n_concepts
    cat_of = g.permutation(np.arange(n_concepts) % n_classes)
    z = g.normal(size=(n_pictures, D)) + 0.6 * g.normal(size=(n_classes, D))[cat_of[concept]] + 0.6 * g.normal(size=(n_concepts, D))[concept]
    n = n_pictures * repeats
    pic = np.tile(np.arange(n_pictures), repeats)
    pic = g.permutation(pic)
    if order == "block": pic = pic[np.argsort(cat_of[concept[pic]], kind="stable")]
    run = np.arange(n) * n_runs // n
    t = TMIN + np.arange(T) / SFREQ
    W = g.normal(size=(D, C)) / np.sqrt(D)
    W[:, -2:] *= 0.1                                     # the last two are eye channels: hardly any brain in them
    shape = np.exp(-((t[None] - g.uniform(0.12, 0.35, D)[:, None]) / 0.06) ** 2) * (t > 0.04)
    signal = np.einsum("nd,dc,dt->nct", z[pic], W, shape)
    X = snr * 4 * signal + g.normal(size=(n, C, T)) + drift * np.cumsum(g.normal(size=(n, C, 1)), 0) / 8 + 0.3 * g.normal(size=(n_runs, C, 1))[run]
    ev = pd.DataFrame({"trial_id": [f"s{seed}_t{i:05d}" for i in range(n)], "subject": "01", "session": "01", "run": run.astype(str), "onset": 10 + np.arange(n) * soa, "image": [f"p{p:04d}.png" for p in pic],
                       "concept": [f"c{c}" for c in concept[pic]], "category": [f"k{k}" for k in cat_of[concept[pic]]]})
    test_pics = g.permutation(n_pictures)[:n_pictures // 3]
    if same_split == "concept": test_pics = np.flatnonzero(np.isin(concept, g.permutation(n_concepts)[:n_concepts // 3]))
    return {"g": g, "z": z, "pic": pic, "X": X.astype(np.float32), "ev": ev, "test": np.isin(pic, test_pics), "seed": seed}


def ridge(A, B, lam=300.0):
    mu, nu = A.mean(0), B.mean(0)
    W = np.linalg.solve((A - mu).T @ (A - mu) + lam * np.eye(A.shape[1]), (A - mu).T @ (B - nu))
    return lambda Q: (Q - mu) @ W + nu


def flat(X): return X[:, :, :T // 4 * 4].reshape(len(X), X.shape[1], -1, 4).mean(-1).reshape(len(X), -1)


def bacc(y, p): return float(np.mean([np.mean(p[y == k] == k) for k in np.unique(y)]))


def classify(s, X=None, test=None, y=None):
    "One-hot ridge: predictions of the test trials and their balanced accuracy."
    X, test, y = s["X"] if X is None else X, s["test"] if test is None else test, (s["ev"].category.to_numpy() if y is None else y)
    k = np.unique(y)
    p = k[ridge(flat(X)[~test], (y[~test][:, None] == k).astype(float))(flat(X)[test]).argmax(1)]
    return p, bacc(y[test], p)


def embed(s, X=None):
    "Ridge to features: embeddings of test trials, gallery of test pictures, target row, top-1."
    X, test = s["X"] if X is None else X, s["test"]
    E = ridge(flat(X)[~test], s["z"][s["pic"][~test]])(flat(X)[test])
    pics = np.unique(s["pic"][test])
    return E, s["z"][pics], np.searchsorted(pics, s["pic"][test])


def cos(E, G): return (E / np.linalg.norm(E, axis=1, keepdims=True)) @ (G / np.linalg.norm(G, axis=1, keepdims=True)).T


def handed(s, test=None, **kw):
    "Events and split as a foreign lab would hand them over."
    test = s["test"] if test is None else test
    return {"events": s["ev"], "split": {"train": s["ev"].trial_id[~test], "test": s["ev"].trial_id[test]}, "protocol": PROTOCOL, **kw}


def windows(s, X=None, **kw): return {"X": s["X"] if X is None else X, "trial_id": s["ev"].trial_id.to_numpy(), "sfreq": SFREQ, "tmin": TMIN, **kw}


def answers(s, p, test=None, y=None):
    test = s["test"] if test is None else test
    return {"trial_id": s["ev"].trial_id[test].to_numpy(), "y_true": (s["ev"].category.to_numpy() if y is None else y)[test], "y_pred": p}


def clean(seed, **kw):
    "Everything handed over, nothing wrong: categories, embeddings, windows scaled on training, history selected on validation. The study differs with the seed."
    pick = np.random.default_rng(seed)
    kw = {"snr": pick.choice([0.0, 0.1, 0.25, 0.5]), "soa": pick.choice([1.0, 1.5, 3.0]), "drift": pick.choice([0.0, 0.5, 2.0]), "n_classes": int(pick.choice([2, 4, 6])), "n_runs": int(pick.choice([3, 6, 10])), "repeats": int(pick.choice([2, 4])),
          "same_split": pick.choice(["image", "concept"]), **kw}
    s = study(seed, **kw)
    tr, by_run = ~s["test"], pick.random() < 0.3
    if by_run: s["test"] = np.isin(s["ev"].run.astype(int), pick.permutation(kw["n_runs"])[:kw["n_runs"] // 3]); tr = ~s["test"]
    X = s["X"]
    if pick.random() < 0.7: X = (X - X[tr].mean((0, 2), keepdims=True)) / X[tr].std((0, 2), keepdims=True)
    p, _ = classify(s, X)
    E, G, t = embed(s, X)
    g = s["g"]
    h = pd.DataFrame({"epoch_idx": range(10), "val_acc": g.random(10), "test_acc": g.random(10)})
    h["selected"] = h.val_acc == h.val_acc.max()
    order = g.permutation(len(G))
    names = [f"E{i:02d}" for i in range(C - 2)] + ["Fp1", "HEOG"]
    pred = {**answers(s, p), "embeddings": E, "gallery": G[order], "target": np.argsort(order)[t], "picked": cos(E, G[order]).argmax(1), "n_samples": 1}
    what = "new-run" if by_run else "new-concept" if kw["same_split"] == "concept" else "new-image"
    return handed(s, predictions=pred, windows=windows(s, X, ch_names=np.array(names), baseline=np.array([TMIN, 0.0])), history=h) | {"protocol": {"task": f"category:{kw['n_classes']}", "generalise": what, "selection": "val:acc"}}


# ---- one function a leak: (what is handed to the audit, the kind it must name, score with the leak, honest score) ----
def same_image(seed):
    s = study(seed, snr=0.15); test = s["g"].random(len(s["ev"])) < 0.33
    p, leaky = classify(s, test=test); return handed(s, test, predictions=answers(s, p, test)), "same-image", leaky, classify(s)[1]

def same_concept(seed):
    s = study(seed, n_pictures=240); new = np.isin(s["pic"] % 30, np.arange(10)); test = new & (s["pic"] % 2 == 0) & (s["pic"] < 120); y = s["ev"].category.to_numpy(); k = np.unique(y)
    score = lambda tr: k[ridge(flat(s["X"])[tr], (y[tr][:, None] == k).astype(float))(flat(s["X"])[test]).argmax(1)]; p = score(~test)
    return handed(s, test, predictions=answers(s, p, test)) | {"protocol": {**PROTOCOL, "generalise": "new-concept"}}, "same-concept", bacc(y[test], p), bacc(y[test], score(~new))

def same_session(seed):
    s = study(seed); test = s["g"].random(len(s["ev"])) < 0.33; p, leaky = classify(s, test=test)
    return handed(s, test, predictions=answers(s, p, test)) | {"protocol": {**PROTOCOL, "generalise": "new-run"}}, "same-recording", leaky, classify(s, test=(s["ev"].run == "5").to_numpy())[1]

def block_order(seed):
    s = study(seed, snr=0.0, order="block", drift=2.0); test = s["g"].random(len(s["ev"])) < 0.33; p, leaky = classify(s, test=test)
    r = study(seed, snr=0.0, drift=2.0); return handed(s, test, predictions=answers(s, p, test)) | {"protocol": {**PROTOCOL, "generalise": "new-run"}}, "block-order", leaky, classify(r)[1]

def scaler(seed, together=True):
    s = study(seed); te, tr = s["test"], ~s["test"]; honest = classify(s)[1]; X = s["X"].astype(float); sh = X.copy(); sh[te] += 1.5 * s["g"].normal(size=(1, C, 1))     # another day: the test part has moved
    honest = classify(s, sh)[1]; out = sh.copy()
    for part in ([tr | te] if together else [tr, te]): out[part] = (sh[part] - sh[part].mean((0, 2), keepdims=True)) / sh[part].std((0, 2), keepdims=True)
    p, leaky = classify(s, out); return handed(s, predictions=answers(s, p), windows=windows(s, out)), "scaler-on-test", leaky, honest

def scaler_apart(seed):
    s = study(seed); te, tr = s["test"], ~s["test"]; X = s["X"].astype(float); X[te] += 4 * s["g"].normal(size=(1, C, 1)); honest = classify(s, X)[1]
    out = X / X[tr].std((0, 2), keepdims=True); out[te] = (X[te] - X[te].mean((0, 2), keepdims=True)) / X[te].std((0, 2), keepdims=True); p, leaky = classify(s, out)
    return handed(s, predictions=answers(s, p), windows=windows(s, out)), "scaler-on-test", leaky, honest

def session_z(seed):
    s = study(seed, drift=4.0); X = s["X"].astype(float); honest = classify(s, X)[1]; run = s["ev"].run.to_numpy()
    for r in np.unique(run): m = run == r; X[m] = (X[m] - X[m].mean((0, 2), keepdims=True)) / X[m].std((0, 2), keepdims=True)
    p, leaky = classify(s, X); return handed(s, predictions=answers(s, p), windows=windows(s, X)), "session-normalised", leaky, honest

def mvnn(seed):
    s = study(seed); X = s["X"].astype(float); A = s["g"].normal(size=(C, C)); X = np.einsum("dc,nct->ndt", A, X); honest = classify(s, X)[1]
    L = np.linalg.inv(np.linalg.cholesky(np.cov((X - X.mean((0, 2), keepdims=True)).transpose(1, 0, 2).reshape(C, -1)))); Z = np.einsum("dc,nct->ndt", L, X); p, leaky = classify(s, Z)
    return handed(s, predictions=answers(s, p), windows=windows(s, Z)), "whitening-on-test", leaky, honest

def averaged(seed):
    s = study(seed, snr=0.12); ids, pic, test = s["ev"].trial_id.to_numpy(), s["pic"], s["g"].random(len(s["ev"])) < 0.5; rows = [np.flatnonzero(pic == p) for p in np.unique(pic)]; use = [r for r in rows if test[r].any() and (~test[r]).any()]
    A = np.stack([s["X"][r].mean(0) for r in use]); y = s["ev"].category.to_numpy(); k = np.unique(y); f = ridge(flat(s["X"])[~test], (y[~test][:, None] == k).astype(float)); p = k[f(flat(A)).argmax(1)]; yt = y[[r[0] for r in use]]
    fair = k[f(flat(np.stack([s["X"][r[test[r]]].mean(0) for r in use]))).argmax(1)]
    return handed(s, test, predictions={"trial_id": np.array([ids[r[test[r]]][0] for r in use]), "y_true": yt, "y_pred": p, "members": np.array(["|".join(ids[r]) for r in use])}) | {"protocol": {**PROTOCOL, "generalise": "none", "unit": "signal-avg:4"}}, "averaged-across-split", bacc(yt, p), bacc(yt, fair)

def not_said(seed):
    s = study(seed, snr=0.12); E, G, t = embed(s); A = np.stack([E[t == i].mean(0) for i in range(len(G))]); ids = s["ev"].trial_id[s["test"]].to_numpy(); o = s["g"].permutation(len(G))
    return handed(s, predictions={"trial_id": np.array([ids[t == i][0] for i in range(len(G))]), "embeddings": A, "gallery": G[o], "target": np.argsort(o), "members": np.array(["|".join(ids[t == i]) for i in range(len(G))])}), "averaging-not-said", top1(A, G, np.arange(len(G))), top1(E, G, t)

def top1(E, G, t): return float((cos(E, G).argmax(1) == t).mean())

def one_to_one(seed):
    from scipy.optimize import linear_sum_assignment
    s = study(seed, snr=0.3); E, G, t = embed(s); first = np.array([np.flatnonzero(t == i)[0] for i in range(len(G))]); E, t = E[first], np.arange(len(G)); o = s["g"].permutation(len(G)); G, t = G[o], np.argsort(o); S = cos(E, G); p = linear_sum_assignment(-S)[1]
    return handed(s, predictions={"embeddings": E, "gallery": G, "target": t, "picked": p}), "transductive-matching", float((p == t).mean()), top1(E, G, t)

def csls(seed):
    s = study(seed, snr=0.3); E, G, t = embed(s); E = E + 1.5 * G[3] / np.linalg.norm(G[3]); S = cos(E, G); n = lambda A: np.sort(A, 1)[:, -10:].mean(1); p = (2 * S - n(S)[:, None] - n(S.T)[None]).argmax(1)
    return handed(s, predictions={"embeddings": E, "gallery": G, "target": t, "picked": p}), "transductive-matching", float((p == t).mean()), top1(E, G, t)

def queries(seed):
    s = study(seed, snr=0.3); E, G, t = embed(s); E = E + 2 * s["g"].normal(size=(1, D)); Z = (E - E.mean(0)) / E.std(0)
    return handed(s, predictions={"embeddings": Z, "gallery": G, "target": t}), "queries-normalised", top1(Z, G, t), top1(E, G, t)

def epoch(seed, people=1):
    g = np.random.default_rng(seed); h = []
    for sub in range(people):
        e = np.arange(30); acc = 0.3 * (1 - np.exp(-e / 5)) + 0.03 * g.normal(size=30); d = pd.DataFrame({"subject": f"{sub:02d}", "epoch_idx": e, "val_acc": 0.3 * (1 - np.exp(-e / 5)) + 0.03 * g.normal(size=30), "test_acc": acc}); d.loc[d.val_acc.idxmax(), "val_acc"] += 0.05
        d["selected"] = d.test_acc == d.test_acc.max(); d.loc[d.test_acc.idxmax(), "val_acc"] -= 0.2; h.append(d)
    h = pd.concat(h); fair = np.mean([d.test_acc[d.val_acc.idxmax()] for _, d in h.reset_index(drop=True).groupby("subject")])
    return {"history": h, "protocol": PROTOCOL}, "selected-on-test" if people == 1 else "best-epoch-per-person", float(h.test_acc[h.selected].mean()), float(fair)

def epoch_each(seed): return epoch(seed, 6)

def duplicates(seed):
    s = study(seed, snr=0.3); E, G, t = embed(s); G2 = np.vstack([G, G[:10]]); S = cos(E, G2); hit = np.isclose(S[np.arange(len(t)), t], S.max(1))
    return handed(s, predictions={"embeddings": E, "gallery": G2, "target": t}), "duplicates-in-gallery", float(hit.mean()), top1(E, G, t)

def hubs(seed):
    s = study(seed, snr=0.3); E, G, t = embed(s); B = E + 6 * G[3] / np.linalg.norm(G[3])
    return handed(s, predictions={"embeddings": B, "gallery": G, "target": t}), "hubs", top1(B, G, t), top1(E, G, t)

def ties(seed):
    s = study(seed); E, G, t = embed(s); K = np.ones_like(E); o = s["g"].permutation(len(G)); S = cos(K, np.ones_like(G))
    return handed(s, predictions={"embeddings": K, "gallery": np.ones_like(G), "target": np.argsort(o)[t], "claimed_metric": "top_1", "claimed_value": 1.0}), "ties", float((S[np.arange(len(t)), t] >= S.max(1)).mean()), 1 / len(G)

def gallery_order(seed):
    s = study(seed); E, G, t = embed(s); E = E[[np.flatnonzero(t == i)[0] for i in range(len(G))]]; B = E.copy(); B[s["g"].random(len(B)) < 0.4] = 0; S = cos(B + 1e-30, G); S[(B == 0).all(1)] = 0
    return handed(s, predictions={"embeddings": B, "gallery": G, "target": np.arange(len(G))}), "gallery-order", float((np.diag(S) >= S.max(1)).mean()), top1(E, G, np.arange(len(G)))

def eyes(seed):
    s = study(seed, snr=0.03); k = s["ev"].category.str[1].astype(int).to_numpy(); X = s["X"].copy(); X[:, -1] += 0.5 * (k[:, None] - 1.5) * (np.arange(T) > 20); p, leaky = classify(s, X)
    return handed(s, predictions=answers(s, p), windows=windows(s, X, ch_names=np.array([f"E{i}" for i in range(C - 1)] + ["HEOG"]))), "eye-signal", leaky, classify(s, X[:, :-1])[1]

def trigger(seed):
    s = study(seed, snr=0.03); k = s["ev"].category.str[1].astype(int).to_numpy(); X = s["X"].copy(); honest = classify(s)[1]; X[:, 4] = (k[:, None] + 1) * ((np.arange(T) > 10) & (np.arange(T) < 16)); p, leaky = classify(s, X)
    return handed(s, predictions=answers(s, p), windows=windows(s, X, ch_names=np.array([f"E{i}" for i in range(C)]))), "trigger-channel", leaky, honest

def previous(seed):
    s = study(seed, soa=0.1, snr=0.0); ev = s["ev"].copy(); r = study(seed, snr=0.0); g = s["g"]; k = g.integers(0, 4, len(ev) // 3 + 1).repeat(3)[:len(ev)]       # each category three times in a row, 100 ms apart
    ev["category"] = [f"k{i}" for i in k]; ev["image"] = [f"q{i:05d}" for i in range(len(ev))]; s["ev"] = ev; pat = g.normal(size=(4, C, 1)); prev = np.r_[0, k[:-1]]; X = s["X"] + 0.5 * pat[prev] * (np.arange(T) < 15)
    test = (ev.run == "5").to_numpy(); p, leaky = classify(s, X, test); return handed(s, test, predictions=answers(s, p, test), windows=windows(s, X)), "previous-picture", leaky, classify(r)[1]

def baseline(seed):
    s = study(seed, soa=0.5, snr=0.2); test = (s["ev"].run == "5").to_numpy(); s["ev"]["image"] = s["ev"].trial_id; X = s["X"] - s["X"][:, :, :10].mean(2, keepdims=True); p, leaky = classify(s, X, test)
    return handed(s, test, predictions=answers(s, p, test), windows=windows(s, X, baseline=np.array([-0.2, 0.0]))), "baseline-in-response", leaky, classify(s, test=test)[1]

def ringing(seed):
    from scipy.ndimage import gaussian_filter1d
    s = study(seed, snr=0.8, drift=0.0); X = gaussian_filter1d(s["X"].astype(float), 9, axis=2, mode="nearest"); pre = [X[:, :, :10].repeat(4, 2), s["X"][:, :, :10].repeat(4, 2)]; p, leaky = classify(s, X)
    return handed(s, predictions=answers(s, p), windows=windows(s, X)), "before-onset", classify(s, pre[0])[1], classify(s, pre[1])[1]

def overlap(seed):
    s = study(seed, snr=0.0, soa=0.2, order="block"); ev, g = s["ev"], s["g"]; n = len(ev); long = np.cumsum(g.normal(size=(C, n * 10 + T)), 1); X = np.stack([long[:, i * 10:i * 10 + T] for i in range(n)]).astype(np.float32); ev["image"] = ev.trial_id; X -= X.mean(2, keepdims=True)
    test = g.random(n) < 0.33; p, leaky = classify(s, X, test); return handed(s, test, predictions=answers(s, p, test), windows=windows(s, X)), "near-duplicate-windows", leaky, 0.25

def overlap_time(seed): a = overlap(seed); return a[0], "overlapping-windows", *a[2:]

def positional(seed):
    s = study(seed); p, honest = classify(s); y = np.roll(s["ev"].category.to_numpy(), 1); q, leaky = classify(s, y=y); return handed(s, predictions=answers(s, q, y=y)), "labels-by-position", leaky, honest

def trained(seed):
    s = study(seed); y = s["ev"].category.to_numpy(); k = np.unique(y); tr = ~s["test"]; p = k[ridge(flat(s["X"])[tr], (y[tr][:, None] == k).astype(float))(flat(s["X"])).argmax(1)]; every = np.ones(len(y), bool)
    return handed(s) | {"predictions": answers(s, p, every)}, "trained-trials-scored", bacc(y, p), bacc(y[s["test"]], p[s["test"]])

def left_out(seed):
    s = study(seed); p, honest = classify(s); a = answers(s, p); right = a["y_true"] == p; keep = right | (s["g"].random(len(p)) < 0.5); return handed(s, predictions={k: v[keep] for k, v in a.items()}), "test-trials-left-out", bacc(a["y_true"][keep], p[keep]), honest

def twice(seed):
    s = study(seed); ids = s["ev"].trial_id; te = s["test"]; extra = ids[te][:40]; y = s["ev"].category.to_numpy(); k = np.unique(y); tr = ~te | ids.isin(extra).to_numpy(); p = k[ridge(flat(s["X"])[tr], (y[tr][:, None] == k).astype(float))(flat(s["X"])[te]).argmax(1)]
    return handed(s, predictions=answers(s, p)) | {"split": pd.concat([pd.DataFrame({"trial_id": ids[tr], "part": "train"}), pd.DataFrame({"trial_id": ids[te], "part": "test"})])}, "same-trial", bacc(y[te], p), classify(s)[1]

def best_of(seed):
    s = study(seed, snr=0.2); E, G, t = embed(s); many = np.stack([E + 1.0 * s["g"].normal(size=E.shape) for _ in range(10)]); sim = np.stack([cos(m, G)[np.arange(len(t)), t] for m in many]); B = many[sim.argmax(0), np.arange(len(t))]
    return handed(s, predictions={"embeddings": B, "gallery": G, "target": t, "n_samples": 10}), "best-of-n", top1(B, G, t), top1(many[0], G, t)

def beyond(seed):
    s = study(seed, snr=0.1); E, G, t = embed(s); honest = top1(E, G, t); B = E + 1.5 * np.linalg.norm(E, axis=1, keepdims=True) * G[t] / np.linalg.norm(G[t], axis=1, keepdims=True)          # the answer went into the query
    return handed(s, predictions={"embeddings": B, "gallery": G, "target": t, "ceiling_metric": "top_1", "ceiling_value": min(honest + 0.1, 0.9)}), "above-the-ceiling", top1(B, G, t), honest

CASES = [same_image, same_concept, same_session, block_order, scaler, scaler_apart, session_z, mvnn, averaged, not_said, one_to_one, csls, queries, epoch, epoch_each, duplicates, hubs, ties, gallery_order,
         eyes, trigger, previous, baseline, ringing, overlap, overlap_time, positional, trained, left_out, twice, best_of, beyond]
