"""What the hosts of a job must have in common, and what is said of a host that has not."""

from importlib.metadata import PackageNotFoundError

import jax
import pytest

from montessori_jax import versions
from montessori_jax.versions import OWN, SHARED, difference, shared_versions

WANTED = dict.fromkeys(SHARED, "0.9")


def test_what_is_shared(monkeypatch):
    real = versions.version

    def without_libtpu(name: str) -> str:
        if name == "libtpu":
            raise PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(versions, "version", without_libtpu)
    found = shared_versions()
    assert found.keys() == {
        OWN, "jax", "jaxlib", "libtpu", "orbax-checkpoint", "transformers", "tokenizers", "numpy",
        "pyarrow",
    }  # fmt: skip
    assert (found["jax"], found["libtpu"]) == (jax.__version__, None)
    assert found["orbax-checkpoint"]
    assert difference(found, found) == ""
    assert difference(found, {"jax": found["jax"]}) == ""  # an older clone tells less


@pytest.mark.parametrize(
    ("mine", "told", "todo"),
    [
        (
            {"orbax-checkpoint": "0.1", "jax": "0.2"},
            "jax 0.2 here and 0.9 there, orbax-checkpoint 0.1 here and 0.9 there",
            "pip install 'jax==0.9' 'orbax-checkpoint==0.9'",
        ),
        (
            {OWN: "0.1", "libtpu": None},
            "montessori-jax 0.1 here and 0.9 there, libtpu missing here and 0.9 there",
            "install the clone that process 0 has (montessori-jax 0.9), then "
            "pip install 'libtpu==0.9'",
        ),
    ],
)
def test_the_line_names_what_to_do(mine, told, todo):
    said = f"({told}): install the same on every host; on this one {todo}"
    assert difference({**WANTED, **mine}, WANTED) == said


def test_what_the_leader_lacks_is_to_go():
    said = difference(WANTED, {**WANTED, "libtpu": None})
    assert said.startswith("(libtpu 0.9 here and missing there): ")
    assert said.endswith(" on this one pip uninstall libtpu")
