"""Hook of MkDocs: the README as first page, pages that may be absent, links that leave docs/ and lead nowhere."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

HOME = "index.md"
LINK = re.compile(r"\]\((?!https?://|#)([^)]+)\)")
LINK_OUT = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(#[^)]*)?\)")


def on_config(config):
    """Leave out of the navigation what is not in the folder."""
    config.nav = [
        {title: [page for page in pages if _is_there(config, *page.values())]}
        for section in config.nav
        for title, pages in section.items()
    ]
    return config


def on_files(files, config):
    """Add the first page: the README, as a page of docs/."""
    readme = (Path(config.docs_dir).parent / "README.md").read_text(encoding="ascii")
    files.append(File.generated(config, HOME, content=as_page(readme)))
    return files


def as_page(readme):
    """The README with links that are right from docs/."""
    return LINK.sub(lambda link: f"]({posixpath.relpath(link[1], 'docs')})", readme)


def on_page_markdown(markdown, page, config, files):
    """Send links to files of the repository to where these are shown; without an address, show their paths."""

    def rewritten(link):
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), target))
        if config.extra["source_url"]:
            return f"[{text}]({config.extra['source_url']}{path}{anchor})"
        return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"

    return LINK_OUT.sub(rewritten, markdown)


def _is_there(config, page):
    return page == HOME or (Path(config.docs_dir) / page).is_file()
