"Packaging shim: every value comes from settings.ini; edit there, not here."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
readme = root / "README.md"
spdx = {"apache2": "Apache-2.0", "mit": "MIT", "bsd3": "BSD-3-Clause"}
status = ["1 - Planning", "1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable"]


def reqs(key):
    return shlex.split(cfg.get(key, ""))


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license=spdx.get(cfg["license"], cfg["license"]),
    keywords=cfg["keywords"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    include_package_data=True,
    python_requires=">=" + cfg["min_python"],
    install_requires=reqs("requirements"),
    extras_require={k.removesuffix("_requirements"): reqs(k) for k in cfg if k.endswith("_requirements")},
    classifiers=["Programming Language :: Python :: 3", "Development Status :: " + status[int(cfg["status"])]],
    entry_points={
        "console_scripts": cfg.get("console_scripts", "").split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
