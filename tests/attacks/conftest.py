import os

if not hasattr(os, "fork"):  # on Windows
    collect_ignore_glob = ["test_*.py"]
