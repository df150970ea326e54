"""What plain `sglang.launch_server --device cpu` needs: `eval "$(python -m kvtuner_sglang.cpu_engine --tp 2)"`.

Prints shell lines that export the environment of a CPU server process.
"""

import argparse
import shlex
import sys

from kvtuner_sglang.cpu_engine.environment import cpu_server_arguments, cpu_server_environment


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kvtuner_sglang.cpu_engine",
        description="Print the environment that an SGLang server on a CPU needs, as lines for a shell to eval.",
    )
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks of the server (default: 1)")
    parser.add_argument("--ranks-on-host", type=int, help="all ranks on this host, of every node (default: --tp)")
    parser.add_argument("--node-rank", type=int, default=0, help="which node this is (default: 0)")
    parser.add_argument("--interface", default="lo", help="interface that reaches the other nodes (default: lo)")
    asked = parser.parse_args()
    ranks_on_host = asked.tp if asked.ranks_on_host is None else asked.ranks_on_host
    if asked.tp < 1 or ranks_on_host < 1 or asked.node_rank < 0:
        parser.error("--tp and --ranks-on-host must be at least 1, --node-rank at least 0")
    environment = cpu_server_environment(asked.tp, ranks_on_host, asked.node_rank, asked.interface)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines.append(f"# and give the server: --device cpu {' '.join(cpu_server_arguments())}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
