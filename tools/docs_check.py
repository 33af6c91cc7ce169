"The site checked without Quarto: nbdev's own processing, HTML by nbconvert, then links, anchors, titles and the sidebar."
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbdev.doclinks
import nbdev.processors
import nbformat
import yaml
from nbconvert import HTMLExporter
from nbdev.config import get_config
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs

nbdev.processors.exec_show_docs.__call__ = lambda self, cell: None  # the notebooks hold their outputs: nothing is run again here
cfg = get_config()
root = cfg.config_path


class Page(HTMLParser):
    "Collects the ids and links of a page."

    def __init__(self):
        super().__init__()
        self.ids, self.links = set(), []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("id"):
            self.ids.add(attrs["id"])
        if tag in ("a", "img"):
            self.links.append(attrs.get("href") or attrs.get("src") or "")


def front_matter(nb) -> dict:
    first = nb.cells[0] if nb.cells else None
    ok = first is not None and first.cell_type == "raw" and first.source.startswith("---")
    return (yaml.safe_load(first.source.strip().strip("-")) or {}) if ok else {}


def render(cache: Path) -> tuple[dict, list]:
    "Every processed notebook as HTML under _site_check; the pages and what is wrong with them."
    pages, bad = {}, []
    for f in sorted(cache.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in f.parts:
            continue
        raw = json.loads(f.read_text())
        for c in raw["cells"]:
            c.pop("has_sd", None)
            c.pop("idx_", None)
        nb = nbformat.reads(json.dumps(raw), 4)
        nbformat.validate(nb)
        fm = front_matter(nb)
        if not fm.get("title"):
            bad.append(f"{f.name}: no title")
        html, _ = HTMLExporter(template_name="lab", embed_images=True).from_notebook_node(nb)
        rel = f.relative_to(cache).with_name(fm.get("output-file") or f.with_suffix(".html").name)
        out = root / "_site_check" / rel
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html)
        page = Page()
        page.feed(html)
        pages[rel.as_posix()] = page
    return pages, bad


def target_of(link: str, page: str) -> tuple[str, str]:
    "The page (relative to the site's root) and anchor that a link on `page` leads to."
    path, _, frag = link.partition("#")
    if path.startswith("/"):
        path = path.lstrip("/")
    elif path:
        path = (Path(page).parent / path).as_posix()
        while "../" in path:
            path = re.sub(r"[^/]+/\.\./|^\.\./", "", path, count=1)
    path = re.sub(r"(^|/)\d+[a-z]?_", r"\1", path.replace(".ipynb", ".html"))
    return path or page, frag


def check_links(pages: dict) -> list[str]:
    bad, base = [], (cfg.doc_host + cfg.doc_baseurl).rstrip("/")
    for name, page in pages.items():
        for link in page.links:
            if link.startswith(base):
                link = "/" + link[len(base):].lstrip("/")
            elif re.match(r"[a-z]+:", link) or not link.strip("#"):
                continue
            path, frag = target_of(link, name)
            if path.endswith((".png", ".jpg", ".svg")):
                continue
            if path not in pages:
                bad.append(f"{name}: broken link {link}")
            elif frag and frag not in pages[path].ids and frag[0].isupper():
                bad.append(f"{name}: no anchor {link}")
    return bad


def check_sidebar() -> list[str]:
    "Every notebook stands in the sidebar, and nothing else does."
    listed = set(re.findall(r"[\w/]+\.ipynb", (cfg.nbs_path / "sidebar.yml").read_text()))
    there = {p.relative_to(cfg.nbs_path).as_posix() for p in cfg.nbs_path.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    return [f"sidebar.yml: {n} is missing" for n in sorted(there - listed)] + [f"sidebar.yml: {n} does not exist" for n in sorted(listed - there)]


def check_quarto() -> list[str]:
    q = yaml.safe_load((root / "_quarto.yml").read_text())
    ok = (cfg.nbs_path / "_quarto.yml").resolve() == (root / "_quarto.yml").resolve()
    ok &= {"nbdev.yml", "sidebar.yml"} <= set(q["metadata-files"]) and q["project"]["type"] == "website" and "html" in q["format"]
    return [] if ok else ["_quarto.yml: must be a website whose metadata-files are nbdev.yml and sidebar.yml, with nbs/_quarto.yml a link to it"]


def main() -> int:
    refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    nbdev_sidebar.__wrapped__()
    cache = proc_nbs(cfg.nbs_path, force=True, n_workers=0)
    pages, bad = render(cache)
    bad += check_links(pages) + check_sidebar() + check_quarto()
    for b in bad:
        print("BAD", b)
    print(f"{len(pages)} pages checked, {len(bad)} faults")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
