"""What the page's files must not contain, checked in their source."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "dpo" / "serving" / "page"
FILES = sorted(PAGE.iterdir())
SCRIPTS = sorted(PAGE.glob("*.js"))
NAMESPACE = "http://www.w3.org/2000/svg"  # an XML namespace, which browsers do not fetch

# Ways to turn a string into markup or code, to embed a page, or to reach another site.
FORBIDDEN = {
    "string to markup": r"\b(inner|outer)HTML\b|insertAdjacentHTML|setHTML|srcdoc|DOMParser|createContextualFragment",
    "writing into the document": r"document\s*\.\s*write",
    "string to code": r"\beval\b|\bFunction\s*\(|import\s*\(|set(Timeout|Interval)\s*\(\s*[\"'`]|javascript:",
    "inline handler": r"\son[a-z]+\s*=\s*[\"'`]|\.on[a-z]+\s*=[^=]|setAttribute\(\s*[\"'`]on",
    "inline style": r"<style|\sstyle\s*=\s*[\"']",
    "address of another site": r"(?:[a-z]+:)?//[a-z0-9]|url\(|@import|sendBeacon|WebSocket|EventSource|RTCPeer",
    "frame": r"<(iframe|base|embed|object)\b",
    "cookie": r"document\s*\.\s*cookie",
    "invisible character": "[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]",
}


@pytest.mark.parametrize("what", FORBIDDEN)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_page_contains_nothing_forbidden(file: Path, what: str) -> None:
    text = file.read_text(encoding="utf-8").replace(NAMESPACE, "")
    assert not [line for line in text.splitlines() if re.search(FORBIDDEN[what], line)]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("node.innerHTML = text", "string to markup"),
        ("document.write(text)", "writing into the document"),
        ("new Function(text)", "string to code"),
        ("setTimeout('go()', 1)", "string to code"),
        ('<button onclick="go()">', "inline handler"),
        ("node.onclick = go", "inline handler"),
        ('<p style="color: red">', "inline style"),
        ('<script src="https://cdn.example/x.js">', "address of another site"),
        ('<script src="//cdn.example/x.js">', "address of another site"),
        ("background: url(x.png)", "address of another site"),
        ("a\u202eb", "invisible character"),
    ],
)
def test_the_patterns_match_what_they_name(line: str, what: str) -> None:
    assert re.search(FORBIDDEN[what], line)


def test_every_script_and_style_is_a_file_with_a_nonce() -> None:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    tags = re.findall(r"<script\b[^>]*>|<link\b[^>]*stylesheet[^>]*>", html)
    assert tags
    assert all('nonce="__NONCE__"' in tag for tag in tags)
    assert all(re.search(r' (src|href)="[a-z]+\.(js|css)"', tag) for tag in tags)
    assert not re.search(r"<script[^>]*>\s*\S+\s*</script>", html)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_lines_are_short(file: Path) -> None:
    assert max(map(len, file.read_text(encoding="utf-8").splitlines())) <= 120


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_scripts_are_short_and_begin_with_a_description(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 250
    assert lines[0].startswith("// ")


def test_imports_name_files_of_the_page() -> None:
    for file in SCRIPTS:
        for name in re.findall(r"from \"([^\"]+)\"", file.read_text(encoding="utf-8")):
            assert (PAGE / name).is_file(), (file.name, name)
            assert name.startswith("./")
