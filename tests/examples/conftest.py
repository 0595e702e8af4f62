"""The examples stand beside the package, not in it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # last, so that an installed package stays the one that is tested
for needed in ("PIL", "safetensors", "matplotlib"):
    pytest.importorskip(needed)

from camvid_runs import COUNTS, SIZE, config, finish  # noqa: E402

from examples.camvid.data import DataSet, open_data  # noqa: E402
from examples.camvid.synthetic import write_synthetic  # noqa: E402


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic data set, not to be changed."""
    path = tmp_path_factory.mktemp("synthetic")
    write_synthetic(path, SIZE, COUNTS)
    return path


@pytest.fixture(scope="session")
def data(folder: Path) -> DataSet:
    return open_data(folder, SIZE)


@pytest.fixture(scope="session")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished")
    finish(folder, out, config())
    return out
