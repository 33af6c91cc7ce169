"""Alignment against the naive way on simulated sessions whose truth is known.

    python benchmarks/alignment.py [--quick] [--sessions N] [--seed S] [--verbose]

A session is a trigger or photodiode trace at 1 kHz, made from the instants at which the light changed (the truth), and the log of when each
picture or pulse frame was expected. Faults are drawn from a grid. *Before anything is aligned* the generator says from the faults alone
whether the session is recoverable: "yes", "no", or "open". Open means that both answers are right, though a wrong frame never is: more than 10 %
lost or extra; an evenly spaced train one of whose ends rests on a pulse that may itself be among the lost ones (with 5 % lost, the first pulse
after a silence is the second one in one session of twenty; nothing in the recording says so: whoever accepts those is wrong in 5 % of them);
a clock reset by whole intervals of an even train, or with fewer than four pictures or two whole breaks to tell a side of it; fewer than 20 pulses
with unequal gaps.

Three faults are not drawn, because nobody could see them: they leave sample for sample the recording of another session, whose truth is another one
and which counts as recoverable. Of an evenly spaced train of which an end was cut: another session's log (it only has another length, or other ids, and
those were cut off); a clock reset by whole intervals; a burst of losses over an end. The log stays whole, the jump is moved off the beat, the burst away from the ends.

Every frame that the recording holds is scored. Frames that fell into dropped samples have no instant in the recording, and are not. Where a clock was
reset, the frames between the third-last pulse before and the third one after it may be declared unknown, which is counted (all of an even series, when
the jump is a whole number of its intervals); anywhere else that is an error.
The naive way is a fixed threshold (half-way) and matching by position when the counts agree.
Nothing here shares a constant with the aligner.
"""
import argparse, json, os, sys, time
from dataclasses import dataclass, field

import numpy as np

FS = 1000.
GRID = dict(lost=(0, .02, .05, .1, .15, .2), extra=(0, .02, .05, .1, .15, .2), jitter=(0, 1e-3, 2e-3, 5e-3), drift=(-500, -120, 0, 60, 500), snr=(100, 20, 10, 5, 3))

@dataclass
class Session:
    kind: str; x: np.ndarray; expected: np.ndarray; truth: np.ndarray; seen: np.ndarray; inside: np.ndarray
    recoverable: str; why: str; faults: dict = field(default_factory=dict); frame: float = 0.; between: np.ndarray = None      # instants of the frames without a pulse
    hidden: np.ndarray = None                                                               # expected between the last pulse before and the first after a reset

def _film(r, fps, ids, pulses):
    "Expected pulse times of a film: id pulses (video, part), black between, then one pulse per two frames. Returns times, where the film starts."
    t, at = [], 0.
    if ids:
        for count in ids:
            t += [at + 2*k/fps for k in range(count)]; at = t[-1] + r.uniform(1., 2.)
    return np.r_[np.array(t), at + 2*np.arange(pulses)/fps], len(t)

def _expected(kind, r, seconds):
    if kind in ("film", "bare film"):
        fps = float(r.choice([29.97002997, 25.])); ids = (int(r.integers(1, 11)), int(r.integers(1, 10))) if kind == "film" else None
        t, first = _film(r, fps, ids, int(seconds*fps/2)); return t, first, 1/fps
    if kind == "pictures": return 3 + np.cumsum(r.uniform(1.3, 1.7, max(40, int(seconds/1.5)))), 0, None
    blocks = []; at = 2.; soa = float(r.choice([.1, .2]))                                   # rapid series with breaks of uneven length
    while at < seconds: blocks.append(at + soa*np.arange(80)); at = blocks[-1][-1] + r.uniform(2., 9.)
    return np.concatenate(blocks), 0, None

