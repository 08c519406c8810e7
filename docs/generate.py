"""Write what follows from the code: the API's index, the bibliography page and the README's table of blocks.

    python docs/generate.py

Names and their first sentences come from the docstrings, the order of the pages from the toctrees of docs/index.md, a
row's words from `does:` at the head of its page, papers from the docstrings' Reference sections. tests/test_docs.py
fails where a text that is committed differs.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "src"))

import pixelss  # noqa: E402
import pixelss.io  # noqa: E402
import pixelss.viz  # noqa: E402

URL = "https://github.com/pixelss/pixelss"
KEY = re.compile(r'[A-Z][\w-]+ \d{4}(?=,\s+")')  # of a source in a Reference section
BEGIN, END = "<!-- blocks: python docs/generate.py -->\n", "<!-- /blocks -->\n"


class Paper(NamedTuple):
    """What the bibliography page says of a source."""

    authors: str
    title: str
    venue: str
    link: str


def arxiv(number: str) -> str:
    return f"https://arxiv.org/abs/{number}"


BIBLIOGRAPHY = {
    "Adams 2010": Paper(
        "Andrew Adams, Jongmin Baek, Myers Abraham Davis",
        "Fast High-Dimensional Filtering Using the Permutohedral Lattice",
        "Computer Graphics Forum 29(2), Eurographics 2010",
        "https://graphics.stanford.edu/papers/permutohedral/",
    ),
    "Ahn 2018": Paper(
        "Jiwoon Ahn, Suha Kwak",
        "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised Semantic "
        "Segmentation",
        "CVPR 2018",
        arxiv("1803.10464"),
    ),
    "Ahn 2019": Paper(
        "Jiwoon Ahn, Sunghyun Cho, Suha Kwak",
        "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations",
        "CVPR 2019",
        arxiv("1904.05044"),
    ),
    "Chang 2020": Paper(
        "Yu-Ting Chang, Qiaosong Wang, Wei-Chih Hung, Robinson Piramuthu, Yi-Hsuan Tsai, Ming-Hsuan Yang",
        "Weakly-Supervised Semantic Segmentation via Sub-category Exploration",
        "CVPR 2020",
        arxiv("2008.01183"),
    ),
    "Chen 2015": Paper(
        "Liang-Chieh Chen, George Papandreou, Iasonas Kokkinos, Kevin Murphy, Alan L. Yuille",
        "Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs",
        "ICLR 2015",
        arxiv("1412.7062"),
    ),
    "Chen 2016": Paper(
        "Liang-Chieh Chen, Yi Yang, Jiang Wang, Wei Xu, Alan L. Yuille",
        "Attention to Scale: Scale-aware Semantic Image Segmentation",
        "CVPR 2016",
        arxiv("1511.03339"),
    ),
    "Chen 2017": Paper(
        "Liang-Chieh Chen, George Papandreou, Florian Schroff, Hartwig Adam",
        "Rethinking Atrous Convolution for Semantic Image Segmentation",
        "2017",
        arxiv("1706.05587"),
    ),
    "Chen 2020": Paper(
        "Liyi Chen, Weiwei Wu, Chenchen Fu, Xiao Han, Yuntao Zhang",
        "Weakly Supervised Semantic Segmentation with Boundary Exploration",
        "ECCV 2020",
        "https://github.com/mt-cly/BES",
    ),
    "Chen 2022": Paper(
        "Zhaozheng Chen, Tan Wang, Xiongwei Wu, Xian-Sheng Hua, Hanwang Zhang, Qianru Sun",
        "Class Re-Activation Maps for Weakly-Supervised Semantic Segmentation",
        "CVPR 2022",
        arxiv("2203.00962"),
    ),
    "Chen 2023": Paper(
        "Tianle Chen, Zheda Mai, Ruiwen Li, Wei-lun Chao",
        "Segment Anything Model (SAM) Enhanced Pseudo Labels for Weakly Supervised Semantic Segmentation",
        "2023",
        arxiv("2305.05803"),
    ),
    "Du 2022": Paper(
        "Ye Du, Zehua Fu, Qingjie Liu, Yunhong Wang",
        "Weakly Supervised Semantic Segmentation by Pixel-to-Prototype Contrast",
        "CVPR 2022",
        arxiv("2110.07110"),
    ),
    "Everingham 2015": Paper(
        "Mark Everingham, S. M. Ali Eslami, Luc Van Gool, Christopher K. I. Williams, John Winn, Andrew Zisserman",
        "The PASCAL Visual Object Classes Challenge: A Retrospective",
        "International Journal of Computer Vision 111, 2015",
        "https://doi.org/10.1007/s11263-014-0733-5",
    ),
    "Jo 2021": Paper(
        "Sanghyun Jo, In-Jae Yu",
        "Puzzle-CAM: Improved Localization via Matching Partial and Full Features",
        "ICIP 2021",
        arxiv("2101.11253"),
    ),
    "Fan 2020": Paper(
        "Junsong Fan, Zhaoxiang Zhang, Chunfeng Song, Tieniu Tan",
        "Learning Integral Objects with Intra-Class Discriminator for Weakly-Supervised Semantic Segmentation",
        "CVPR 2020",
        "https://github.com/js-fan/ICD",
    ),
    "Kraehenbuehl 2011": Paper(
        "Philipp Krähenbühl, Vladlen Koltun",
        "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials",
        "NIPS 2011",
        arxiv("1210.5644"),
    ),
    "Kweon 2021": Paper(
        "Hyeokjun Kweon, Sung-Hoon Yoon, Hyeonseong Kim, Daehee Park, Kuk-Jin Yoon",
        "Unlocking the Potential of Ordinary Classifier: Class-specific Adversarial Erasing Framework for Weakly "
        "Supervised Semantic Segmentation",
        "ICCV 2021",
        "https://doi.org/10.1109/ICCV48922.2021.00691",
    ),
    "Kweon 2024": Paper(
        "Hyeokjun Kweon, Kuk-Jin Yoon",
        "From SAM to CAMs: Exploring Segment Anything Model for Weakly Supervised Semantic Segmentation",
        "CVPR 2024",
        "https://github.com/sangrockEG/S2C",
    ),
    "Li 2021": Paper(
        "Yi Li, Zhanghui Kuang, Liyang Liu, Yimin Chen, Wayne Zhang",
        "Pseudo-mask Matters in Weakly-supervised Semantic Segmentation",
        "ICCV 2021",
        arxiv("2108.12995"),
    ),
    "Lee 2021": Paper(
        "Jungbeom Lee, Eunji Kim, Sungroh Yoon",
        "Anti-Adversarially Manipulated Attributions for Weakly and Semi-Supervised Semantic Segmentation",
        "CVPR 2021",
        arxiv("2103.08896"),
    ),
    "Lin 2023": Paper(
        "Yuqi Lin, Minghao Chen, Wenxiao Wang, Boxi Wu, Ke Li, Binbin Lin, Haifeng Liu, Xiaofei He",
        "CLIP is Also an Efficient Segmenter: A Text-Driven Approach for Weakly Supervised Semantic Segmentation",
        "CVPR 2023",
        arxiv("2212.09506"),
    ),
    "Ru 2022": Paper(
        "Lixiang Ru, Yibing Zhan, Baosheng Yu, Bo Du",
        "Learning Affinity from Attention: End-to-End Weakly-Supervised Semantic Segmentation with Transformers",
        "CVPR 2022",
        arxiv("2203.02664"),
    ),
    "Ru 2023": Paper(
        "Lixiang Ru, Heliang Zheng, Yibing Zhan, Bo Du",
        "Token Contrast for Weakly-Supervised Semantic Segmentation",
        "CVPR 2023",
        arxiv("2303.01267"),
    ),
    "Sachdeva 2014": Paper(
        "Sushant Sachdeva, Nisheeth K. Vishnoi",
        "Faster Algorithms via Approximation Theory",
        "Foundations and Trends in Theoretical Computer Science 9(2), 2014",
        "https://doi.org/10.1561/0400000065",
    ),
    "Shimoda 2019": Paper(
        "Wataru Shimoda, Keiji Yanai",
        "Self-Supervised Difference Detection for Weakly-Supervised Semantic Segmentation",
        "ICCV 2019",
        arxiv("1911.01370"),
    ),
    "Smith 2015": Paper(
        "Nathaniel Smith, Stéfan van der Walt",
        "A Better Default Colormap for Matplotlib",
        "Talk at SciPy 2015",
        "https://bids.github.io/colormap/",
    ),
    "Tarvainen 2017": Paper(
        "Antti Tarvainen, Harri Valpola",
        "Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep "
        "learning results",
        "NIPS 2017",
        arxiv("1703.01780"),
    ),
    "Wang 2020": Paper(
        "Yude Wang, Jing Zhang, Meina Kan, Shiguang Shan, Xilin Chen",
        "Self-supervised Equivariant Attention Mechanism for Weakly Supervised Semantic Segmentation",
        "CVPR 2020",
        arxiv("2004.04581"),
    ),
    "Wightman 2019": Paper(
        "Ross Wightman",
        "PyTorch Image Models",
        "Software, since 2019",
        "https://github.com/huggingface/pytorch-image-models",
    ),
    "Wu 2016": Paper(
        "Zifeng Wu, Chunhua Shen, Anton van den Hengel",
        "Wider or Deeper: Revisiting the ResNet Model for Visual Recognition",
        "2016",
        arxiv("1611.10080"),
    ),
    "Xu 2022": Paper(
        "Lian Xu, Wanli Ouyang, Mohammed Bennamoun, Farid Boussaid, Dan Xu",
        "Multi-class Token Transformer for Weakly Supervised Semantic Segmentation",
        "CVPR 2022",
        arxiv("2203.02891"),
    ),
    "Xu 2023": Paper(
        "Lian Xu, Mohammed Bennamoun, Farid Boussaid, Hamid Laga, Wanli Ouyang, Dan Xu",
        "MCTformer+: Multi-Class Token Transformer for Weakly Supervised Semantic Segmentation",
        "2023",
        arxiv("2308.03005"),
    ),
    "Yoon 2021": Paper(
        "Sung-Hoon Yoon, Hyeokjun Kweon, Jaeseok Jeong, Hyeonseong Kim, Shinjeong Kim, Kuk-Jin Yoon",
        "Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation",
        "2021",
        arxiv("2112.05351"),
    ),
    "Zhang 2020": Paper(
        "Bingfeng Zhang, Jimin Xiao, Yunchao Wei, Mingjie Sun, Kaizhu Huang",
        "Reliability Does Matter: An End-to-End Weakly Supervised Semantic Segmentation Approach",
        "AAAI 2020",
        arxiv("1911.08039"),
    ),
    "Zhang 2021": Paper(
        "Fei Zhang, Chaochen Gu, Chenyue Zhang, Yuchao Dai",
        "Complementary Patch for Weakly Supervised Semantic Segmentation",
        "ICCV 2021",
        arxiv("2108.03852"),
    ),
    "Zhou 2016": Paper(
        "Bolei Zhou, Aditya Khosla, Agata Lapedriza, Aude Oliva, Antonio Torralba",
        "Learning Deep Features for Discriminative Localization",
        "CVPR 2016",
        arxiv("1512.04150"),
    ),
}


class Page(NamedTuple):
    """A page of docs/blocks: where it lies, its caption in the sidebar, its heading, its row's words, its names."""

    path: str
    room: str
    title: str
    does: str
    names: list[str]


