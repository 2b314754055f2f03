"""The mark of tests that ask the TPU compiler; in CI they are not skipped."""

import os
from importlib.util import find_spec

import pytest

needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None and not os.environ.get("CI"),
    reason="needs libtpu: montessori-jax[tpu-plan]",
)
