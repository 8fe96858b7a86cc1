"""What the site generator does not do by itself: pages made from the code, files outside docs/ that pages link to,
public names in `::: ` directives, equations as MathML (no script, no font from elsewhere), and drawings that follow the
theme.
"""

import html
import os
import posixpath
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
import generated

_OUTSIDE = "repository"  # folder of the site for files from outside docs/
# Start of a page's path -> how much its words count in the search: what explains comes before what lists or records.
_BOOST = {"how_to/": 4, "concepts/": 4, "index.md": 4, "LOG.md": 0.2, "zoo.md": 0.2, "repository/": 0.2}
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")


def on_config(config: Any) -> Any:
    """Take name and description from pyproject.toml."""
    project = tomllib.loads((generated.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.site_name = project["name"]
    config.site_description = project["description"]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and what pages link to outside docs/."""
    for path, page in generated.PAGES.items():
        files.append(File.generated(config, path, content=page()))
    pending = [file for file in files.documentation_pages()]
    while pending:
        file = pending.pop()
        for link, _ in _LINK.findall(file.content_string):
            outside = _outside(file.src_uri, link)
            path = f"{_OUTSIDE}/{_site_name(outside)}" if outside else ""
            if outside and not outside.startswith("docs/") and not files.get_file_from_path(path):
                files.append(File.generated(config, path, abs_src_path=str(generated.ROOT / outside)))
                pending += [files.get_file_from_path(path)] if path.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links out of docs/ to the copies, and give directives for public names the place of the code."""

    def relinked(match: re.Match[str]) -> str:
        outside = _outside(page.file.src_uri, match[1])
        if not outside:
            return match[0]
        inside = outside.removeprefix("docs/")
        target = inside if inside != outside else f"{_OUTSIDE}/{_site_name(outside)}"
        return posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".") + (match[2] or "")

    boost = next((boost for start, boost in _BOOST.items() if page.file.src_uri.startswith(start)), 1)
    page.meta |= {"search": {"boost": boost}, "tags": generated.SEARCHED.get(page.file.src_uri, [])}
    return _DIRECTIVE.sub(_directive, _LINK.sub(relinked, markdown))


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Equations as MathML, drawings into the page."""
    content = re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', _mathml, content, flags=re.DOTALL)
    folder = (generated.DOCS / page.file.src_uri).parent

    def inlined(match: re.Match[str]) -> str:
        attributes = dict(re.findall(r'(\w+)="([^"]*)"', match[0]))
        source = re.sub(r"^(\.\./)+", "", attributes["src"])
        path = next((p for p in (folder / source, generated.DOCS / source) if p.is_file()), None)
        return match[0] if path is None else _drawing(path, attributes.get("alt", ""))

    return re.sub(r'<img [^>]*src="[^"]*concepts/[^"]*\.svg"[^>]*>', inlined, content)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """The theme leaves its search without a name for those who hear the page."""
    dialog = 'data-md-component="search" role="dialog"'
    return output.replace(dialog, f'{dialog} aria-label="Search"')


def _outside(page: str, link: str) -> str | None:
    """The path from the root of the checkout, if the link leaves docs/ (or, on a page from outside, if it is one)."""
    if re.match(r"[a-z]+:|/", link):
        return None
    base = posixpath.dirname(page)
    base = base.removeprefix(_OUTSIDE).lstrip("/") if page.startswith(f"{_OUTSIDE}/") else f"docs/{base}"
    path = posixpath.normpath(posixpath.join(base, link))
    if path.startswith("..") or (path.startswith("docs/") and not page.startswith(f"{_OUTSIDE}/")):
        return None
    return path if os.path.exists(generated.ROOT / path) else None


def _site_name(path: str) -> str:
    """Code is shown as text, not downloaded."""
    return f"{path}.txt" if Path(path).suffix in (".py", ".toml", "") else path


_DIRECTIVE = re.compile(rf"^::: {generated.PACKAGE}\.(\w+)$", re.MULTILINE)


def _directive(match: re.Match[str]) -> str:
    name = match[1]
    place = generated.public_names()[name]
    heading = f"{generated.PACKAGE}.{name}"
    return (
        f'<a id="{heading}"></a>\n\n::: {generated.PACKAGE}.{place}.{name}\n    options:\n'
        f"      heading: {heading}\n      toc_label: {name}"
    )


def _mathml(match: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    text = html.unescape(match[2]).strip()
    display = text.startswith("\\[")
    made = convert(text[2:-2].strip(), display="block" if display else "inline")
    return f'<div class="equation" tabindex="0">{made}</div>' if display else made


def _drawing(path: Path, description: str) -> str:
    """The SVG itself, without its own colours: the site's style has them for both themes."""
    text = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"<\?xml.*?\?>", "", text)
    named = text.replace("<svg ", f'<svg aria-label="{description}" ', 1)
    return f'<span class="drawing">{named}</span>'