def public_names() -> dict[str, object]:
    """Return every public function and class, those of `io` and `viz` with their room in front, and what it names."""
    names = {name: getattr(pixelss, name) for name in pixelss.__all__}
    for room in (pixelss.io, pixelss.viz):
        prefix = room.__name__.removeprefix("pixelss.")
        named = {f"{prefix}.{name}": getattr(room, name) for name in room.__all__}
        names |= {name: value for name, value in named.items() if callable(value)}
    return names


def pages() -> list[Page]:
    """Return the pages of the blocks, in the order of the sidebar."""
    found = []
    for caption, tree in re.findall(r"^:caption: (.*)\n\n((?:blocks/.*\n)+)", (DOCS / "index.md").read_text(), re.M):
        for path in tree.split():
            text = (DOCS / f"{path}.md").read_text()
            title, does = re.search(r"^# (.*)$", text, re.M), re.search(r'\A---\ndoes: "?(.*?)"?\n---\n', text)
            if not title or not does:
                raise ValueError(f"docs/{path}.md must have a heading, and begin with `does:` between lines of ---.")
            names = re.findall(r"^\.\. auto(?:function|class):: pixelss\.(\S+)$", text, re.M)
            found.append(Page(f"{path}.md", caption, title[1], does[1], names))
    return found


