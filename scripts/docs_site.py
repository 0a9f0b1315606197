"""Builds the documents as a static site, with a search, light and dark, and a reference made of the docstrings.

    python3 scripts/bootstrap.py --with docs/requirements.txt python scripts/docs_site.py --output site

Warnings and broken links are errors: of the generator, and of a second look at every link and picture of the site.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
# Documents outside docs/, and their names in the site.
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "checkpoints/README.md": "checkpoints.md"}
ROOMS = {  # of the code files, by the part of their names before the first "_"
    "configuration": "Configuration",
    "processing": "Processors",
    "modeling": "Models",
    "core": "What all families share",
    "methods": "Methods",
    "ops": "Tensor functions",
    "vision": "Encoders",
    "inputs": "Media and chats",
    "hub": "Checkpoints",
}


class SiteError(Exception):
    pass


def gather(stage: Path) -> None:
    """Puts the pages, the code and the settings of the site into a folder."""
    pages = stage / "pages"
    shutil.copytree(ROOT / "docs", pages, ignore=shutil.ignore_patterns("mkdocs.yml", "requirements.txt"))
    for document in sorted(pages.rglob("*.md")):
        write_page(ROOT / "docs" / document.relative_to(pages), document, pages)
    for name, page in OUTSIDE.items():
        write_page(ROOT / name, pages / page, pages)
    gather_code(stage / "code" / "rediprune")
    settings = (ROOT / "docs" / "mkdocs.yml").read_text()
    reference = "".join(f"      - {title}: api/{room}.md\n" for room, title in ROOMS.items())
    settings = settings.replace("markdown_extensions:", f"  - Reference:\n{reference}markdown_extensions:", 1)
    (stage / "mkdocs.yml").write_text(settings)
    for room, title in ROOMS.items():
        modules = sorted(path.stem for path in ROOT.glob(f"{room}_*.py"))
        page = pages / "api" / f"{room}.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(f"# {title}\n\n" + "".join(f"::: rediprune.{module}\n\n" for module in modules))


def write_page(document: Path, page: Path, pages: Path) -> None:
    """A document as a page: its links lead to pages of the site alone, and its lists are indented as Python's Markdown wants them."""

    def link(match):
        target, hash_, anchor = match[2].partition("#")
        if not target or urlsplit(target).scheme:
            return match[0]
        place = (document.parent / target).resolve().relative_to(ROOT).as_posix()
        if place not in OUTSIDE and not place.startswith("docs/"):
            return match[1] if (ROOT / place).exists() else match[0]  # a file of the repository: its name alone
        to = pages / (OUTSIDE.get(place) or place.removeprefix("docs/"))
        way = Path(*[".."] * len(page.parent.relative_to(pages).parts), to.relative_to(pages)).as_posix()
        return f"[{match[1]}]({way}{hash_}{anchor})"

    text = re.sub(r"\A---\n.*?\n---\n", "", document.read_text(), flags=re.DOTALL)  # a model card's own data
    page.write_text(deeper_lists(re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", link, text)))


def deeper_lists(text: str) -> str:
    """What belongs to an item of a numbered list, indented by four spaces instead of three."""
    lines, inside = [], False
    for line in text.splitlines():
        inside = bool(re.match(r"\d+\. ", line)) or inside and (not line or line[0] == " ")
        lines.append(f" {line}" if inside and line.startswith("   ") else line)
    return "\n".join(lines) + "\n"


def gather_code(folder: Path) -> None:
    """The code files as a package, whose docstrings name types and other classes in the generator's own way."""
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    sources = {path.stem: path.read_text() for path in sorted(ROOT.glob("*.py"))}
    homes = {
        name: module for module, text in sources.items() for name in re.findall(r"^class (\w+)", text, re.MULTILINE)
    }

    def reference(match):
        name = match[1]
        return f"[`{name}`][rediprune.{homes[name]}.{name}]" if name in homes else f"`{name}`"

    def argument(match):
        return match[1] + re.sub(r"[\[\]`*]", "", match[2])

    for module, text in sources.items():
        text = re.sub(r"^( +\w+ )(\(\[?`.*?\): )", argument, text, flags=re.MULTILINE)
        text = re.sub(r"\[`(\w+)`\](?!\[)", reference, text)
        (folder / f"{module}.py").write_text(text)


class Links(HTMLParser):
    """The `id`s of a page, and where its links and pictures lead."""

    def __init__(self, page: Path):
        super().__init__()
        self.names, self.targets = set(), []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.names.add(found.get("id"))
        self.targets += [found[key] for key in ("href", "src") if found.get(key)]


def broken_links(site: Path) -> list:
    """`"page: link"` for each link of a site that leads to no file of it, or to no place in it."""
    pages = {page: Links(page) for page in sorted(site.rglob("*.html"))}
    broken = []
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            path = unquote(parts.path)
            file = (site / path[1:] if path.startswith("/") else page.parent / path).resolve() if path else page
            file = file / "index.html" if file.is_dir() else file
            anchor = unquote(parts.fragment)
            if not file.is_file() or anchor and file in pages and anchor not in pages[file].names:
                broken.append(f"{page.relative_to(site)}: {target}")
    return broken


def build(output: Path) -> None:
    if output.exists() and not (output / "404.html").is_file():
        raise SiteError(f"--output {output} is there and is no site; name another folder")
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder).resolve()
        gather(stage)
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", stage / "mkdocs.yml"]
        run = subprocess.run(command, capture_output=True, text=True, cwd=stage)
        print(run.stdout + run.stderr, end="")
        if run.returncode:
            raise SiteError(f"the site cannot be built: zensical ended with {run.returncode}, its own message is above")
        broken = broken_links(stage / "site")
        if broken:
            raise SiteError("the site has broken links:\n" + "\n".join(broken))
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(stage / "site", output)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "site", help="folder of the site (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        build(args.output)
    except SiteError as error:
        sys.exit(f"docs_site: {error}")
    print(f"{args.output / 'index.html'}")


if __name__ == "__main__":
    main()
