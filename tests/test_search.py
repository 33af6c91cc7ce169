"Searches and grids: every space and plan that is shipped can be read, a trial is a recipe run, a killed grid goes on, and Ray is never needed for the rest."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import synapse_nb
from synapse_nb.core import SynapseError
from synapse_nb.studies.simulate import simulate_study
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
