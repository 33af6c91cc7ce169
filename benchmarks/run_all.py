"Every benchmark, one after the other; each prints its table and, last, one JSON line. --quick for a minute's version of each."
import json
import subprocess
import sys
from pathlib import Path

here = Path(__file__).resolve().parent


def main() -> int:
    results = {}
    for script in sorted(p for p in here.glob("*.py") if p.name not in ("run_all.py",) and not p.name.startswith("_")):
        print(f"\n== {script.stem}", flush=True)
        done = subprocess.run([sys.executable, str(script), *sys.argv[1:]], stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        try:
            results[script.stem] = json.loads(done.stdout.strip().splitlines()[-1])["holds"]
        except (IndexError, ValueError, KeyError):
            results[script.stem] = None
    for name, holds in results.items():
        print(f"{name:<16} {'did not finish' if holds is None else 'every bar met' if holds else 'a bar was missed'}")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
