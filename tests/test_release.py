"""What a release rests on: the pins that CI tries, and the version in two places."""

import re
from pathlib import Path

import pixelss

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_lowest_pins_are_those_of_the_project():
    (listed,) = re.findall(r"^dependencies = \[(.*)\]$", PROJECT, re.MULTILINE)
    wanted = dict(re.findall(r'"(\w+)>=([\d.]+)"', listed))
    pins = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / ".ci" / "lowest.txt").read_text(), re.MULTILINE))
    assert {name: version.removesuffix(".0") for name, version in pins.items()} == wanted


def test_the_citation_has_the_version():
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == pixelss.__version__
