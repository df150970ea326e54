"""Where the ranks run."""

from pathlib import Path
from typing import Literal

from kvtuner_sglang.config import ServerConfig
from kvtuner_sglang.errors import UserError

Device = Literal["cpu", "cuda"]


def serving_device(server: ServerConfig, dev: Path = Path("/dev")) -> Device:
    """"cpu" or "cuda"; "auto" is cuda where an NVIDIA GPU is. Raises UserError if cuda is asked for and none is.

    Device files are looked at, because importing torch to ask takes seconds.
    """
    has_gpu = any(dev.glob("nvidia[0-9]*"))
    if server.device == "auto":
        return "cuda" if has_gpu else "cpu"
    if server.device == "cuda" and not has_gpu:
        raise UserError("server.device=cuda needs an NVIDIA GPU and this machine shows none: use server.device=cpu, "
                        "for a small model.")
    return server.device
