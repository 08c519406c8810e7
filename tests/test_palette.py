"""PASCAL VOC's colours, by the bits of the class: what its development kit says in a loop."""

from pixelss._palette import voc_palette

SIGNATURES = {"voc_palette": "()"}
BLOCKS = {"voc_palette": "a picture's colours, no tensors"}


def colour_by_loops(index):
    channels = [0, 0, 0]
    for level in range(7, -1, -1):
        for channel in range(3):
            channels[channel] |= (index >> channel & 1) << level
        index >>= 3
    return channels


def test_palette():
    assert voc_palette().tolist() == [colour_by_loops(index) for index in range(256)]
