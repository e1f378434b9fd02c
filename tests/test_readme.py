"""The README's examples run as they stand, each in a Python of its own, and its links exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
HOSTS = {"pyroflows": ("jax", "numpyro"), "numpyro_flows": ("torch", "pyro")}

# Refuses what a reader with one wing's extra does not have, then runs the example.
ALONE = """
import sys
absent, example = sys.argv[1].split(), sys.argv[2]
sys.modules.update(dict.fromkeys(absent))
exec(compile(example, "README.md", "exec"))
"""


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example, tmp_path):
    (used,) = {wing for wing in HOSTS if re.search(rf"\b(from|import) {wing}\b", example)}
    absent = " ".join(HOSTS[used])
    command = [sys.executable, "-W", "error::UserWarning", "-c", ALONE, absent, example]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr


def test_both_hosts_have_an_example():
    for wing in HOSTS:
        assert any(f"from {wing} import" in example for example in EXAMPLES), wing


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)#\s]+)", TEXT)
    missing = [link for link in links if "://" not in link and not (ROOT / link).is_file()]
    assert not missing
