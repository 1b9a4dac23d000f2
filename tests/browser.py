"""A page in a real browser, without WebGL and without a network."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Opened:
    """What a browser has made of a page: the elements after all scripts, and what it said on its console."""

    dom: str
    console: list[str]

    def figure(self, name: str) -> str:
        """The drawing with this id, up to the next caption."""
        start = self.dom.index(f'id="{name}"')
        return self.dom[start : self.dom.index("<figcaption>", start)]

    def lines(self, name: str) -> list[str]:
        """The paths of the lines in this drawing, without those of its legend."""
        return re.findall(r'<path class="js-line" d="(M[^"]+)', self.figure(name).split('class="infolayer"')[0])

    @property
    def figures(self) -> list[str]:
        return re.findall(r'<div id="(\w+)" class="plotly-graph-div', self.dom)

    @property
    def text(self) -> str:
        """What can be read, without tags."""
        parser = _Text()
        parser.feed(self.dom)
        return " ".join("".join(parser.parts).split())


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.silent = tag in ("script", "style")
        self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self.silent = False
        self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data)


def browse(page: Path) -> Opened:
    """The page as Chromium shows it; skips where there is no such browser."""
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-webgl"]
    options += ["--disable-3d-apis", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1280,900"]
    options += ["--enable-logging=stderr", "--virtual-time-budget=10000", f"--user-data-dir={page.parent / 'profile'}"]
    words = [program, *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return Opened(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])
