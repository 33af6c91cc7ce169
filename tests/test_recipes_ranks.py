"A recipe is one thing: on one rank or two, in one go or killed and run again."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import synapse_nb
from synapse_nb.core import SynapseError
from synapse_nb.stimuli.embed import make_tiny_clip
from synapse_nb.train import loop
from synapse_nb.train.launch import launch
from synapse_nb.train.recipes import load_recipe, read_saved, run_recipe
from synapse_nb.train.runs import find_runs
from synapse_nb.studies.simulate import simulate_study

ENV = {**os.environ, "PYTHONPATH": str(Path(synapse_nb.__file__).parents[1]), "OMP_NUM_THREADS": "1", "SYNAPSE_CHECKPOINT_S": "0"}
DECODE = '''kind = "decode"
fused = {fused}
[study]
root = "{root}"
[baselines.lda]
bin = 8
[network]
name = "spatial_conv"
options = {options}
[train]
n_epochs = 3
device = "cpu"
'''


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    simulate_study(folder / "study", "easy", 0, 1, n_train_pictures=64, n_test_pictures=16, train_repeats=2, quick=True)
    (folder / "decode.toml").write_text(DECODE.format(root=folder / "study", fused="false", options="{drop = 0.0, head_drop = 0.0}"))
    (folder / "dropout").mkdir()
    (folder / "dropout/decode.toml").write_text(DECODE.format(root=folder / "study", fused="true", options="{drop = 0.3}"))
    return folder


@pytest.fixture(scope="module")
def one(study): return run_recipe(study / "decode.toml", out=study / "one")


@pytest.fixture(scope="module")
def dropped(study): return run_recipe(study / "dropout/decode.toml", out=study / "dropout/one")


def scores(run): return [{k: s[k] for k in ("metric", "model", "subject", "split", "value", "ci_low", "ci_high", "n")} for s in scores_of(run)]


def scores_of(run):
    said = json.loads((run / "scores.json").read_text())
    return said["scores"] if isinstance(said, dict) else said


def only(out): return next(p for p in Path(out).glob("decode-*"))


def test_two_ranks_score_what_one_scores(study, one):
    "Without dropout, which draws for each rank apart."
    launch(study / "decode.toml", nproc=2, out=study / "two", quiet=True, env=ENV, timeout_s=120)
    two = only(study / "two")
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.path.iterdir())
    assert json.loads((two / "environment.json").read_text())["ranks"] == 2
    a, b = (read_saved(p / "predictions.tsv") for p in (one.path, two))
    probabilities = [c for c in a if c.startswith("p_")]
    assert a.drop(columns=probabilities).equals(b.drop(columns=probabilities))
    assert np.abs(a[probabilities].to_numpy() - b[probabilities].to_numpy()).max() < 1e-3        # float32 sums in another order, three epochs long
    assert scores(one.path) == scores(two)
    assert len(list((two / "checkpoints").glob("*.safetensors"))) == 2                           # MEG and EEG; written once


@pytest.mark.slow
def test_two_ranks_with_sharded_weights_score_what_two_with_whole_ones_score(study):
    "FSDP2 against DDP; what comes after a training (predictions, the fused network on both trained encoders) has whole weights again. Dropout draws alike: by rank."
    made = {}
    for how in ("ddp", "fsdp"):
        launch(study / "decode.toml", 2, ["fused=true", "baselines={}", "network.name=\"mlp\"", "network.options={drop = 0.1}", f"train.parallel=\"{how}\""], out=study / how, quiet=True, env=ENV, timeout_s=200)
        assert f"parallel {how}" in (only(study / how) / "log.txt").read_text()
        made[how] = read_saved(only(study / how) / "predictions.tsv")
    a, b = made.values()
    probabilities = [c for c in a if c.startswith("p_")]
    assert set(a["modality"]) == {"meg", "eeg", "fused"} and a.drop(columns=probabilities).equals(b.drop(columns=probabilities))
    assert np.abs(a[probabilities].to_numpy() - b[probabilities].to_numpy()).max() < 1e-3


