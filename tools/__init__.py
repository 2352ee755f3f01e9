"""Programs beside the main workflow, run as ``python -m tools.NAME``."""
