"""Import the installed package from FOLDER, and every public name of it: python imported.py FOLDER."""

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

import pixelss
import pixelss.viz

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
folder = parser.parse_args().folder
home = Path(pixelss.__file__).parent
if home.parent != folder:
    sys.exit(f"pixelss was imported from {home.parent}, not from {folder}.")
missing = [name for name in pixelss.__all__ if not hasattr(pixelss, name)]
modules = [module.name for module in pkgutil.walk_packages([str(home)], "pixelss.")]
for module in modules:
    importlib.import_module(module)
if missing or not (home / "py.typed").exists():
    sys.exit(f"the wheel lacks {missing or 'py.typed'}.")
print(f"imported {len(pixelss.__all__)} names and {len(modules)} modules of pixelss {pixelss.__version__}")
