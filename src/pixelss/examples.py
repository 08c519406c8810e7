"""Copy the examples into a folder of your own: `python -m pixelss.examples FOLDER`.

A wheel holds them in `_examples`; an editable install takes them from its checkout.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

__all__ = ["copy_examples"]

_CHECKOUT = Path(__file__).parents[2] / "examples"
_SUFFIXES = (".ipynb", ".md", ".png", ".py", ".toml", ".yaml")  # as in pyproject.toml; weights and results lie beside
_EXTRA = ("jsonargparse", "matplotlib", "PIL", "tqdm", "yaml")  # what the extra `examples` brings


def copy_examples(folder: Path) -> list[Path]:
    """Write the examples into a folder that is new or empty, and return the files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} must be new or an empty folder, so that nothing is overwritten.")
    packed = files("pixelss") / "_examples"
    folders = [(packed if packed.is_dir() else _CHECKOUT, folder)]
    copies = []  # listed before the first is written: the folder may lie among the examples
    for here, there in folders:
        for part in here.iterdir():
            if part.is_dir():
                if part.name != "runs" and not part.name.startswith((".", "_")):
                    folders.append((part, there / part.name))
            elif part.name.endswith(_SUFFIXES):
                copies.append((part, there / part.name))
    if not copies:
        raise FileNotFoundError("this copy of pixelss came without examples: install its wheel, or take a checkout.")
    for source, target in copies:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return sorted(target for _, target in copies)


def main(arguments: Sequence[str] | None = None) -> None:
    """Copy, and print what comes next."""
    parser = argparse.ArgumentParser("python -m pixelss.examples", description="Copy the examples into a folder.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new or empty; nothing is overwritten")
    folder = parser.parse_args(arguments).folder
    try:
        written = copy_examples(folder)
    except OSError as error:
        parser.error(str(error))
    print(f"Wrote {len(written)} files; {folder / 'voc' / 'README.md'} is the manual.")
    install = 'python -m pip install "pixelss[examples]" && ' * (not all(map(find_spec, _EXTRA)))
    print(f"Next: {install}{shlex.join(['python', str(folder / 'quickstart.py')])}")


if __name__ == "__main__":
    main()