def _union(on, off):
    "Merge overlapping on-times; also which of the given ones begin in the open."
    o = np.argsort(on); on, off = on[o], off[o]; reach = np.maximum.accumulate(off); new = np.r_[True, on[1:] > reach[:-1] + .002]
    first = np.flatnonzero(new); open_ = np.zeros(len(on), bool); open_[o] = new
    return on[first], np.maximum.reduceat(off, first), open_

def _trace(r, on, off, n, faults):
    from scipy.ndimage import uniform_filter1d
    d = np.zeros(n + 2); amp = 1 + faults["unequal"]*r.uniform(-1, 1, len(on))
    for t, a in ((on, amp), (off, -amp)):
        p = np.clip(t*FS + .5, 0, n); k = p.astype(int); np.add.at(d, k, a*(1 - (p - k))); np.add.at(d, k + 1, a*(p - k))
    x = np.cumsum(d)[:n]
    if faults["rise"] > 1: x = uniform_filter1d(x, faults["rise"])
    if faults["wander"]: x = x + faults["wander"]*(np.sin(2*np.pi*np.arange(n)/FS/r.uniform(40, 120) + r.uniform(0, 6)) + .3*np.cumsum(r.normal(size=n))/np.sqrt(30*FS))
    x = x + r.normal(size=n)/faults["snr"]
    return faults["offset"] + faults["scale"]*(-x if faults["flipped"] else x)

