"""The site of the documents: what is gathered for it, what it refuses, and the built site in a browser."""

import functools
import http.server
import os
import threading
import time

import docs_site
import pytest
from browser import Browser, find_browser
from places import ROOT


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path = path.with_name(f"{path.name}.html")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    "link, broken",
    [
        ("b.html", False),
        ("b.html#here", False),
        ("#top", False),
        ("folder/", False),
        ("/b.html#here", False),
        ("https://example.org/missing", False),
        ("mailto:a@example.org", False),
        ("c.html", True),
        ("b.html#there", True),
        ("#bottom", True),
        ("/folder/b.html", True),
        ("empty/", True),
    ],
)
@pytest.mark.parametrize("tag", ['<a id="top" href="{}">', '<img id="top" src="{}">'])
def test_links_and_pictures_must_lead_somewhere(tmp_path, tag, link, broken):
    write(tmp_path, a=tag.format(link), b='<h2 id="here">', folder__index='<a href="../a.html#top">')
    (tmp_path / "empty").mkdir()
    assert docs_site.broken_links(tmp_path) == ([f"a.html: {link}"] if broken else [])


@pytest.mark.parametrize(
    "document, page, text, written",
    [
        ("README.md", "index.md", "[a](docs/inputs.md#values)", "[a](inputs.md#values)"),
        ("README.md", "index.md", "![a](docs/overlay.png)", "![a](overlay.png)"),
        ("README.md", "index.md", "---\ntags: [x]\n---\n# T [a](CONTRIBUTING.md)", "# T [a](contributing.md)"),
        ("docs/architecture.md", "architecture.md", "[a](../CONTRIBUTING.md)", "[a](contributing.md)"),
        ("CONTRIBUTING.md", "contributing.md", "([a](README.md), [b](missing.py))", "([a](index.md), [b](missing.py))"),
        ("CONTRIBUTING.md", "contributing.md", "see [this](setup.py)", "see this"),
        ("docs/results/README.md", "results/README.md", "[a](../methods.md)", "[a](../methods.md)"),
        ("docs/results/README.md", "results/README.md", "[a](#b), [c](https://d.e/f)", "[a](#b), [c](https://d.e/f)"),
    ],
)
def test_links_of_documents_lead_to_pages(tmp_path, monkeypatch, document, page, text, written):
    monkeypatch.setattr(docs_site, "ROOT", tmp_path)
    (tmp_path / document).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / document).write_text(text)
    (tmp_path / "setup.py").touch()
    pages = tmp_path / "pages"
    (pages / page).parent.mkdir(parents=True)
    docs_site.write_page(tmp_path / document, pages / page, pages)
    assert (pages / page).read_text() == written + "\n"


def test_numbered_lists_are_indented_as_the_generator_wants_it():
    text = "1. one\n\n   | a |\n   ```\n       x\n   ```\n\n2. two\n   more\n\nend\n    code\n- a\n   b\n"
    expected = "1. one\n\n    | a |\n    ```\n        x\n    ```\n\n2. two\n    more\n\nend\n    code\n- a\n   b\n"
    assert docs_site.deeper_lists(text) == expected


def test_all_documents_and_all_code_are_on_the_site(tmp_path):
    docs_site.gather(tmp_path)
    pages = {path.relative_to(tmp_path / "pages").as_posix() for path in (tmp_path / "pages").rglob("*.md")}
    documents = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {"index.md", "contributing.md", *documents} <= pages
    reference = "".join(path.read_text() for path in (tmp_path / "pages" / "api").iterdir())
    for path in ROOT.glob("*.py"):
        assert reference.count(f"::: rediprune.{path.stem}\n") == 1
        compile((tmp_path / "code" / "rediprune" / path.name).read_text(), path.name, "exec")
    settings = (tmp_path / "mkdocs.yml").read_text()
    missing = [page for page in sorted(pages) if "/" not in page and page not in settings]
    assert missing == [], "name them in docs/mkdocs.yml"


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(docs_site.SiteError, match="is no site"):
        docs_site.build(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.fixture(scope="module")
def generator():
    pytest.importorskip("zensical", reason="the site needs zensical: install docs/requirements.txt")


@pytest.fixture(scope="module")
def site(generator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "site"
    docs_site.build(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["[a](missing.md)", "[a](inputs.md#nowhere)", '<a href="missing.html">a</a>', "::: rediprune.no_such_module"],
)
def test_what_leads_nowhere_stops_the_build(generator, tmp_path, monkeypatch, text):
    gather = docs_site.gather

    def gather_worse(stage):
        gather(stage)
        with open(stage / "pages" / "serving.md", "a") as page:
            page.write(f"\n{text}\n")

    monkeypatch.setattr(docs_site, "gather", gather_worse)
    with pytest.raises(docs_site.SiteError):
        docs_site.build(tmp_path / "site")
    assert not (tmp_path / "site").exists()


@pytest.mark.slow
def test_the_reference_is_made_of_the_docstrings(site):
    page = (site / "api" / "core.html").read_text()
    for name in ("core_media.MediaStagesMixin.encode_media", "core_processor.PrunedProcessorMixin.__call__"):
        assert f'id="rediprune.{name}"' in page
    assert 'href="#rediprune.core_encoded.EncodedMedia"' in page  # a class that a docstring names is a link
    assert "[<code>" not in page and "][rediprune" not in page


@pytest.fixture(scope="module")
def served(site):
    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture
def browser(tmp_path, served):
    executable = find_browser()
    if executable is None or os.name != "posix":
        pytest.skip("no Chromium here: install one to check the site in it")
    browser = Browser(executable, tmp_path)
    yield browser
    browser.close()
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith((served, "data:", "blob:"))] == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme, dark", [("light", False), ("dark", True)])
def test_the_site_follows_light_and_dark_and_fits_a_phone(browser, served, scheme, dark):
    browser.resize(390, 844, scheme)
    for page in ("index.html", "methods.html", "api/core.html"):
        browser.open(served + page)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    colour = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert (max(colour) < 60) == dark and (min(colour) > 200) == (not dark)


@pytest.mark.slow
def test_the_site_is_searched(browser, served):
    browser.resize(1280, 900)
    browser.open(served + "index.html")

    def wait(condition):
        end = time.monotonic() + 30
        while not browser.evaluate(condition):
            assert time.monotonic() < end, f"still not {condition}"
            time.sleep(0.1)

    wait("[...document.body.children].some((part) => part.shadowRoot)")  # the program of the search is there
    browser.evaluate("document.querySelector('.md-search__button').click()")
    wait("document.activeElement.shadowRoot?.activeElement?.tagName === 'INPUT'")
    browser.call("Input.insertText", text="encode_media")
    wait("document.activeElement.shadowRoot?.textContent.includes('encode_media')")
