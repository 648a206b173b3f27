"""The embedded digits are read from scikit-learn's file, without importing scikit-learn."""

import gzip
import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pgt_diag.data import sources
from pgt_diag.errors import DataError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Put an empty folder in the place of the scikit-learn that is found; return its data's."""
    spec = ModuleSpec("sklearn", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    folder = tmp_path / "datasets" / "data"
    folder.mkdir(parents=True)
    return folder


def test_every_pixel_and_label_is_that_of_load_digits():
    table = sources._read_digits_table(sources._digits_file()).numpy()
    images, target = load_digits(return_X_y=True)
    assert np.array_equal(table[:, :-1], images)
    assert np.array_equal(table[:, -1], target)
    read = sources.read_digits()
    assert read.classes == tuple(map(str, load_digits().target_names))
    both = [*read.train_images.flatten(1).tolist(), *read.test_images.flatten(1).tolist()]
    assert sorted(both) == sorted((images * 255 / 16).round().astype(int).tolist())


def test_scikit_learn_is_not_imported():
    code = (
        "import sys; from pgt_diag.data.sources import read_digits; read_digits(); "
        "assert not {'sklearn', 'scipy', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_scikit_learn_is_a_data_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="install --force-reinstall scikit-learn"):
        sources.read_digits()


def test_a_scikit_learn_without_the_file_is_a_data_error(package):
    with pytest.raises(DataError, match=r"datasets/data/digits\.csv\.gz, is not installed whole"):
        sources.read_digits()


WHOLE = gzip.compress(b"1,2\n3,4\n")


@pytest.mark.parametrize(
    "content",
    [b"", b"1,2\n", WHOLE[:-9], WHOLE[:-1] + b"\xff", WHOLE, gzip.compress(b"a,b\n"), b"\x1f\x8b"],
)
def test_a_damaged_file_is_a_data_error_that_names_it(package, content):
    file = package / "digits.csv.gz"
    file.write_bytes(content)
    with pytest.raises(DataError, match="scikit-learn's digits") as error:
        sources.read_digits()
    assert str(error.value).startswith(str(file))