def simulate(seed: int) -> Session:
    "One session; the same for the same seed."
    r = np.random.default_rng([20260, seed]); kind = str(r.choice(["film", "bare film", "pictures", "rapid"], p=[.4, .2, .25, .15]))
    f = {k: float(r.choice(v)) for k, v in GRID.items()}
    if r.random() < .5: f["lost"] = min(f["lost"], float(r.choice([0, .02])));
    if r.random() < .5: f["extra"] = min(f["extra"], float(r.choice([0, .02])))
    seconds = float(r.choice([60, 120, 240, 600, 900], p=[.35, .3, .2, .1, .05]))
    f |= dict(burst=float(r.uniform(1, 10)) if r.random() < .15 else 0., ends=str(r.choice(["", "start", "end", "both"], p=[.64, .12, .12, .12])), flipped=bool(r.random() < .3), wander=float(r.uniform(.5, 4)) if r.random() < .25 else 0.,
              rise=int(r.choice([1, 3])), unequal=float(r.choice([0, .2])), offset=float(r.choice([0, 5, -2.])), scale=float(r.choice([1, 4.3, .05])),
              reset=float(r.choice([-1, 1])*r.uniform(.02, 2)) if r.random() < .08 else 0., rate=bool(kind.endswith("film") and r.random() < .08), swapped=bool(r.random() < .06))
    if f["swapped"]:
        f["rate"], f["reset"] = False, 0.
        if kind == "bare film" or (kind == "film" and f["ends"] in ("start", "both")): f["ends"] = ""      # without an end and without ids nobody can tell one even film from another
    e, first, frame = _expected(kind, r, seconds); true_e = e.copy()
    if f["rate"]: true_e = e*(29.97002997/25 if abs(1/frame - 29.97) < .1 else 25/29.97002997)
    shown, shown_first = (true_e, first)
    if f["swapped"]: shown, shown_first, frame2 = _expected(kind, r, seconds*r.uniform(.6, 1.5))
    lead, tail = r.uniform(.5, 4), r.uniform(.5, 4); slope = 1 + f["drift"]*1e-6
    light = lead + slope*(shown - shown[0]) + r.uniform(0, 1, len(shown))*f["jitter"]
    width = min(.5*float(np.median(np.diff(shown))), .05); lost = r.random(len(shown)) < f["lost"]
    if f["burst"]: b = _where(r.uniform(), kind, f, light, shown_first); lost |= (light > b) & (light < b + f["burst"])
    stop = light[-1] + tail; extra = np.sort(r.uniform(0, stop, int(round(f["extra"]*len(shown)))))
    on, off, open_ = _union(np.r_[light[~lost], extra], np.r_[light[~lost] + width, extra + r.uniform(.005, .02, len(extra))])
    seen = np.zeros(len(shown), bool); seen[np.flatnonzero(~lost)] = open_[: int((~lost).sum())]
    t0 = light[0] + r.uniform(.1, .3)*(light[-1] - light[0]) if f["ends"] in ("start", "both") else 0.
    t1 = light[-1] - r.uniform(.1, .3)*(light[-1] - light[0]) if f["ends"] in ("end", "both") else stop
    inside = (light > t0 + .05) & (light < t1 - .05); n = int((t1 - t0)*FS); between = None if frame is None else lead + slope*(shown + (frame if not f["rate"] else frame*float(np.median(np.diff(shown))/np.median(np.diff(e)))) - shown[0]) + r.uniform(0, 1, len(shown))*f["jitter"]
    hidden = np.zeros(len(shown), bool)
    if f["reset"]:                                                             # samples dropped (< 0) or blank samples put in
        at = r.uniform(.3, .7)*(light[-1] - light[0]) + light[0]; at = float(np.clip(at, t0 + .1, t1 - .1)); period = float(np.median(np.diff(shown))); beat = abs(abs(f["reset"])/period - round(abs(f["reset"])/period))*period
        f["on_beat"] = bool(kind != "pictures" and beat < 3*f["jitter"] + .003)
        if f["on_beat"] and kind.endswith("film") and f["ends"]: f["reset"] += .3*period*np.sign(f["reset"]); f["on_beat"] = False            # by whole intervals it would leave no trace at all
        c = f["reset"]
        gone = lambda t: (t >= at) & (t < at - c) if c < 0 else np.zeros(len(t), bool)
        seen &= ~gone(light); inside_reset = gone(light); move = lambda t: np.where(t >= at, t + c, t)
        if (k := np.flatnonzero((on < at) & (off > at))).size: off[k] = at - .001
        ok = ~gone(on); on, off = move(on[ok]), move(off[ok]); hit = np.abs(light - at) < width + .01
        f["reset_lost"] = int((inside_reset | ((lost | ~seen) & (np.abs(light - at) < abs(c) + 3*np.median(np.diff(shown))))).sum() + (hit & ~seen).sum())
        k = np.flatnonzero(seen & inside); hidden = _around(light, light[k], at); f["anchors"] = _anchors(light, seen & inside, inside, at); f["poorer"] = int(min((light[k] < at).sum(), (light[k] >= at).sum()))
        if f["on_beat"]: hidden |= _same_series(light, at)
        light = move(light); between = None if between is None else move(between); stop += c; t1 = t1 + c if t1 > at else t1; n = int((t1 - t0)*FS); inside &= ~inside_reset
    ok = (off > t0) & (on < t1); x = _trace(r, on[ok] - t0, off[ok] - t0, n, f)
    answer, why = _recoverable(kind, f, first, inside, seen, light, e, frame)
    if f["swapped"]: light = np.full(len(e), np.nan); seen = inside = hidden = np.zeros(len(e), bool); between = None
    return Session(kind, x, e, light - t0, seen & inside, inside, answer, why, f, frame or .5*float(np.median(np.diff(e))), None if between is None else between - t0, hidden)

def _around(light, pulses, at, n=3):
    "Expected between the `n`-th last pulse before and the `n`-th after the instant `at`."
    before, after = pulses[pulses < at], pulses[pulses >= at]
    return (light > (before[-n] if len(before) >= n else -np.inf)) & (light < (after[n - 1] if len(after) >= n else np.inf))

def _where(u, kind, f, light, first):
    "When a burst of losses begins, `u` in 0..1: anywhere; in an even train of which an end is cut, not over an end (there it would leave no trace: the train would just begin later or end sooner)."
    a, b = light[0], light[-1]; span = b - a
    if not kind.endswith("film") or not f["ends"]: return a + u*span
    lo = a + .3*span if f["ends"] != "end" else light[first]; hi = b - .3*span if f["ends"] != "start" else b
    return lo + 1 + u*(hi - lo - 2 - f["burst"])

