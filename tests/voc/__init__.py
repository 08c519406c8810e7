"""Tests of examples/voc, whose modules lie beside each other and not in a package."""

import sys
from pathlib import Path

VOC = Path(__file__).parent.parent.parent / "examples" / "voc"
sys.path[:0] = [str(VOC), str(VOC.parent)]
