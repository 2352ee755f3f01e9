"""Every test draws without a display, can be stopped, and may ask for a folder of its own."""

import os
import signal
import sys

import pytest

os.environ['MPLBACKEND'] = 'Agg'
# In the background a shell has Ctrl-C ignored, and so would have all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
