"""Say what a tag is not ready for: python .ci/tagged.py vX.Y.Z, silent where it is; the publish workflow runs it."""

import argparse
import re
import sys
from pathlib import Path


def problems(tag: str, root: Path) -> list[str]:
    """Return what contradicts the tag in the files that name the version."""
    code, cited, changes, readme, install = (
        (root / name).read_text(encoding="utf-8")
        for name in ("src/pixelss/__init__.py", "CITATION.cff", "CHANGELOG.md", "README.md", "docs/install.md")
    )
    found = []
    if not re.fullmatch(r"v\d+\.\d+\.\d+", tag):
        found.append(f"the tag must be vX.Y.Z, but is {tag}")
    version = tag.removeprefix("v")
    if f'\n__version__ = "{version}"\n' not in code:
        found.append(f"src/pixelss/__init__.py has another version than {version}")
    if f"\nversion: {version}\n" not in cited:
        found.append(f"CITATION.cff has another version than {version}")
    day = re.search(rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$", changes, re.MULTILINE)
    if not day:
        found.append(f"CHANGELOG.md has no heading '## [{version}] - YYYY-MM-DD'")
    elif f"\ndate-released: {day[1]}\n" not in cited:
        found.append(f"CITATION.cff has another date-released than CHANGELOG.md, {day[1]}")
    if not re.search(r"^## \[Unreleased\]\s+## ", changes, re.MULTILINE):
        found.append("CHANGELOG.md must begin with an empty '## [Unreleased]'")
    found += [
        f"{name} says that pixelss is not on PyPI yet, and would say so there"
        for name, text in (("README.md", readme), ("docs/install.md", install))
        if "not on PyPI yet" in text
    ]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tag", help="vX.Y.Z")
    sys.exit("\n".join(problems(parser.parse_args().tag, Path(__file__).parents[1])) or None)