def kill_when(out, stop, sig=signal.SIGKILL):
    "Start the recipe in a process of its own and end it when `stop(folder)` holds."
    code = f"from synapse_nb.train.recipes import run_recipe; run_recipe({str(out.parent / 'decode.toml')!r}, out={str(out)!r})"
    p = subprocess.Popen([sys.executable, "-c", code], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while p.poll() is None and not any(stop(f) for f in out.glob("decode-*")): time.sleep(0.005)
    assert p.poll() is None, "ended before it could be killed"
    p.send_signal(sig)
    p.wait()


def states(folder, training): return [p.name for p in folder.glob(f"checkpoints/{training:03d}-*/step_*")]


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_run_again_is_the_same_to_the_last_bit(study, dropped, sig, monkeypatch):
    monkeypatch.setenv("SYNAPSE_CHECKPOINT_S", "0")
    one, out = dropped, study / f"dropout/killed{int(sig)}"
    kill_when(out, lambda f: any(not s.endswith("_end") for s in states(f, 1)), sig)             # in the second of three trainings, in an epoch
    folder = only(out)
    assert [r.state for r in find_runs(out) if r.path == folder][0] in ("broken", "failed")
    first = next(folder.glob("checkpoints/000-*.safetensors")).stat().st_mtime_ns
    run = run_recipe(study / "dropout/decode.toml", out=out)
    assert (run.path / "predictions.tsv").read_bytes() == (one.path / "predictions.tsv").read_bytes()
    assert (run.path / "histories.json").read_text() == (one.path / "histories.json").read_text()
    assert (run.path / "metrics.csv").read_text() == (one.path / "metrics.csv").read_text()
    assert next(folder.glob("checkpoints/000-*.safetensors")).stat().st_mtime_ns == first        # the first training was not done again
    assert not list(folder.glob("checkpoints/*/")), "the states are gone once all is done"


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_nothing_is_lost(study, one):
    "torchrun starts both ranks again; they go on from the last whole state."
    seen = {}
    def kill_one():
        out = study / "restarted"
        while not any(states(f, 1) for f in out.glob("decode-*")): time.sleep(0.02)
        import psutil
        ranks = [p for p in psutil.Process().children(recursive=True) if p.environ().get("RANK") == "1" and "restarted" in " ".join(p.cmdline())]
        seen["killed"] = len(ranks)
        for p in ranks: p.kill()
    import threading
    threading.Thread(target=kill_one, daemon=True).start()
    launch(study / "decode.toml", nproc=2, out=study / "restarted", quiet=True, env=ENV, timeout_s=400, max_restarts=1)
    assert seen["killed"] == 1
    whole = only(study / "two") if (study / "two").exists() else None
    if whole is None:
        launch(study / "decode.toml", nproc=2, out=study / "two", quiet=True, env=ENV, timeout_s=120)
        whole = only(study / "two")
    assert (only(study / "restarted") / "predictions.tsv").read_bytes() == (whole / "predictions.tsv").read_bytes()


def test_told_twice_to_leave_it_saves_and_goes_on(study):
    "Slurm sends SIGTERM to every process of a job, and torchrun sends it to its ranks once more."
    recipe, out = study / "long.toml", study / "told"
    recipe.write_text((study / "decode.toml").read_text().replace("n_epochs = 3", "n_epochs = 400\npatience = 400"))
    env = {**ENV, "SYNAPSE_CHECKPOINT_S": "1000"}                                                # nothing but the signal saves
    cmd = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "synapse_nb.train.launch", recipe, "--out", out]
    p = subprocess.Popen(list(map(str, cmd)), env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(out.glob("long-*/metrics.csv")): time.sleep(0.05); assert p.poll() is None
    os.killpg(p.pid, signal.SIGTERM)
    assert p.wait(60) != 0
    found = list(out.glob("long-*/checkpoints/000-*/step_*"))
    assert len(found) == 1
    assert 0 < json.loads((found[0] / "state.json").read_text())["plain"]["position"]["global_step"] < 400


def test_what_rank_0_refuses_all_refuse(study, tmp_path):
    with pytest.raises(SynapseError) as e: launch(study / "decode.toml", 2, [f"study.root={tmp_path / 'nowhere'}"], out=tmp_path, quiet=True, env=ENV, timeout_s=200)
    assert "nowhere" in str(e.value) and "Traceback" not in str(e.value)
    assert load_recipe(study / "decode.toml").network.options["drop"] == 0.0


HEAD = '[study]\nroot = "{root}"\n'
TRAINS = {
    "clip": ('kind = "clip"\n', ["CLIP"]),
    "pretrain": ('kind = "pretrain"\n' + HEAD, ["pre-train meg", "pre-train eeg"]),
    "decode": ('kind = "decode"\n' + HEAD + "[train]\naccumulate = 2\nbatch_size = 16\n", ["spatial_conv meg", "spatial_conv eeg", "fused"]),
    "match": ('kind = "match"\nencoder = "{encoder}"\n' + HEAD, ["match meg", "match eeg"]),
    "caption": ('kind = "caption"\n' + HEAD, ["caption meg", "caption eeg"]),
    "draw": ('kind = "draw"\nencoder = "{encoder}"\nmatched = "{matched}"\n' + HEAD, ["codec", "painter", "judge"]),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory): return make_tiny_clip(["a red circle", "a blue square"], tmp_path_factory.mktemp("clip") / "clip")


@pytest.mark.parametrize("kind", TRAINS)
def test_a_dry_run_takes_one_step_of_each_training(kind, study, encoder, tmp_path, monkeypatch, capsys):
    text, trainings = TRAINS[kind]
    (tmp_path / "embeddings.tsv").write_text("")
    (tmp_path / "r.toml").write_text(text.format(root=study / "study", encoder=encoder, matched=tmp_path))
    steps, real = [], loop.optimizer_step
    monkeypatch.setattr(loop, "optimizer_step", lambda run: (steps.append(run.desc), real(run)))
    run_recipe(tmp_path / "r.toml", out=study / "dry", dry_run=True)
    assert steps == trainings
    said = [s[2:] for s in capsys.readouterr().out.splitlines() if s.startswith("# ") and "parameters" in s]
    assert [s.split(": ")[0] for s in said] == trainings
    for s in said: assert "1 rank(s), global batch" in s and "MiB" in s and "first step" in s and "train_loss" in s and "(" in s.split(": ")[1], s
    assert [p.name for p in study.glob("dry/*") if p.name != "store"] == []