def first_sentence(name: str) -> str:
    """Return what a docstring says in its first line, for Markdown."""
    line = (public_names()[name].__doc__ or "").strip().splitlines()[0]
    parts = line.split("`")  # odd ones are code
    return "`".join(re.sub(r"([*_|<>])", r"\\\1", part) if i % 2 == 0 else part for i, part in enumerate(parts))


def references(name: str) -> dict[str, list[str]]:
    """Return key -> equations and tables named after it, of every source in a docstring's Reference section."""
    section = re.search(r"Reference:\n(.*?)\n\s*\n", (public_names()[name].__doc__ or "") + "\n\n", re.DOTALL)
    parts = re.split(rf"({KEY.pattern})", section[1]) if section else [""]
    if section and len(parts) < 3:
        raise ValueError(f'The Reference of {name} must name a source as `Yoon 2021, "short title"`.')
    found: dict[str, list[str]] = {}
    for key, text in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(key, []).extend(re.findall(r"Eq\. \d+|Table \d+", text))
    return found


def sources(names: list[str]) -> dict[str, list[str]]:
    """Return the references of several names as one, sorted."""
    found: dict[str, set[str]] = {}
    for name in names:
        for key, equations in references(name).items():
            found.setdefault(key, set()).update(equations)
    return {key: sorted(equations) for key, equations in found.items()}


