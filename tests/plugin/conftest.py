"""These tests import SGLang itself; without a GPU that needs the stand-ins of a CPU server process from the start.

So they run in a process of their own: tests/test_plugin_in_server_process.py starts it, and here they are left out of
any other.
"""

import os

import torch

IN_SERVER_PROCESS = torch.cuda.is_available() or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
collect_ignore_glob = [] if IN_SERVER_PROCESS else ["test_*.py", "interpreted"]
