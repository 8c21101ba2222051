"""Hook of MkDocs: pages that may be absent, and links that leave docs/, which lead nowhere on the site."""

import posixpath
import re
from pathlib import Path

LINK_OUT = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(#[^)]*)?\)")


def on_config(config):
    """Leave out of the navigation what is not in the folder."""
    config.nav = [
        {title: [page for page in pages if _is_there(config, *page.values())]}
        for section in config.nav
        for title, pages in section.items()
    ]
    return config


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
    return (Path(config.docs_dir) / page).is_file()
