"Searches and grids: every space and plan that is shipped can be read, a trial is a recipe run, a killed grid goes on, and Ray is never needed for the rest."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mne
import numpy as np
import pytest
import synapse_nb
import torch
from synapse_nb.core import SynapseError
from synapse_nb.studies.simulate import make_info, simulate_study
from synapse_nb.train.experiments import expand, load_plan, run_plan
from synapse_nb.train.recipes import load_recipe
from synapse_nb.train.tune import as_overrides, load_space, need_ray, run_trial, search

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": str(Path(synapse_nb.__file__).parents[1]), "OMP_NUM_THREADS": "1", "SYNAPSE_CHECKPOINT_S": "0"}
RECIPE = 'kind = "decode"\nfused = false\nbaselines = {}\n[study]\nroot = "%s"\nmodalities = ["eeg"]\n[network]\nname = "linear"\n[train]\nn_epochs = 3\ndevice = "cpu"\n'


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    simulate_study(folder / "study", "easy", 0, 1, quick=True, progress=False)
    (folder / "decode.toml").write_text(RECIPE % (folder / "study"))
    return folder


def test_every_space_reads_and_names_keys_that_exist():
    for path in sorted((ROOT / "configs/spaces").glob("*.toml")):
        space = load_space(path)
        for pick in (0, -1): load_recipe(ROOT / "configs/sim_decode.toml", as_overrides({k: next(iter(v.values()))[pick] for k, v in space.space.items()}))


def test_without_ray_one_line_says_how_to_install_it(monkeypatch, study):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SynapseError, match="pip install"): need_ray()
    with pytest.raises(SynapseError, match="pip install"): search(study / "decode.toml", ROOT / "configs/spaces/asha.toml", out=study / "none")


def test_a_trial_is_a_recipe_run_that_reports_and_goes_on(study):
    spec = {"cwd": os.getcwd(), "recipe": str(study / "decode.toml"), "set": [], "out": str(study), "folder": str(study / "trial"), "metric": "val_loss", "mode": "min", "subset": 0.5}
    said = []
    last = run_trial({"train.lr": 0.003}, spec, "a", lambda row, folder: said.append(row))
    assert [r["epoch"] for r in said] == [1, 2, 3] and last["val_loss"] == min(r["val_loss"] for r in said) == pytest.approx(said[-1]["val_loss"])
    again = run_trial({"train.lr": 0.003}, spec, "a", lambda *a: said.append(a))
    assert again == last and len(said) == 3                                                      # finished: nothing is trained twice
    with pytest.raises(SynapseError, match="No training of this recipe has a column"): run_trial({"train.lr": 0.003}, {**spec, "metric": "val_acuracy"}, "b", lambda *a: None)


def test_a_population_takes_weights_but_keeps_its_own_learning_rate(study, monkeypatch):
    "PB2: the states of one trial, continued with another learning rate."
    monkeypatch.setenv("SYNAPSE_CHECKPOINT_S", "1000")
    spec = {"cwd": os.getcwd(), "recipe": str(study / "decode.toml"), "set": ["train.schedule=\"constant\"", "train.n_epochs=4"], "out": str(study), "folder": str(study / "pb2"), "metric": "val_loss", "mode": "min", "subset": 1.0}

    class Enough(Exception): pass

    def stop(row, folder):
        if row["epoch"] == 2: raise Enough
    with pytest.raises(Enough): run_trial({"train.lr": 0.001}, spec, "good", stop, states=True)
    run_trial({"train.lr": 0.02}, spec, "poor", lambda *a: None, states=True, start_from=study / "pb2/trials/good/checkpoints")
    import pandas as pd
    lr = pd.read_csv(study / "pb2/trials/poor/metrics.csv")["lr"].tolist()
    assert lr == [0.001, 0.001, 0.02, 0.02]


def test_a_small_ray_search(study):
    pytest.importorskip("ray", reason="Ray is not installed (extra `tune`)")
    (study / "space.toml").write_text('scheduler = "asha"\nmax_epochs = 3\n[options]\ngrace_period = 1\n[space]\n"train.lr" = {loguniform = [1e-4, 1e-2]}\n"train.batch_size" = {choice = [16, 32]}\n')
    table = search(study / "decode.toml", study / "space.toml", 2, study / "ray")
    assert len(table) == 2 and (table["state"] == "ended").any()
    assert load_recipe(study / "ray/decode-tune/best.toml").train.lr == pytest.approx(table["train.lr"][0])


