"""What may not stand in the page's files, whatever a browser makes of it."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "dpo" / "serving" / "page"
FILES = sorted(PAGE.iterdir())
SCRIPTS = sorted(PAGE.glob("*.js"))
NAMESPACE = "http://www.w3.org/2000/svg"  # the name of SVG, which browsers do not fetch

# Ways to make markup or code of a string, to frame or to reach another site.
FORBIDDEN = {
    "markup of a string": r"\b(inner|outer)HTML\b|insertAdjacentHTML|setHTML|srcdoc|DOMParser|createContextualFragment",
    "writing into the document": r"document\s*\.\s*write",
    "code of a string": r"\beval\b|\bFunction\s*\(|import\s*\(|set(Timeout|Interval)\s*\(\s*[\"'`]|javascript:",
    "inline handler": r"\son[a-z]+\s*=\s*[\"'`]|\.on[a-z]+\s*=[^=]|setAttribute\(\s*[\"'`]on",
    "inline style": r"<style|\sstyle\s*=\s*[\"']",
    "address elsewhere": r"(?:[a-z]+:)?//[a-z0-9]|url\(|@import|sendBeacon|WebSocket|EventSource|RTCPeer",
    "frame": r"<(iframe|base|embed|object)\b",
    "cookie": r"document\s*\.\s*cookie",
    "character that is not seen": "[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]",
}


@pytest.mark.parametrize("what", FORBIDDEN)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_forbidden(file: Path, what: str) -> None:
    text = file.read_text(encoding="utf-8").replace(NAMESPACE, "")
    found = [line for line in text.splitlines() if re.search(FORBIDDEN[what], line)]
    assert not found


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("node.innerHTML = text", "markup of a string"),
        ("document.write(text)", "writing into the document"),
        ("new Function(text)", "code of a string"),
        ("setTimeout('go()', 1)", "code of a string"),
        ('<button onclick="go()">', "inline handler"),
        ("node.onclick = go", "inline handler"),
        ('<p style="color: red">', "inline style"),
        ('<script src="https://cdn.example/x.js">', "address elsewhere"),
        ('<script src="//cdn.example/x.js">', "address elsewhere"),
        ("background: url(x.png)", "address elsewhere"),
        ("a\u202eb", "character that is not seen"),
    ],
)
def test_the_patterns_find_what_they_name(line: str, what: str) -> None:
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
def test_scripts_are_short_and_say_what_they_do(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 250
    assert lines[0].startswith("// ")


def test_imports_name_files_of_the_page() -> None:
    for file in SCRIPTS:
        for name in re.findall(r"from \"([^\"]+)\"", file.read_text(encoding="utf-8")):
            assert (PAGE / name).is_file(), (file.name, name)
            assert name.startswith("./")
