"""Fixtures shared by all tests, and what nbval must not compare."""

import pathlib

import hypothesis
import pytest

# A property holds however long an example takes: on a busy machine one of ten milliseconds may take three hundred.
hypothesis.settings.register_profile("lab", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("lab")

ROOT = pathlib.Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"


@pytest.fixture
def real_data():
    """The folder of real X-rays beside the repository; never needed by a user."""
    if not REAL.is_dir():
        pytest.skip("the real X-rays (../shared/data) are not on this machine")
    return REAL