SEARCHES = {"pb2": ('scheduler = "pb2"\nmax_epochs = 6\n[options]\nperturbation_interval = 2\n[space]\n"train.lr" = {uniform = [1e-4, 0.0275]}\n', 3, 1),
            "bohb": ('scheduler = "bohb"\nmax_epochs = 4\n[options]\nreduction_factor = 2\n[space]\n"train.lr" = {uniform = [1e-5, 5e-3]}\n"train.batch_size" = {choice = [16, 32]}\n', 4, 1),
            "ranks": ('scheduler = "asha"\nmax_epochs = 2\n[options]\ngrace_period = 1\n[space]\n"train.lr" = {loguniform = [1e-4, 1e-2]}\n', 2, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("how", SEARCHES)
def test_populations_bands_and_trials_of_two_ranks(study, how):
    "The last under Ray Train: two trials of two ranks each, one after the other on two processors."
    pytest.importorskip("ray", reason="Ray is not installed (extra `tune`)")
    text, n, ranks = SEARCHES[how]
    (study / f"{how}.toml").write_text(text)
    table = search(study / "decode.toml", study / f"{how}.toml", n, study / how, ["train.n_epochs=6", 'train.schedule="constant"'], ranks=ranks, cpus=0.9 if ranks > 1 else 1)
    assert len(table) == n and (table["state"] != "failed").all() and table["val_loss"].notna().all()
    assert load_recipe(study / how / "decode-tune/best.toml").train.lr == pytest.approx(table["train.lr"][0])


def test_every_plan_expands_and_a_new_axis_needs_no_new_code(tmp_path):
    assert len(expand(load_plan(ROOT / "configs/plans/small_grid.toml"), tmp_path)) == 40
    assert len(expand(load_plan(ROOT / "configs/plans/vc.toml"), tmp_path)) == 3 * 2**4 * 5
    text = (ROOT / "configs/plans/small_grid.toml").read_text().replace("../sim_pretrain.toml", str(ROOT / "configs/sim_pretrain.toml"))
    (tmp_path / "source.toml").write_text(text + '\n[axes.source]\nno = []\nyes = ["study.options.source=true"]\n')
    cells = expand(load_plan(tmp_path / "source.toml"), tmp_path)
    assert len(cells) == 80 and [c.conf.study.options for c in cells[:2]] == [{}, {"source": True}]
    assert len({c.run.path for c in cells}) == 80


def test_a_grid_that_is_killed_goes_on(study):
    (study / "plan.toml").write_text('name = "grid"\nrecipe = "decode.toml"\nmeasure = "linear (eeg) balanced_accuracy"\n[axes.trials]\n16 = ["split.n_train=16"]\n24 = ["split.n_train=24"]\n32 = ["split.n_train=32"]\n'
                                     '40 = ["split.n_train=40"]\n5000 = ["split.n_train=5000"]\n')
    code = f"from synapse_nb.train.experiments import run_plan; run_plan({str(study / 'plan.toml')!r}, {str(study / 'grid')!r})"
    p = subprocess.Popen([sys.executable, "-c", code], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list((study / "grid").rglob("status.json"))) < 3 and p.poll() is None: time.sleep(0.01)
    p.send_signal(signal.SIGKILL); p.wait()
    before = {f: f.stat().st_mtime_ns for f in (study / "grid").rglob("predictions.tsv")}
    assert 1 <= len(before) < 4
    table = run_plan(study / "plan.toml", study / "grid")
    assert table["state"].tolist() == ["finished"] * 4 + ["too few"] and "5000 training trials" in table["why"].iloc[-1]
    assert all(f.stat().st_mtime_ns == t for f, t in before.items())
    assert (study / "grid/grid/report.html").exists() and "too few" in (study / "grid/grid/table.tsv").read_text()


SLURM = {"sbatch": '''echo "$*" >> "$FAKE/sbatch.txt"; for a in "$@"; do case $a in --job-name=*) name=${a#--job-name=};; esac; done
while [[ $1 == --* ]]; do shift; done
id=$(wc -l < "$FAKE/sbatch.txt"); echo $id
[ -e "$FAKE/busy" ] && { echo "$name" >> "$FAKE/queue.txt"; exit 0; }
SLURM_JOB_ID=$id SLURM_JOB_NODELIST=here SLURM_JOB_NUM_NODES=1 bash "$@" > "$FAKE/job-$id.txt" 2>&1 || true''',
         "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"', "scontrol": "echo 127.0.0.1", "squeue": 'cat "$FAKE/queue.txt" 2>/dev/null; true'}


def test_under_slurm_each_cell_is_a_job_that_ends_in_the_same_table(study, tmp_path, monkeypatch):
    "A queue made of four shell scripts runs what `scripts/train.slurm` says. A full cluster first: what waits there is not queued twice."
    for name, text in SLURM.items(): (tmp_path / name).write_text("#!/usr/bin/env bash\n" + text + "\n"); (tmp_path / name).chmod(0o755)
    for k, v in {**ENV, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "PYTHON": sys.executable}.items(): monkeypatch.setenv(k, v)
    (study / "slurm.toml").write_text('name = "queue"\nrecipe = "decode.toml"\nmeasure = "linear (eeg) balanced_accuracy"\n[axes.trials]\n24 = ["split.n_train=24"]\n5000 = ["split.n_train=5000"]\n')
    go = lambda: run_plan(study / "slurm.toml", study / "slurm", "slurm", script=ROOT / "scripts/train.slurm")["state"].tolist()
    jobs = lambda: (tmp_path / "sbatch.txt").read_text().splitlines()
    (tmp_path / "busy").touch()
    waiting = go(); assert len(jobs()) == 2 and not {"finished", "too few"} & set(waiting)
    assert go() == waiting and len(jobs()) == 2
    (tmp_path / "busy").unlink(); (tmp_path / "queue.txt").unlink()
    assert go() == ["finished", "too few"] and len(jobs()) == 4, (tmp_path / "job-3.txt").read_text()
    assert go() == ["finished", "too few"] and len(jobs()) == 4
    here = run_plan(study / "slurm.toml", study / "slurm_here")
    assert here["linear (eeg) balanced_accuracy"][0] == run_plan(study / "slurm.toml", study / "slurm")["linear (eeg) balanced_accuracy"][0]


def write_listening(root, seconds=40, n_meg=60):
    "A person who listened, under another helmet whose sensors have other names; a 3 Hz rhythm that nobody else has."
    info = make_info("meg", 500., n_meg=n_meg); mne.rename_channels(info, {c: f"MEG{i:04d}" for i, c in enumerate(info["ch_names"])})
    x = np.random.default_rng(0).normal(0, 1e-13, (len(info["ch_names"]), (seconds + 4) * 500)) + 3e-13 * np.sin(2 * np.pi * 3 * np.arange((seconds + 4) * 500) / 500)
    (root / "sub-09/meg").mkdir(parents=True); (root / "dataset_description.json").write_text('{"Name": "listening", "BIDSVersion": "1.6.0"}')
    mne.io.RawArray(x, info, verbose="ERROR").save(root / "sub-09/meg/sub-09_task-RDR_run-1_meg.fif", verbose="ERROR")
    (root / "sub-09/meg/sub-09_task-RDR_run-1_events.tsv").write_text(f"onset\tduration\ttrial_type\tvalue\tsample\n2.0\t0\tBeginning\t1\t1000\n{2 + seconds}.0\t0\tEnd\t1\t{(2 + seconds) * 500}\n")


def test_foreign_recordings_really_enter_pre_training(study, monkeypatch):
    "Half of the windows come from the person who listened; what is tested stays the same; what cannot be had is marked."
    import synapse_nb.train.matching as matching
    write_listening(study / "data/stories")
    (study / "pretrain.toml").write_text(f'kind = "pretrain"\n[study]\nroot = "{study}/study"\nmodalities = ["meg"]\n[train]\nn_epochs = 2\ndevice = "cpu"\n')
    (study / "mix.toml").write_text('name = "mix"\nrecipe = "pretrain.toml"\n[axes.foreign]\nno = []\n' f"yes = ['foreign=[{{name=\"stories\", root=\"{study}/data/stories\", modalities=[\"meg\"]}}]']\n" '[axes.trials]\n24 = ["n_train=24"]\n200 = ["n_train=200"]\n')
    seen, whole = [], matching.train_model

    def spy(model, step, train, val, *a, **k):
        assert (k["betas"], k["warmup"], k["grad_clip"]) == ((0.9, 0.999), 0.1, 1.0); seen.append([(v.windows.events["trial_type"].eq("foreign").sum(), len(v), v.windows.ch_names) for v in train.views]); return whole(model, step, train, val, *a, **k)
    monkeypatch.setattr(matching, "train_model", spy)
    table = run_plan(study / "mix.toml", study / "mix")
    assert table.set_index(["foreign", "trials"])["state"].to_dict() == {("no", "24"): "finished", ("no", "200"): "too few", ("yes", "24"): "finished", ("yes", "200"): "too few"}
    assert "200 training trials" in table["why"][1] and "100 training trials" in table["why"][3]
    (own,), mixed = seen
    assert own[:2] == (0, 24) and [v[:2] for v in mixed] == [(0, 12), (12, 12)]                        # half and half, under the same total
    assert mixed[0][2] == own[2] and len(mixed[1][2]) == len(own[2]) and set(mixed[1][2]) <= {f"MEG{i:04d}" for i in range(60)}
    done = table.set_index(["foreign", "trials"])
    assert done.loc[("no", "24"), "meg wiener r2"] != done.loc[("yes", "24"), "meg wiener r2"] and done["meg n_train"].dropna().tolist() == [24, 24]
    assert all("Wiener interpolator" in (study / "mix/mix" / r / "report.html").read_text() for r in table["run"][table["state"] == "finished"])
    assert done.loc[("no", "24"), "meg best interpolation r2"] == pytest.approx(done.loc[("yes", "24"), "meg best interpolation r2"], abs=0.05)


def test_the_published_recipe_is_the_published_recipe(monkeypatch):
    "SC-MBM: sizes of the net, and what its optimizer is really given."
    import synapse_nb.train.stages as stages
    from synapse_nb.selfsup.mae import PRESETS
    conf, got = load_recipe(ROOT / "configs/scmbm.toml"), {}
    assert (conf.preset, conf.patch, conf.mask_ratio) == ("paper", 4, 0.75) and load_recipe(ROOT / "configs/scmbm.toml", ['mask="random"', "patch=16"]).mask == "random"
    assert PRESETS["paper"] == dict(d_model=1024, depth=24, n_heads=16, mlp_ratio=1.0, dec_d=512, dec_depth=8, dec_heads=16)
    monkeypatch.setattr(stages, "fit", lambda *a, **k: got.update(k)); monkeypatch.setattr(stages, "_loading", lambda *a: {}); monkeypatch.setattr(stages, "make_loader", lambda *a, **k: None)
    stages.train_model(None, None, None, None, conf.train, betas=conf.betas, warmup=conf.warmup, grad_clip=conf.grad_clip)
    opt = got["optimizer"]([{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": got["lr"], "weight_decay": got["weight_decay"]}])
    assert isinstance(opt, torch.optim.AdamW) and opt.defaults["betas"] == (0.9, 0.95) and opt.param_groups[0]["lr"] == 2.5e-4 and opt.param_groups[0]["weight_decay"] == 0.05
    schedule = [c for c in got["callbacks"] if hasattr(c, "factor")][0].factor
    assert got["grad_clip"] == 0.8 and got["n_epochs"] == 500 and conf.train.batch_size == 100 and schedule(0.04) == pytest.approx(0.5) and schedule(0.08) == pytest.approx(1) and schedule(1) == pytest.approx(0)


def test_tf_c_has_a_recipe_and_goes_on_to_matching(study, tmp_path):
    from synapse_nb.models.match import MatchModel
    from synapse_nb.train.experiments import measures
    from synapse_nb.train.matching import load_pretrained
    from synapse_nb.train.recipes import run_recipe
    run = run_recipe(ROOT / "configs/sim_tfc.toml", [f"study.root={study}/study", 'study.modalities=["meg"]', "train.n_epochs=2", "train.device=cpu", "n_train=32"], tmp_path)
    encoder = load_pretrained(next(run.path.glob("**/meg")))
    x = torch.randn(3, encoder.n_chans, encoder.n_times)
    assert encoder.n_tokens == encoder.time.n_tokens + encoder.spec.n_tokens and MatchModel(encoder, 8)(x).shape == (3, 8)
    said = measures(run.path); assert said["meg n_train"] == 32 and np.isfinite(said["meg val_loss"]) and "meg r2" not in said
    with pytest.raises(SynapseError, match="pre-trained encoder"): load_pretrained(tmp_path / "nothing")
