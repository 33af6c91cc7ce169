#!/usr/bin/env bash
# Make .venv-bench: the peers that benchmarks compare with, apart from the project's own venv.
set -euo pipefail
cd "$(dirname "$0")/.."
test -x .venv-bench/bin/python || python3 -m venv .venv-bench
. .venv-bench/bin/activate
export PIP_DISABLE_PIP_VERSION_CHECK=1
python -m pip install -q -c constraints.txt -r benchmarks/requirements.txt
python -m pip install -q --no-deps 'braindecode==1.8.1'
python -m pip install -q --no-deps -e .
site=$(python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
mkdir -p "$site/torchaudio"
printf '"Stub: braindecode only wants the names."\n__version__ = "0"\nfrom . import functional, transforms\n' > "$site/torchaudio/__init__.py"
for m in functional transforms; do printf '"Stub."\nclass _Nothing: pass\ndef __getattr__(name):\n    if name.startswith("__"): raise AttributeError(name)\n    return _Nothing\n' > "$site/torchaudio/$m.py"; done
python -c "import braindecode; print('braindecode', braindecode.__version__)"
