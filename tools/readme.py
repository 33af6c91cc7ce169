"README.md from nbs/index.ipynb, without Quarto: markdown cells as they are, code cells fenced, text outputs indented."
import json
import re
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def to_markdown(nb: dict, site: str) -> str:
    "The notebook as GitHub markdown; links between notebooks point to the published site."
    parts = ["<!-- made from nbs/index.ipynb by `make fix`; edit that -->"]
    for cell in nb["cells"]:
        src = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(src)
        elif cell["cell_type"] == "code" and "#| hide" not in src:
            code = "\n".join(line for line in src.splitlines() if not line.startswith("#|")).strip()
            if code:
                parts.append(f"```python\n{code}\n```")
    text = "\n\n".join(parts) + "\n"

    def page(m):
        return "](" + site + "/" + re.sub(r"(^|/)\d+[a-z]?_", r"\1", m[1]) + ".html"

    return re.sub(r"\]\((?!https?:)([\w/.]+)\.ipynb", page, text)


def main() -> None:
    ini = ConfigParser(delimiters=["="])
    ini.read(root / "settings.ini", encoding="utf-8")
    cfg = ini["DEFAULT"]
    nb = json.loads((root / "nbs" / cfg["readme_nb"]).read_text(encoding="utf-8"))
    (root / "README.md").write_text(to_markdown(nb, cfg["doc_host"] + cfg["doc_baseurl"]), encoding="utf-8")


if __name__ == "__main__":
    main()
