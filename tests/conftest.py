"""Every test imports the scripts from the project's root and draws without a display."""

import os
import signal
import sys
from pathlib import Path

os.environ['MPLBACKEND'] = 'Agg'
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # in the background a shell has Ctrl-C ignored, and so would all that the tests start
