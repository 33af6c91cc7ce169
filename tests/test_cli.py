"What a user sees: exit codes and one sentence for bad input, nothing half-written, runs found again."
import json
import os
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest

from synapse_nb.apps.cli import main

ROOT = Path(__file__).resolve().parents[1]


def said(capsys, *args) -> str:
    "The sentence of a command that must fail."
    assert main([str(a) for a in args]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.startswith("synapse: ")
    return err


def test_missing_and_truncated_files_are_named(capsys, tmp_path):
    assert "nothing.con" in said(capsys, "inspect", tmp_path / "nothing.con")
    (tmp_path / "empty.fif").touch()
    assert "empty.fif" in said(capsys, "inspect", tmp_path / "empty.fif")
    (tmp_path / "cut_raw.fif").write_bytes(b"\x00\x00\x00\x64" * 50)
    assert "cut_raw.fif" in said(capsys, "inspect", tmp_path / "cut_raw.fif")


def test_truncated_recording(capsys, tmp_path, test_data):
    whole = test_data / "neuromag_triggers" / "test_elekta_3ch_raw.fif"
    cut = tmp_path / "cut_raw.fif"
    cut.write_bytes(whole.read_bytes()[:3000])
    assert "cut_raw.fif" in said(capsys, "inspect", cut)


def test_a_recording_without_triggers_warns_of_nothing(capsys, test_data):
    "A line that is inside a pulse from the first sample to the last has no resting samples: numpy's warning about their spread is nobody's news."
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert main(["inspect", str(next((test_data / "ctf_short").glob("*.ds")))]) == 0
    out = capsys.readouterr().out
    assert "format    CTF" in out and "RuntimeWarning" not in out and "cannot be read" not in out


def test_a_dry_run_embeds_one_batch_of_pictures(monkeypatch):
    from synapse_nb.stimuli.images import make_pictures
    from synapse_nb.train import matching
    seen, pictures = [], make_pictures(3, seed=1)
    monkeypatch.setattr(matching, "embed_pictures", lambda encoder, images, cache_dir=None: seen.append(len(images)) or np.eye(len(images), 8))
    ready = matching.Prepared(types.SimpleNamespace(root="x", stimuli=lambda: pictures), {}, [], {})
    assert len(matching.picture_vectors(ready, "encoder", only=5)[1]) == len(pictures) == 24 and seen == [5]
    assert len(matching.picture_vectors(ready, "encoder")[1]) == 24 and seen == [5, 24]


def test_report_over_runs_says_what_is_missing(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no finished run" in said(capsys, "report", tmp_path / "empty")
    assert "does not exist" in said(capsys, "report", tmp_path / "nothing")


@pytest.mark.parametrize("line, wanted", [("train.n_epoch=3", "Did you mean 'n_epochs'"), ("train.n_epochs=many", "n_epochs = 'many'"), ("window.tmn=0", "Did you mean 'tmin'"), ("kind=decod", "decode")])
def test_recipe_mistakes(capsys, line, wanted, tmp_path):
    assert wanted in said(capsys, "run", ROOT / "configs" / "eegnb_n170.toml", "--set", line, "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_recipe_without_a_folder_says_which_option(capsys, tmp_path):
    assert "--set study.root=" in said(capsys, "run", ROOT / "configs" / "eegnb_n170.toml", "--out", tmp_path)


def test_output_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert "file" in said(capsys, "run", ROOT / "configs" / "sim_clip.toml", "--out", tmp_path / "file" / "runs")


def test_one_marker_file_is_refused(capsys, tmp_path, test_data):
    text = said(capsys, "run", ROOT / "configs" / "eegnb_n170.toml", "--set", f"study.root={test_data / 'muse_n170'}", "--set", 'study.subjects=["10"]', "--out", tmp_path)
    assert "one" in text and "marker" in text


def test_every_recipe_reads():
    from synapse_nb.train.recipes import load_recipe
    for path in sorted((ROOT / "configs").glob("*.toml")):
        assert load_recipe(path).name == path.stem


def test_inspect_everything(capsys, test_data):
    "Every recording opens; what is no recording is answered in a sentence."
    opened = 0
    for path in sorted(p for p in test_data.rglob("*") if p.is_file() or p.suffix == ".ds"):
        if any(q.suffix == ".ds" for q in path.parents):
            continue
        code = main(["inspect", str(path)])
        out = capsys.readouterr()
        assert "Traceback" not in out.err and (out.out or out.err).strip()
        opened += code == 0
    assert opened > 60


def test_interrupted_demo_goes_on(tmp_path):
    cmd = [sys.executable, "-c", "import sys; from synapse_nb.apps.cli import main; sys.exit(main())", "demo", "--quick", "--out", str(tmp_path / "demo")]
    env = dict(os.environ, IN_TEST="1")
    first = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path)
    while "prepare done" not in first.stdout.readline():
        assert first.poll() is None, first.stderr.read()
    time.sleep(2)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 130 and "Traceback" not in err and "continues" in err
    assert not (tmp_path / "demo" / "report.html").exists()
    study = tmp_path / "demo" / "study" / "truth" / "truth.json"
    made = study.stat().st_mtime_ns
    done = subprocess.run(cmd, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert study.stat().st_mtime_ns == made                      # what was finished was not made again
    scores = json.loads((tmp_path / "demo" / "scores.json").read_text())
    assert len(scores) > 20 and (tmp_path / "demo" / "report.html").stat().st_size < 15e6
