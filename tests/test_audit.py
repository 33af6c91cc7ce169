"""The audit names every planted leak of a foreign pipeline, and none in clean studies."""
import warnings

import numpy as np
import pandas as pd
import pytest
from audit_cases import CASES, clean, handed, study

from synapse_nb.core import SynapseError
from synapse_nb.evaluate.audit import audit, audit_report, list_checks

warnings.simplefilter("ignore")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_planted_leak_is_named(case):
    given, kind, leaky, honest = case(0)
    found = audit(**given)
    print(f"{case.__name__}: {100 * (leaky - honest):+.1f} points")
    assert kind in found.kinds, str(found)
    assert found.exit_code == (0 if kind == "hubs" else 2 if {f.level for f in found.findings} == {"suspect"} else 3)


def test_at_least_twelve_kinds_are_planted():
    kinds = {case(0)[1] for case in CASES}
    assert len(kinds) >= 24 and kinds <= set(list_checks().kind) | {"best-epoch-per-person"}


@pytest.mark.parametrize("seed", range(6))
def test_clean_study_raises_no_alarm(seed):
    found = audit(**clean(seed))
    assert found.exit_code == 0, str(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_false_alarm_in_200_clean_studies():
    wrong = [(seed, found.kinds) for seed in range(200) if (found := audit(**clean(1000 + seed))).exit_code]
    assert not wrong, wrong


def test_parts_may_be_missing_and_files_may_be_paths(tmp_path):
    s = study(0)
    given = handed(s)
    s["ev"].to_csv(tmp_path / "events.tsv", sep="\t", index=False)
    import pandas as pd
    pd.DataFrame([(t, p) for p, ids in given["split"].items() for t in ids], columns=["trial_id", "part"]).to_csv(tmp_path / "split.csv", index=False)
    ids = s["ev"].trial_id[s["test"]].to_numpy().astype("U")
    np.savez(tmp_path / "preds.npz", trial_id=ids, y_true=s["ev"].category[s["test"]].to_numpy().astype("U"), y_pred=s["ev"].category[s["test"]].to_numpy().astype("U"))
    found = audit(events=tmp_path / "events.tsv", split=tmp_path / "split.csv", predictions=tmp_path / "preds.npz")
    assert found.exit_code == 0 and found.scores[0].value == 1 and "timing" in found.unchecked
    page = audit_report(found).save(tmp_path / "audit.html").read_text()
    assert "What was not checked" in page
    assert audit(predictions=tmp_path / "preds.npz").scores[0].n == len(ids)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(SynapseError, match="nothing to audit"): audit()
    with pytest.raises(SynapseError, match="does not exist"): audit(predictions=tmp_path / "no.npz")
    (tmp_path / "broken.npz").write_text("not an archive")
    with pytest.raises(SynapseError, match="cannot be read"): audit(predictions=tmp_path / "broken.npz")
    with pytest.raises(SynapseError, match="no column 'part'"): audit(split=study(0)["ev"])


def as_files(given, folder):
    "What `audit` takes, as the files that somebody else's program would write: tables, .npz, the protocol as text."
    out = ["--events", folder / "events.tsv", "--split", folder / "split.csv", "--predictions", folder / "predictions.npz"]
    given["events"].to_csv(out[1], sep="\t", index=False)
    pd.DataFrame([(t, part) for part, ids in given["split"].items() for t in ids], columns=["trial_id", "part"]).to_csv(out[3], index=False)
    plain = lambda d: {k: a.astype(str) if (a := np.asarray(v)).dtype == object else a for k, v in d.items()}
    np.savez(out[5], **plain(given["predictions"]))
    if "windows" in given: out += ["--windows", folder / "windows.npz"]; np.savez(out[-1], **plain(given["windows"]))
    if "history" in given: out += ["--history", folder / "history.csv"]; given["history"].to_csv(out[-1], index=False)
    return [str(v) for v in out] + ["--protocol", "; ".join(f"{k}={v}" for k, v in given["protocol"].items())]


def test_the_command_says_what_the_function_says(tmp_path, capsys):
    from synapse_nb.apps.cli import main
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert main(["audit", *as_files(clean(3), tmp_path / "a"), "--report", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    assert "no fault found" in said and (tmp_path / "page.html").stat().st_size > 20_000
    given, kind, *_ = CASES[0](0)
    assert main(["audit", *as_files(given, tmp_path / "b")]) == 3 and kind in capsys.readouterr().out
    assert main(["audit", "--predictions", str(tmp_path / "nothing.npz")]) == 1
