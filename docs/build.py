"""What running the tutorials' code needs: settings, and figures as HTML. MkDocs loads it first."""

import base64
import io
import os
import re
import sys
import tempfile
from html import escape
from pathlib import Path

from mkdocs.exceptions import PluginError

HERE = Path(__file__).parent
SCRATCH = Path(tempfile.gettempdir()) / "pyroflows-docs"

# The flows here are small: more threads than one only get into each other's way.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("MPLBACKEND", "agg")


def on_config(config):
    """Let the pages import this module, and the tutorials' modules."""
    sys.path[:0] = [str(HERE), str(HERE / "tutorials")]
    return config


def on_page_content(html, page, **_):
    """Refuse what no reader should see: tabs that run together, and boxes of output without any."""
    for labels in re.findall(r'<div class="tabbed-labels">(.*?)</div>', html, re.DOTALL):
        names = re.findall(r"<label[^>]*>(.*?)</label>", labels, re.DOTALL)
        if len(set(names)) < len(names):
            raise PluginError(f"{page.file.src_uri}: tabs {names} are two groups: use `===!`")
    if re.search(r"<code[^>]*>(\s|<[^>]*>)*</code>", html):
        raise PluginError(f"{page.file.src_uri}: a block shows no output: drop its `result`")


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
    SCRATCH.mkdir(exist_ok=True)
    return SCRATCH / name
