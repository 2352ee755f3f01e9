"""Every test draws without a display, can be stopped, waits for MXNet, may have its own folder."""

import os
import signal
import sys

import pytest

os.environ['MPLBACKEND'] = 'Agg'
# In the background a shell has Ctrl-C ignored, and so would have all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def wait_for_mxnet():
    """Finish what a test began: a backward beside the next test's operators may fail."""
    yield
    if 'mxnet' in sys.modules:
        sys.modules['mxnet'].nd.waitall()


@pytest.fixture
def in_own_folder(tmp_path, monkeypatch):
    """Run a test in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def restore_process(monkeypatch):
    """Put back what run_script changes for good: signal handlers, stdout and stderr."""
    before = [(kind, signal.getsignal(kind)) for kind in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(sys, 'stdout', sys.stdout)
    monkeypatch.setattr(sys, 'stderr', sys.stderr)
    yield
    for kind, handler in before:
        signal.signal(kind, handler)
