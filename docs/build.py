"""What running the tutorials' code needs: settings, and figures as HTML. MkDocs loads it first."""

import base64
import io
import os
import re
import sys
from html import escape, unescape
from importlib.resources import as_file, files
from pathlib import Path

import latex2mathml.converter
from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont
from mkdocs.exceptions import PluginError

HERE = Path(__file__).parent
KEPT = HERE.parent / ".cache" / "docs"

FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.DOTALL)

# A function's name, and not a bracket after it: TeX sets a thin space between them.
NAMES = "arcsinh|asinh|cos|cosh|det|exp|log|max|min|sin|sinh"
FUNCTION = re.compile(rf"(<mi>(?:{NAMES})</mi>)(?=<m[ins])")
SEARCH = 'data-md-component="search" role="dialog" aria-label="Search"'

# Unicode's letters, Greek, punctuation, operators, arrows, brackets and mathematical alphabets.
BLOCKS = [
    (0x20, 0x180), (0x300, 0x400), (0x2000, 0x2070), (0x20D0, 0x2400), (0x27C0, 0x2A00),
    (0x1D400, 0x1D800),
]  # fmt: skip

# The flows here are small: more threads than one only get into each other's way.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("MPLBACKEND", "agg")


def on_config(config):
    """Let the pages import this module and the tutorials' modules; keep what their code prints."""
    for folder in (HERE, HERE / "tutorials"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    import cache

    cache.install(KEPT / "outputs")
    return config


def on_files(files, config):
    """Leave one of several processes its share of the pages: `DOCS_SHARE=2/3` is the second's.

    What their code prints is on file for the build of the whole.
    """
    number, count = map(int, os.environ.get("DOCS_SHARE", "1/1").split("/"))
    pages = sorted(files.documentation_pages(), key=lambda page: -len(page.content_string))
    for i, page in enumerate(pages):
        if i % count != number - 1:
            files.remove(page)
    return files


def on_page_content(html, page, **_):
    """Refuse what no reader should see, tabs that run together and empty boxes; set formulas."""
    for labels in re.findall(r'<div class="tabbed-labels">(.*?)</div>', html, re.DOTALL):
        names = re.findall(r"<label[^>]*>(.*?)</label>", labels, re.DOTALL)
        if len(set(names)) < len(names):
            raise PluginError(f"{page.file.src_uri}: tabs {names} are two groups: use `===!`")
    if re.search(r"<code[^>]*>(\s|<[^>]*>)*</code>", html):
        raise PluginError(f"{page.file.src_uri}: a block shows no output: drop its `result`")
    return FORMULA.sub(as_mathml, html)


def on_post_page(output, **_):
    """Name the theme's search for screen readers."""
    return output.replace('data-md-component="search" role="dialog"', SEARCH, 1)


def on_post_build(config, **_):
    """Give the site a font for formulas: browsers stretch brackets with no other kind."""
    source = files("ziamath.fonts") / "STIXTwoMath-Regular.ttf"
    with as_file(source) as path:
        font = TTFont(path)
    subsetter = Subsetter(Options(layout_features=["*"], notdef_outline=True))
    subsetter.populate(unicodes=[code for block in BLOCKS for code in range(*block)])
    subsetter.subset(font)
    font.flavor = "woff"
    font.save(Path(config.site_dir) / "assets" / "math.woff")


def as_mathml(match):
    """Return a formula that pymdownx.arithmatex has marked as MathML, which browsers set."""
    tag, delimiter, tex = match.groups()
    display = "inline" if delimiter == "(" else "block"
    formula = latex2mathml.converter.convert(unescape(tex).strip(), display=display)
    if ">&<" in formula:
        raise PluginError(f"columns outside of a table, such as `align*`, in {tex}")
    formula = FUNCTION.sub(r'\1<mspace width="0.17em"/>', formula)
    # What may scroll has to be in the keyboard's reach.
    reach = ' tabindex="0"' if tag == "div" else ""
    return f'<{tag} class="formula"{reach}>{formula}</{tag}>'


def figure(fig, alt, caption):
    """Return a matplotlib figure as an HTML figure that holds the picture itself."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    fig.savefig(buffer, format="webp", dpi=120, pil_kwargs={"quality": 90, "method": 6})
    plt.close(fig)
    width, height = (round(120 * inches) for inches in fig.get_size_inches())
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure class="run"><img src="data:image/webp;base64,{data}" alt="{escape(alt)}" '
        f'width="{width}" height="{height}" loading="lazy">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def scratch(name):
    """Return a path for a file that an example writes."""
    folder = KEPT / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
