"""Hooks of the documentation site: pages that lie outside ``docs/``, and links that lead there.

The pages in ``docs/`` are read in the repository too, so they link to source files and to the pages at the
top level by relative paths. The site shows the top-level pages under the names of :data:`OUTER`, each linked
source file as a page of its own, and the public Python API from its docstrings.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OUTER = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
    "examples/deploy/README.md": "deploy-files.md",
}
RELATED = (
    "artifacts.ServerProfile",
    "artifacts.EdgeProfile",
    "artifacts.AcceptanceTrace",
    "fitting.FittedEstimator",
    "fitting.FittedPredictor",
    "artifacts.plan.Plan",
    "simulation.System",
    "simulation.arrivals.ClosedFleet",
    "simulation.arrivals.Poisson",
    "simulation.arrivals.Replay",
    "simulation.arrivals.Lengths",
    "simulation.devices.DeviceProfile",
    "settings.shared_settings.LinkModel",
    "simulation.synthetic_acceptance.SyntheticAcceptance",
    "simulation.trace_replay.TraceAcceptance",
    "simulation.Report",
)
"""What the public names take and return, shown behind them."""
LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".Dockerfile": "docker"}
STYLE = ".md-grid { max-width: 76rem } .md-typeset table:not([class]) { font-size: .68rem }\n"
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in ``docs/``, and every source file that a page links to."""
    pages = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    pages |= {outer: (ROOT / outer).read_text() for outer in OUTER}
    for outer, name in OUTER.items():
        files.append(File.generated(config, name, content=_relink(pages[outer], outer, name)))
    files.append(File.generated(config, "site.css", content=STYLE))
    files.append(File.generated(config, "python.md", content=_python_api()))
    for source in sorted({target for page, text in pages.items() for target in _sources(text, page)}):
        files.append(File.generated(config, _source_page(source), content=_show(source)))
    return files


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Docstrings use reStructuredText roles and literal blocks; Markdown shows their marks."""
    if page.file.src_uri != "python.md":
        return html
    html = re.sub(r":(?:class|mod|func|meth|data|attr):(<code>)[~!]?", r"\1", html)
    return html.replace("::</p>", ":</p>")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead the links of a page in ``docs/`` to what the site has in their place."""
    uri = page.file.src_uri
    return _titled(markdown if page.file.generated_by else _relink(markdown, f"docs/{uri}", uri))


def _targets(text: str, page: str) -> list[tuple[re.Match[str], str]]:
    """Each relative link of ``page`` (a path in the repository) and the path it leads to."""
    folder = PurePosixPath(page).parent.as_posix()
    links = [found for found in _LINK.finditer(text) if "://" not in found[2]]
    return [(found, normpath(f"{folder}/{found[2]}")) for found in links]


def _sources(text: str, page: str) -> list[str]:
    outside = [target for _, target in _targets(text, page) if not target.startswith("docs/")]
    return [target for target in outside if target not in OUTER and (ROOT / target).is_file()]


def _relink(text: str, page: str, name: str) -> str:
    """``text`` of the repository's ``page`` with links as they must be on the site's page ``name``."""
    here = PurePosixPath(name).parent.as_posix()
    known = {found.span(): target for found, target in _targets(text, page)}

    def lead(found: re.Match[str]) -> str:
        target = known.get(found.span())
        if target is None:
            return found[0]
        if target in OUTER:
            site = OUTER[target]
        elif target.startswith("docs/"):
            site = target.removeprefix("docs/")
        elif (ROOT / target).is_file():
            site = _source_page(target)
        else:
            return found[0]
        return f"{found[1]}{relpath(site, here)}{found[3]}"

    return _LINK.sub(lead, text)


def _titled(text: str) -> str:
    """``text`` whose links name pages by title, not by file."""

    def titled(found: re.Match[str]) -> str:
        file = ROOT / "docs" / found[1]
        return f"[{file.read_text().partition(chr(10))[0].lstrip('# ')}](" if file.is_file() else found[0]

    return re.sub(r"\[(?:docs/)?([\w-]+\.md)\]\(", titled, text)


def _source_page(source: str) -> str:
    return f"source/{source}.md"


def _show(source: str) -> str:
    path = ROOT / source
    language = LANGUAGES.get(path.suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {source}\n\n~~~~{language}\n{path.read_text()}\n~~~~\n"


def _python_api() -> str:
    """One section for each public name, in the order of ``wispprof.__all__``."""
    tree = ast.parse((ROOT / "wispprof" / "__init__.py").read_text())
    assigned = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    where = ast.literal_eval(assigned["_WHERE"])
    parts = ["# Python API\n", _section("wispprof", members=False, show_root_heading=False)]
    for name in ast.literal_eval(assigned["__all__"]):
        if name in where:
            module, _, attribute = where[name].partition(":")
            named = {"heading": f"wispprof.{name}", "toc_label": name}
            # A setting's default holds its help text; config.md is the page of settings.
            plain = module.startswith("wispprof.settings.")
            parts.append(_section(f"{module}.{attribute or name}", merge_init_into_class=not plain, **named))
            if plain:
                parts.append(f"`{name}.of(…)` takes all options by the names of the [settings](config.md).\n")
    parts.append("## Records and parts\n\nWhat the functions above take and return.\n")
    parts += [_section(f"wispprof.{name}", heading=f"wispprof.{name}", heading_level=3) for name in RELATED]
    parts += ["## Errors\n", _section("wispprof.errors", show_root_heading=False, heading_level=3)]
    return "\n".join(parts)


def _section(name: str, **options: Any) -> str:
    return "\n".join(
        [f"::: {name}", "    options:", *(f"      {k}: {json.dumps(v)}" for k, v in options.items()), ""]
    )
