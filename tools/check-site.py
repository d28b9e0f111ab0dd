"""`python tools/check-site.py SITE [FILE.md ...]`: checks the built documentation, and Markdown files that link to files beside them.

* No page or stylesheet of SITE loads anything from another host: scripts, styles, images, fonts, frames. Links that a reader follows may
  lead anywhere.
* Every local link and every local file that a page loads exists, and so does the anchor that a link names.
* Every relative link of the Markdown files exists.

Zensical's strict mode checks links between Markdown pages only: neither images, nor links in included files, nor its own theme.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

_EXTERNAL = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
_IN_STYLES = re.compile(r"(?:url\(|@import\s+)\s*[\"']?([^\"')\s;]+)")
_MARKDOWN_LINK = re.compile(r"\]\(([^)\s]+)\)")
# Relations of a <link> that browsers fetch; others, such as the canonical address of a page, are not fetched.
_FETCHED = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "manifest", "preconnect", "dns-prefetch"}


class _Page(HTMLParser):
    """Resources, links and anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self._in_style = tag == "style"
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.loads += [values[name] for name in ("src", "poster", "data") if name in values]
        self.loads += [each.split()[0] for each in values.get("srcset", "").split(",") if each.strip()]
        self.loads += _IN_STYLES.findall(values.get("style", ""))
        if "href" in values:
            fetched = (tag == "link" and not _FETCHED.isdisjoint(values.get("rel", "").split())) or tag in ("image", "use")
            (self.loads if fetched else self.links).append(values["href"])
        if "mermaid" in values.get("class", "").split():  # the theme's script fetches the library that draws it
            self.loads.append("//mermaid")

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.loads += _IN_STYLES.findall(data)


def problems(site: Path) -> list[str]:
    """List the problems of a built site, one line each."""
    pages = {path: _Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site}: has no pages"]
    for path, page in pages.items():
        found += [f"{path}: loads {url} from another host" for url in page.loads if _EXTERNAL.match(url)]
        for url in page.loads + page.links:
            if not _is_there(url, path, site, pages):
                found.append(f"{path}: {url} does not exist")
    for style in sorted(site.rglob("*.css")):
        urls = _IN_STYLES.findall(style.read_text())
        found += [f"{style}: loads {url} from another host" for url in urls if _EXTERNAL.match(url)]
    return found


def _is_there(url: str, page: Path, site: Path, pages: dict[Path, _Page]) -> bool:
    if re.match(r"[a-z][a-z0-9+.-]*:|//", url, re.IGNORECASE):
        return True
    name, anchor = urldefrag(url)
    name = unquote(name.partition("?")[0])
    target = page if not name else Path(site / name.lstrip("/")) if name.startswith("/") else page.parent / name
    target = target.resolve() / "index.html" if target.is_dir() else target.resolve()
    if not target.is_file():
        return False
    known = pages.get(target)
    return not anchor or known is None or unquote(anchor) in known.anchors


def broken_links(file: Path) -> list[str]:
    """List the broken relative links of a Markdown file, one line each."""
    urls = [url for url in _MARKDOWN_LINK.findall(file.read_text()) if not re.match(r"[a-z][a-z0-9+.-]*:|#", url, re.IGNORECASE)]
    return [f"{file}: {url} does not exist" for url in urls if not (file.parent / urldefrag(url)[0]).exists()]


def main(site: str, *files: str) -> None:
    """Check a site and Markdown files; exit code 1 if there is a problem."""
    found = problems(Path(site).resolve()) + [line for file in files for line in broken_links(Path(file))]
    print("\n".join(found) or f"{site}: every local link exists, nothing is loaded from another host")
    sys.exit(bool(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
