"Library in step with notebooks, notebooks clean, README in step with index.ipynb, sidebar complete: checked in a copy, nothing here is changed."
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
skip = shutil.ignore_patterns(".venv*", ".git", "runs", "_proc", "_docs", "_site_check", "__pycache__", ".ipynb_checkpoints", "*.egg-info", "nbdev.yml")


def differences(a: Path, b: Path, pattern: str) -> list[str]:
    "Relative names that differ between two trees or stand in only one of them."
    def names(r):
        return {p.relative_to(r) for p in r.rglob(pattern) if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)}
    both = names(a) | names(b)
    return sorted(str(n) for n in both if not ((a / n).exists() and (b / n).exists() and filecmp.cmp(a / n, b / n, shallow=False)))


def main() -> int:
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "copy"
        shutil.copytree(root, copy, symlinks=True, ignore=skip)
        env = dict(os.environ, PYTHONPATH=str(copy))
        tool = Path(sys.executable).parent
        for cmd in (["nbdev_export"], ["nbdev_clean"]):
            subprocess.run([str(tool / cmd[0])], cwd=copy, env=env, check=True)
        bad = [f"synapse_nb/{n}: not what its notebook exports (run: make fix)" for n in differences(root / "synapse_nb", copy / "synapse_nb", "*.py")]
        bad += [f"nbs/{n}: not clean (run: make fix)" for n in differences(root / "nbs", copy / "nbs", "*.ipynb")]
        subprocess.run([sys.executable, "tools/readme.py"], cwd=copy, env=env, check=True)
        if not filecmp.cmp(root / "README.md", copy / "README.md", shallow=False):
            bad.append("README.md: not what nbs/index.ipynb says (run: make fix)")
    print("\n".join(bad) or "notebooks, library and README are in step")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
