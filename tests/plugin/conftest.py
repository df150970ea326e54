"""These tests import SGLang itself, so on a machine without a GPU this process becomes a CPU server process."""

import os
import sys

import torch

from kvtuner_sglang.cpu_engine.environment import cpu_server_environment

if not torch.cuda.is_available():
    environment = cpu_server_environment(tp_size=1, ranks_on_host=1, node_rank=0)
    sys.path[:0] = environment.pop("PYTHONPATH").split(os.pathsep)
    os.environ.update(environment)
    import sglang.srt.server_args  # noqa: F401

    # Needed while SGLang loads; left behind it makes matplotlib, in other tests, take this for a notebook.
    for name in [name for name in sys.modules if name.partition(".")[0] == "IPython"]:
        del sys.modules[name]
