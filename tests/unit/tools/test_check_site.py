"""Check of the built documentation."""

import runpy
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[3]
PAGE = '<html><link rel="stylesheet" href="style.css"><h2 id="there">x</h2>{}</html>'


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(PROJECT / "tools" / "check-site.py"))


@pytest.fixture
def site(tmp_path):
    def make(html: str, css: str = "", other: str = "") -> Path:
        (tmp_path / "style.css").write_text(css)
        (tmp_path / "index.html").write_text(PAGE.format(html))
        (tmp_path / "other.html").write_text(PAGE.format(other))
        return tmp_path

    return make


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example.com/a.js"></script>',
        '<img src="//cdn.example.com/a.png">',
        '<img src="other.html" srcset="other.html 1x, https://cdn.example.com/a.png 2x">',
        '<link rel="preload stylesheet" href="https://cdn.example.com/a.css">',
        '<iframe src="HTTPS://cdn.example.com/"></iframe>',
        '<style>@import "https://cdn.example.com/a.css";</style>',
        '<p style="background: url(https://cdn.example.com/a.png)">',
        '<pre class="mermaid">graph</pre>',
    ],
)
def test_resources_of_a_page_from_another_host_are_reported(tool, site, html):
    assert any("from another host" in line for line in tool["problems"](site(html)))


@pytest.mark.parametrize("css", ["@import 'https://cdn.example.com/a.css';", "@font-face {src: url(//cdn.example.com/a.woff2)}"])
def test_resources_of_a_stylesheet_from_another_host_are_reported(tool, site, css):
    assert any("from another host" in line for line in tool["problems"](site("", css)))


@pytest.mark.parametrize(
    "html", ['<a href="gone.html">x</a>', '<img src="gone.png">', '<a href="other.html#gone">x</a>', '<a href="#gone">x</a>']
)
def test_a_broken_link_or_image_is_reported(tool, site, html):
    assert len(tool["problems"](site(html))) == 1


def test_links_to_other_hosts_and_existing_local_links_are_accepted(tool, site):
    html = '<a href="https://example.com/#x">x</a><a href="#there">x</a><a href="other.html?q#there">x</a><a href="/other.html">x</a>'
    css = "a {background: url(data:image/svg+xml;charset=utf-8,x)}"
    assert tool["problems"](site(html + '<link rel="canonical" href="https://example.com/">', css)) == []


def test_a_site_without_pages_is_reported(tool, tmp_path):
    assert tool["problems"](tmp_path) == [f"{tmp_path}: has no pages"]


def test_a_relative_link_of_a_markdown_file_has_to_exist(tool, tmp_path):
    (tmp_path / "a.md").write_text("[b](b.md#x) [c](c.md) ![d](d.png) [e](https://example.com) [f](#f)")
    (tmp_path / "b.md").write_text("")
    assert [line.split(": ")[1] for line in tool["broken_links"](tmp_path / "a.md")] == ["c.md does not exist", "d.png does not exist"]


def test_the_readme_is_short(tool):
    assert len((PROJECT / "README.md").read_text().splitlines()) < 120