def _same_series(light, at):
    "Expected in the same unbroken series as the instant `at`: a jump by whole intervals shows only at the series' next break."
    g = np.r_[0, np.cumsum(np.diff(light) > 1.5*np.median(np.diff(light)))]; k = int(np.clip(np.searchsorted(light, at), 1, len(light) - 1))
    return (g == g[k]) | (g == g[k - 1])

def _anchors(light, got, inside, at):
    "What anchors the poorer side of a reset: breaks (gaps that differ from the usual one) whose both pulses were seen, and the outer end of the train."
    d = np.diff(light); wide = np.flatnonzero(d > 1.5*np.median(d)); wide = wide[got[wide] & got[wide + 1]]
    return int(min((light[wide + 1] < at).sum() + bool(inside[0]), (light[wide] > at).sum() + bool(inside[-1])))

def _recoverable(kind, f, first, inside, seen, light, e, frame):
    "From the faults alone: can anyone know which pulse is which?"
    if f["swapped"]: return "no", "another session's log"
    got = seen & inside
    even = kind.endswith("film")
    if got.sum() < 20: return ("no", "next to nothing recorded") if even else ("open", "fewer than 20 pulses, of unequal gaps")
    cut_start, cut_end = not inside[0], not inside[-1]
    anchored = kind in ("pictures", "rapid") or (kind == "film" and not cut_start)
    clean = f["lost"] == 0 and f["extra"] == 0 and not f["burst"]
    heavy = f["lost"] > .1 or f["extra"] > .1
    if even and f["reset"]:
        if cut_start or cut_end: return "no", "an even train with a clock reset and an end missing: nothing anchors that side of the reset"
        if f["on_beat"]: return "open", "an even train across a clock reset by whole intervals, which looks like lost pulses"
        return ("yes", "a clock reset between two whole ends") if clean and got[0] and got[-1] else ("open", "an even train across a clock reset, and an end may have lost a pulse")
    if kind == "pictures" and f["reset"] and f["poorer"] < 4: return "open", "a clock reset so near a cut end that fewer than four pulses stand beyond it"
    if kind == "rapid" and f["reset"] and (f["anchors"] < 2 or f["on_beat"]): return "open", "a clock reset among even series, and a side of it with fewer than two whole breaks, or a jump by whole intervals"
    if anchored and kind == "film" and not got[: first].sum() >= .8*first: return "open", "most id pulses were lost"
    if anchored: return ("open", "more than 10 % lost or extra") if heavy else ("yes", "anchored")
    if cut_start and cut_end: return "no", "an even train with both ends gone"
    if cut_start or cut_end:
        if clean: return "yes", "one end gone, the other whole"
        return "open", "one end gone, and the other one may have lost a pulse"
    if not (got[0] and got[-1]): return "open", "an end pulse of an even train was lost"
    return ("open", "more than 10 % lost or extra") if heavy else ("yes", "both ends seen")

def naive(s: Session):
    "Half-way threshold, match by position when the counts agree; onsets or None."
    level = (s.x.min() + s.x.max())/2; k = np.flatnonzero((s.x[1:] > level) & (s.x[:-1] <= level)) + 1
    return k/FS if len(k) == len(s.expected) else None

