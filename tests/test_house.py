"The house holds to its rules: who may import whom, what a notebook must have, what stays light."
import ast
import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = [p for p in (ROOT / "nbs").rglob("*.ipynb") if not {".ipynb_checkpoints", "_proc"} & set(p.parts)]
PAGES = {"tutorials", "explanations"}
# which folders (or modules) each folder may import; what stands from train.stages (75) on may import everything below it
ALLOWED = {
    "": {"core", "config", "dist"},
    "stimuli": {"stimuli"},
    "data": {"data"},
    "studies": {"data", "stimuli", "studies"},
    "train": {"train.checkpoint", "train.loop"},
    "evaluate": {"evaluate", "data", "stimuli", "studies.simulate"},
    "models": {"models"},
    "selfsup": {"selfsup", "models", "stimuli"},
    "diffusion": {"diffusion", "models", "selfsup", "stimuli"},
}


def source(cell) -> str:
    return "".join(cell["source"])


def module_of(path: Path) -> str | None:
    "The module a notebook exports to, such as 'data.align'."
    for cell in json.loads(path.read_text())["cells"]:
        m = re.search(r"^#\|\s*default_exp\s+(\S+)", source(cell), re.M)
        if m:
            return m[1]


MODULES = {module_of(p): p for p in NBS if module_of(p)}
NUMBER = {m: int(re.match(r"\d+", p.name)[0]) for m, p in MODULES.items() if re.match(r"\d+", p.name)}


def imports_of(module: str) -> set[str]:
    "The modules of this package that a module imports, anywhere in it."
    path = ROOT / "synapse_nb" / (module.replace(".", "/") + ".py")
    found, here = set(), ["synapse_nb", *module.split(".")][:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            full = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names = [full, *(f"{full}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        found |= {n.removeprefix("synapse_nb.") for n in names if n.removeprefix("synapse_nb.") in MODULES and n.startswith("synapse_nb.")}
    return found


def test_one_notebook_one_module():
    for m, p in MODULES.items():
        folder, _, name = m.rpartition(".")
        assert p.parent.relative_to(ROOT / "nbs").as_posix() == (folder or "."), f"{p} exports {m}"
        assert re.sub(r"^\d+_", "", p.stem) == name, f"{p} exports {m}"
        assert sum(source(c).count("default_exp") for c in json.loads(p.read_text())["cells"] if source(c).startswith("#|")) == 1
    generated = {q.relative_to(ROOT / "synapse_nb").with_suffix("").as_posix().replace("/", ".") for q in (ROOT / "synapse_nb").rglob("*.py")}
    generated = {g for g in generated if not g.endswith("__init__") and g != "_modidx"}
    assert generated == set(MODULES)


def test_numbers_are_unique_and_in_order():
    numbers = [re.match(r"\d+", p.name)[0] for m, p in MODULES.items()]
    assert len(set(numbers)) == len(numbers), sorted(n for n in numbers if numbers.count(n) > 1)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_and_only_where_allowed(module):
    folder = module.rpartition(".")[0]
    for other in imports_of(module):
        assert NUMBER[other] < NUMBER[module], f"{module} ({NUMBER[module]}) imports {other} ({NUMBER[other]})"
        if NUMBER[module] >= 75 or other in ALLOWED[""]:
            continue
        ok = other.rpartition(".")[0] in ALLOWED[folder] or other in ALLOWED[folder]
        assert ok, f"{module} may not import {other}"


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in NBS])
def test_notebook_is_written_as_one(path):
    cells = json.loads(path.read_text())["cells"]
    first = source(cells[0])
    assert re.match(r"# \S", first) and re.search(r"^> \S", first, re.M), "first cell: '# Title' and '> subtitle'"
    assert not any(o.get("output_type") == "error" for c in cells for o in c.get("outputs", []))
    text = "\n".join(source(c) for c in cells)
    assert not re.search(r"(?<![\w.])/(work|home|root|Users)/\w", text), "an absolute path"
    if not module_of(path):
        return
    code = [source(c) for c in cells if c["cell_type"] == "code"]
    exported = [i for i, s in enumerate(code) if re.match(r"#\|\s*export", s)]
    demos = [s for i, s in enumerate(code) if i > min(exported) and not re.match(r"#\|\s*(export|hide|default_exp)", s)]
    assert demos, "nothing is shown"
    assert any(re.search(r"\bassert\b|test_eq|test_fail|allclose|raises", s) for s in demos), "nothing is asserted"
    assert any(c.get("outputs") for c in cells), "the notebook holds no outputs: run it before committing"


def run(code: str, **kw):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, **kw)


def test_import_is_light():
    out = run("import sys, synapse_nb, synapse_nb.core, synapse_nb.apps.cli; print([m for m in ('torch','mne','nbdev','transformers','matplotlib') if m in sys.modules])")
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_library_needs_no_nbdev():
    for m in MODULES:
        text = (ROOT / "synapse_nb" / (m.replace(".", "/") + ".py")).read_text()
        assert not re.search(r"^\s*(from|import) (nbdev|fastcore|execnb)", text, re.M), m


def cpu_of(*cmd) -> float:
    "CPU seconds of a command (the second run, when its files are warm)."
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", "import sys; from synapse_nb.apps.cli import main; sys.exit(main())", *cmd], capture_output=True, text=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_answers_at_once():
    assert cpu_of("--help") < 1


def test_inspect_answers_soon(test_data):
    assert cpu_of("inspect", str(test_data / "neuromag_triggers" / "test_elekta_3ch_raw.fif")) < 3


def test_wheel_runs_without_nbdev(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)],
                   check=True, cwd=tmp_path, env=dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1"))
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as z:
        z.extractall(tmp_path / "site")
    code = "import sys\nfor m in ('nbdev','fastcore','execnb','jupyterlab'): sys.modules[m] = None\n" \
           "import synapse_nb; assert 'site' in synapse_nb.__file__\nimport importlib\n" \
           + "\n".join(f"importlib.import_module('synapse_nb.{m}')" for m in sorted(MODULES)) + "\nprint('all imported')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(tmp_path / "site")))
    assert "all imported" in out.stdout, out.stderr[-2000:]
