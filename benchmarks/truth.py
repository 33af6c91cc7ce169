"""What a score is worth: planted leaks named, false alarms, coverage of the intervals, false positives under drift, the genie bound, studies without signal. A table, and last one JSON line.

--only calibration: the simulated study alone (half an hour on a free core; each finished person is kept in runs/truth, so that it can be continued).
--quick: fewer studies (a minute on a free core; its rates are then only rough and judged with their Monte-Carlo error).
"""
import argparse
import json
import sys
import time
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests"), str(Path(__file__).resolve().parent)]
warnings.simplefilter("ignore")
from _study import calibration, knows_more, without_signal  # noqa: E402


def row(what, ours, bar, holds, peer=None, ratio=None): return dict(what=what, ours=ours, peer=peer, ratio=ratio, bar=bar, holds=bool(holds))


def leaks(quick):
    "Each planted leak of a foreign pipeline: is it named, and what was it worth?"
    from audit_cases import CASES
    from synapse_nb.evaluate.audit import audit
    named, kinds = 0, set()
    for case in CASES:
        given, kind, leaky, honest = case(0)
        found = audit(**given); hit = kind in found.kinds; named += hit; kinds.add(kind)
        print(f"  {kind:26s} with the leak {leaky:.3f}, without {honest:.3f}: {100 * (leaky - honest):+6.1f} points   {'named' if hit else 'MISSED'}", flush=True)
    yield row(f"planted leaks named, of {len(CASES)} ({len(kinds)} kinds)", named, f"= {len(CASES)}, >= 12 kinds", named == len(CASES) and len(kinds) >= 12)


def false_alarms(quick):
    from audit_cases import clean
    from synapse_nb.evaluate.audit import audit
    n = 10 if quick else 200
    wrong = sum(audit(**clean(1000 + i)).exit_code != 0 for i in range(n))
    yield row(f"false alarms in {n} clean studies", wrong, "= 0", wrong == 0)


def intervals(quick):
    from coverage_cases import COVERAGE, NULL, null_cross_auc, null_refitted, rate
    n = 100 if quick else 1000
    slack = 1.5 if not quick else 1.5 + 3 * 100 * (0.05 * 0.95 / n) ** 0.5
    for case in COVERAGE:
        v = 100 * rate(case, n)
        yield row(f"coverage of 95 % intervals, {case.__name__.replace('_', ' ')} (%)", round(v, 1), "95 ± 1.5", abs(v - 95) <= slack)
    for case in NULL:
        if quick and case is null_refitted: continue
        v = 100 * rate(case, n); low = v >= 5 - slack or case is null_cross_auc
        yield row(f"called significant without effect, {case.__name__.removeprefix('null_').replace('_', ' ')} (%)", round(v, 1), "5 ± 1.5" if case is not null_cross_auc else "<= 6.5", v <= 5 + slack and low)


def bound(quick):
    "Nobody knows more than the genie; where there is no signal, every p is as likely as another."
    from scipy.stats import kstest
    n = 2 if quick else 20
    over = [knows_more(seed) for seed in range(n)]
    best = max(over, key=lambda o: o["encoding"])
    yield row(f"decoders above the genie by 3 standard errors, {n} people x (encoding, ridge), preset easy", sum(v > 3 for o in over for v in o["errors"]), "= 0", all(v <= 3 for o in over for v in o["errors"]))
    print(f"  top-1, mean over people: genie {sum(o['genie'] for o in over) / n:.3f}, encoding {sum(o['encoding'] for o in over) / n:.3f} (most {best['encoding']:.3f} where the genie has {best['genie']:.3f}), ridge {sum(o['ridge'] for o in over) / n:.3f}", flush=True)
    n = 20 if quick else 200
    p = [without_signal(seed) for seed in range(n)]; test = kstest(p, "uniform").pvalue
    yield row(f"{n} studies without signal: p of ridge is uniform (Kolmogorov-Smirnov p; {sum(v <= .05 for v in p)} at .05 or less)", round(float(test), 3), ">= 0.01", test >= .01)


PARTS = [leaks, false_alarms, intervals, bound, calibration]


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0]); ap.add_argument("--quick", action="store_true"); ap.add_argument("--only", choices=[p.__name__ for p in PARTS]); a = ap.parse_args()
    rows, t = [], time.time()
    for part in [p for p in PARTS if a.only in (None, p.__name__)]:
        for r in part(a.quick):
            rows.append(r); print(f"{r['what']:78s} {r['ours']:>8}   bar {r['bar']:24s} {'holds' if r['holds'] else 'MISSED'}   {time.time() - t:.0f} s", flush=True)
    print(json.dumps({"rows": rows, "holds": all(r["holds"] for r in rows)}))
    return 0 if all(r["holds"] for r in rows) else 1


if __name__ == "__main__": sys.exit(main())
