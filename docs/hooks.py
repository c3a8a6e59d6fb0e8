"""Pages of the site that are files elsewhere in the repository.

Markdown files link to each other as they lie in the repository, so that the
links work on its web page. For the site this hook adds the pages below, and
turns links to them (and from them into docs/) into links of the site.
"""

import os
import posixpath
import re

from mkdocs.structure import files as files_lib

from aoarm_jax.config import explain, schema

# Page of the site -> file of the repository.
PAGES = {
  "index.md": "README.md",
  "contributing.md": "CONTRIBUTING.md",
  "changelog.md": "CHANGELOG.md",
  "books.md": "aoarm_jax/data/books/README.md",
  "CITATION.cff": "CITATION.cff",
}
_FIELDS = "<!-- fields -->"


def on_files(files, config):
  """Add the pages that lie outside docs/."""
  for page, path in PAGES.items():
    files.append(
      files_lib.File.generated(config, page, abs_src_path=os.path.abspath(path))
    )
  return files


def on_page_markdown(markdown, page, config, files):
  """Turn links of the repository into links of the site."""
  uri = page.file.src_uri
  path = PAGES.get(uri, f"docs/{uri}")
  pages = {path: page for page, path in PAGES.items()}

  def link(match):
    target, anchor = match[1], match[2] or ""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    target = pages.get(target, target.removeprefix("docs/"))
    start = posixpath.dirname(uri) or "."
    return f"]({posixpath.relpath(target, start)}{anchor})"

  markdown = re.sub(r"\]\(([^)#:]+)(#[^)]*)?\)", link, markdown)
  return markdown.replace(_FIELDS, _fields())


def _fields():
  """One table per section of the configuration."""
  tables = {}
  for name, field, default in schema.leaves(schema.Config()):
    section, _, short = name.removeprefix("config.").rpartition(".")
    data = field.metadata
    cells = (
      f"`{short}`",
      f"`{default!r}`",
      str(data.get("doc", "")),
      ", ".join(
        [
          *(f"`{choice}`" for choice in data.get("choices") or ()),
          *explain.limits(field),
        ]
      ),
      data.get("binds", ""),
    )
    row = " | ".join(cell.replace("|", "\\|") for cell in cells)
    tables.setdefault(section, []).append(f"| {row} |")
  head = (
    "| field | default | meaning | values | bound |\n|---|---|---|---|---|\n"
  )
  return "\n\n".join(
    (f"## {section}\n\n" if section else "") + head + "\n".join(rows)
    for section, rows in tables.items()
  )