def run(seed: int) -> dict:
    "Simulate, align, compare: one row."
    from synapse_nb.data.align import align
    from synapse_nb.data.triggers import find_pulses
    s = simulate(seed); t = time.process_time(); p = find_pulses(s.x, FS); t1 = time.process_time(); a = align(p, s.expected, max_drift=1000.); took = time.process_time() - t1
    row = dict(seed=seed, kind=s.kind, recoverable=s.recoverable, why=s.why, verdict=a.verdict, reason=a.reason, find_s=t1 - t, align_s=took, n=len(s.expected), jitter=s.faults["jitter"], faults=s.faults)
    if a.verdict != "refused":
        on, unc = a.corrected_onsets(); known = np.isfinite(unc); m = s.inside & known; err = np.abs(on - s.truth)
        row |= dict(unknown=int((s.inside & ~known).sum()), unknown_wrongly=int((s.inside & ~known & ~s.hidden).sum()), frames=int(s.inside.sum()), rival=a.rival)
        row |= dict(seen=err[m & s.seen], unseen=err[m & ~s.seen], covered=(err <= unc)[m & ~s.seen], worst=float(np.nanmax(err[m]/s.frame)) if m.any() else np.inf)
        if s.between is not None:
            ok = m & (np.r_[np.diff(s.expected) < 2.5*s.frame, False]) & np.isfinite(s.between); u2 = a.uncertainty_at(s.expected + s.frame); ok &= np.isfinite(u2); e2 = np.abs(a.to_recording(s.expected + s.frame) - s.between)[ok]
            row["unseen"] = np.r_[row["unseen"], e2]; row["covered"] = np.r_[row["covered"], e2 <= u2[ok]]; row["worst"] = max(row["worst"], float(e2.max()/s.frame) if len(e2) else 0)
        if s.faults["swapped"]: row["worst"] = np.inf
    b = naive(s); row["naive"] = None if b is None else (np.inf if s.faults["swapped"] else float(np.max(np.abs(b - s.truth)[s.inside]/s.frame) if s.inside.any() else np.inf))
    if b is not None and not s.faults["swapped"]:
        row["naive_err"] = np.abs(b - s.truth)[s.inside]
        if s.between is not None:                                           # half-way between pulses, good to a sample
            e2 = np.abs(np.interp(s.expected + s.frame, s.expected, b) - s.between)[s.inside & (np.r_[np.diff(s.expected) < 2.5*s.frame, False])]
            row |= dict(naive_unseen=e2, naive_covered=e2 <= 1/FS)
    return row