def label(key: str) -> str:
    return key.lower().replace(" ", "-")


def api() -> str:
    """Return docs/api.md with its index of names, a line each, between the markers."""
    lines, room = [], ""
    for page in pages():
        if page.room != room:
            room = page.room
            lines += ["", f"## {room}"]
        lines += ["", f"[{page.title}]({page.path})", ""]
        lines += [f"- {{py:obj}}`~pixelss.{name}`: {first_sentence(name)}" for name in page.names]
    return between_markers(DOCS / "api.md", "\n".join(lines[1:]) + "\n")


def papers() -> str:
    """Return docs/papers.md: every source of the docstrings, and what of it is where."""
    lines = [
        "# Papers",
        "",
        "Every source that a docstring names, and the blocks that come from it.",
        "This page is written by `python docs/generate.py`.",
    ]
    blocks = pages()
    for key, paper in sorted(BIBLIOGRAPHY.items()):
        number = paper.link.removeprefix(arxiv(""))
        link = f"[arXiv:{number}]({paper.link})" if number != paper.link else f"<{paper.link}>"
        lines += ["", f"({label(key)})=", f"## {key}", ""]
        lines += [f"{paper.authors}.", f"*{paper.title}*.", f"{paper.venue}, {link}.", ""]
        for page in blocks:
            cited = [(name, references(name)[key]) for name in page.names if key in references(name)]
            shown = [f"{{py:obj}}`~pixelss.{name}`" + f" ({', '.join(where)})" * bool(where) for name, where in cited]
            if shown:
                lines.append(f"- [{page.title}]({page.path}): {', '.join(shown)}")
    return "\n".join(lines) + "\n"


def readme() -> str:
    """Return the README with its table of blocks, a row a page, between the markers."""
    lines = ["| block | what it does | paper |", "|---|---|---|"]
    for page in pages():
        shown = [name for name in page.names if not hasattr(public_names()[name], "_fields")]  # results say nothing new
        names = ", ".join(f"`{name}`" for name in shown)
        papers = [
            ", ".join([f"[{key}]({URL}/blob/main/docs/papers.md#{label(key)})", *equations])
            for key, equations in sources(page.names).items()
        ]
        lines.append(f"| [{names}]({URL}/blob/main/docs/{page.path}) | {page.does} | {'; '.join(papers)} |")
    return between_markers(ROOT / "README.md", "\n".join(lines) + "\n")


def between_markers(path: Path, text: str) -> str:
    """Return a file's text with what stands between its markers replaced."""
    content = path.read_text()
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise ValueError(f"{path.name} must hold the lines {BEGIN.strip()} and {END.strip()} once each.")
    before, rest = content.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def generated() -> dict[Path, str]:
    """Return the text of every generated file."""
    return {DOCS / "api.md": api(), DOCS / "papers.md": papers(), ROOT / "README.md": readme()}


if __name__ == "__main__":
    argparse.ArgumentParser(description="Write docs/api.md, docs/papers.md, the README's table of blocks.").parse_args()
    for path, text in generated().items():
        path.write_text(text)
