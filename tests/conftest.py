"""Every test imports the scripts from the project's root and draws without a display."""

import os
import sys
from pathlib import Path

os.environ['MPLBACKEND'] = 'Agg'
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
