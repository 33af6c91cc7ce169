"""What a score is worth: planted leaks named, false alarms, coverage of the intervals, false positives under drift. A table, and last one JSON line.

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
from _study import calibration  # noqa: E402


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


PARTS = [leaks, false_alarms, intervals, calibration]


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0]); ap.add_argument("--quick", action="store_true"); ap.add_argument("--only", choices=[p.__name__ for p in PARTS]); a = ap.parse_args()
    rows, t = [], time.time()
    for part in [p for p in PARTS if a.only in (None, p.__name__)]:
        for r in part(a.quick):
            rows.append(r); print(f"{r['what']:78s} {r['ours']:>8}   bar {r['bar']:24s} {'holds' if r['holds'] else 'MISSED'}   {time.time() - t:.0f} s", flush=True)
    print(json.dumps({"rows": rows, "holds": all(r["holds"] for r in rows)}))
    return 0 if all(r["holds"] for r in rows) else 1


if __name__ == "__main__": sys.exit(main())