def report(rows, out=print) -> dict:
    "The table, and the dictionary of the last line."
    ok = [r for r in rows if r["verdict"] != "refused"]; cat = lambda k, rs=ok: np.concatenate([r[k] for r in rs if k in r] or [np.zeros(0)])
    seen = cat("seen"); pct = lambda v, q: float(np.percentile(v, q)*1e3) if len(v) else 0.
    bins = sorted({r["jitter"] for r in ok}); un = {j: cat("unseen", [r for r in ok if r["jitter"] == j]) for j in bins}
    med_excess = max((pct(un[j], 50) - .5*j*1e3 for j in bins), default=0); p99_excess = max((pct(un[j], 99) - j*1e3 for j in bins), default=0)
    wrong = [r for r in ok if not r["worst"] <= 1]; yes = [r for r in rows if r["recoverable"] == "yes"]; no = [r for r in rows if r["recoverable"] == "no"]
    nun = {j: cat("naive_unseen", [r for r in rows if r["jitter"] == j]) for j in bins}; nun = {j: v for j, v in nun.items() if len(v)}; ncov = cat("naive_covered", rows)
    worse = lambda q, k: max((pct(v, q) - k*j*1e3 for j, v in nun.items()), default=None)
    nv = [r for r in rows if r["naive"] is not None]; nwrong = [r for r in nv if not r["naive"] <= 1]; nerr = cat("naive_err", rows)
    share = lambda a, b: 100*len(a)/max(len(b), 1); refused = lambda rs: [r for r in rs if r["verdict"] == "refused"]
    table = [("seen frames, median (ms)", pct(seen, 50), pct(nerr, 50), .5, "<="), ("seen frames, 99th percentile (ms)", pct(seen, 99), pct(nerr, 99), 2., "<="),
             ("frames without pulse, median beyond half the jitter's range (ms)", med_excess, worse(50, .5), .5, "<="), ("frames without pulse, 99th beyond the jitter's range (ms)", p99_excess, worse(99, 1), 1., "<="),
             ("uncertainty covers (% of frames without pulse)", float(100*np.mean(cat("covered"))) if len(cat("covered")) else 100., float(100*np.mean(ncov)) if len(ncov) else None, 95., ">="),
             ("frames declared unknown where no clock was reset", sum(r["unknown_wrongly"] for r in ok), None, 0, "<="),
             ("accepted sessions with a frame off by more than one", len(wrong), len(nwrong), 0, "<="), ("recoverable sessions refused (%)", share(refused(yes), yes), share([r for r in yes if r["naive"] is None], yes), 1., "<="),
             ("unrecoverable sessions refused (%)", share(refused(no), no), share([r for r in no if r["naive"] is None], no), 99., ">="), ("a film of 11,000 pulses or more, median CPU time (s)", float(np.median([r["align_s"] for r in rows if r["kind"].endswith("film") and r["n"] > 11_000] or [0.])), None, .9, "<=")]
    out(f"{len(rows)} sessions: {len(yes)} recoverable, {len(no)} not, {len(rows) - len(yes) - len(no)} open; accepted {len(ok)} (naive {len(nv)})")
    out(f"  frames declared unknown at clock resets: {sum(r['unknown'] for r in ok)} of {sum(r['frames'] for r in ok)}")
    for name, rs in (("open: " + w, [r for r in rows if r["recoverable"] == "open" and r["why"] == w]) for w in sorted({r["why"] for r in rows if r["recoverable"] == "open"})):
        out(f"  {name}: {len(rs)}, refused {len(refused(rs))}, with a wrong frame {sum(any(r is w for w in wrong) for r in rs)}")
    lines = []
    for what, ours, peer, bar, sign in table:
        holds = ours <= bar if sign == "<=" else ours >= bar
        out(f"  {what:66s} {ours:9.3f}   naive {'-' if peer is None else format(peer, '9.3f'):>9}   bar {sign} {bar:g}   {'holds' if holds else 'MISSED'}")
        lines.append(dict(what=what, ours=round(ours, 4), peer=None if peer is None else round(peer, 4), ratio=None if not peer else round(ours/peer, 4), bar=f"{sign} {bar:g}", holds=bool(holds)))
    return dict(rows=lines, holds=all(q["holds"] for q in lines))

def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0]); ap.add_argument("--quick", action="store_true", help="200 sessions instead of 2,000")
    ap.add_argument("--sessions", type=int); ap.add_argument("--seed", type=int, default=0); ap.add_argument("--verbose", action="store_true"); ap.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    a = ap.parse_args(); n = a.sessions or (200 if a.quick else 2000); t = time.time()
    from concurrent.futures import ProcessPoolExecutor
    if a.jobs > 1:
        with ProcessPoolExecutor(a.jobs) as ex: rows = list(ex.map(run, range(a.seed, a.seed + n), chunksize=8))
    else: rows = [run(k) for k in range(a.seed, a.seed + n)]
    if a.verbose:
        for r in rows:
            bad = (r["verdict"] != "refused" and (not r["worst"] <= 1 or r["unknown_wrongly"])) or (r["recoverable"] == "yes" and r["verdict"] == "refused") or (r["recoverable"] == "no" and r["verdict"] != "refused")
            if bad or r["align_s"] > 1.5: print(f"{r['align_s']:.1f}s", r["n"], r["seed"], r["kind"], r["recoverable"], r["why"], "|", r["verdict"], r["reason"][:110], "| worst", r.get("worst"), {k: v for k, v in r["faults"].items() if v})
    result = report(rows); print(f"{time.time() - t:.0f} s"); print(json.dumps(result)); sys.exit(0 if result["holds"] else 1)

if __name__ == "__main__": main()
