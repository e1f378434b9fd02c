"""Files that version 1 of the format has written: one of each builder, with log-densities."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

FOLDER = Path(__file__).parent.parent / "fixtures"
EXPECTED = json.loads((FOLDER / "log_prob.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_old_files_give_the_same_densities(wing, name):
    entry = EXPECTED[name]
    flow = wing.package.load(FOLDER / f"{name}.safetensors")
    assert flow.base == ("logistic" if name == "nice" else "normal")
    context = None if entry["context"] is None else np.array(entry["context"], "float32")
    density = wing.density(flow, context=context)
    found = wing.log_prob(density, np.array(entry["x"], "float32"))
    assert_allclose(found, entry["log_prob"], rtol=2e-5)
