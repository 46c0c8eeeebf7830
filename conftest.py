"""What nbval leaves out of its comparison: progress and warnings differ from machine to machine."""


def pytest_collectstart(collector):
    """Skip stderr and figures when nbval compares a checked cell."""
    if collector.fspath and collector.fspath.ext == ".ipynb":
        collector.skip_compare += ("stderr", "image/png", "image/jpeg")
