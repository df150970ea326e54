"""The architecture diagram, drawn from the ranks that really ran."""

from collections.abc import Sequence
from itertools import zip_longest

from kvtuner_sglang.display_width import center, display_width, ljust
from kvtuner_sglang.evidence.record import NodeCommandRecord, RankRecord
from kvtuner_sglang.report.language import Text

NODES_ABREAST = 2


def diagram(commands: Sequence[NodeCommandRecord], ranks: Sequence[RankRecord], text: Text) -> str:
    """Nodes side by side, their ranks in boxes: pid, device, pipeline stage, tensor rank, layers."""
    blocks = [_node_block(command, [r for r in ranks if r.node_rank == command.node_rank], text)
              for command in commands]
    rows = [blocks[i : i + NODES_ABREAST] for i in range(0, len(blocks), NODES_ABREAST)]
    abreast = len(rows[0])
    width = max(display_width(line) for block in blocks for line in block) + 2
    inner = max(abreast * (width + 1) - 1, display_width(text["cluster"]) + 2)
    width += (inner - (abreast * (width + 1) - 1) + abreast - 1) // abreast
    inner = abreast * (width + 1) - 1
    lines = ["┌" + "─" * inner + "┐", "│" + center(text["cluster"], inner) + "│"]
    for index, row in enumerate(rows):
        cells = row + [[""]] * (abreast - len(row))
        lines.append("├" + ("┬" if index == 0 else "┼").join(["─" * width] * abreast) + "┤")
        lines += ["│" + "│".join(ljust(f" {line}", width) for line in together) + "│"
                  for together in zip_longest(*cells, fillvalue="")]
    lines.append("├" + "┴".join(["─" * width] * abreast) + "┤")
    lines.append("│" + center(_link(commands, ranks, text), inner) + "│")
    lines.append("└" + "─" * inner + "┘")
    return "\n".join(lines)


def role(node_rank: int, text: Text) -> str:
    """Node 0 is the master, which alone serves; the others are workers."""
    return text["master"] if node_rank == 0 else text["worker"]


def _node_block(command: NodeCommandRecord, ranks: Sequence[RankRecord], text: Text) -> list[str]:
    """Title, address and the boxes of a node's ranks abreast."""
    boxes = [_rank_box(rank, text) for rank in ranks]
    title = f"{text['node'].format(rank=command.node_rank)} ({role(command.node_rank, text)})"
    return [title, f"{command.host}:{command.http_port}", *("  ".join(parts) for parts in zip(*boxes, strict=True))]


def _rank_box(rank: RankRecord, text: Text) -> list[str]:
    content = [f"{text['rank']} {rank.rank}", f"pid {rank.pid}", rank.device, f"PP{rank.pp_rank} TP{rank.tp_rank}",
               text["layers_of"].format(first=rank.layers[0], last=rank.layers[1] - 1)]
    width = max(map(display_width, content))
    return ["┌" + "─" * (width + 2) + "┐", *(f"│ {ljust(line, width)} │" for line in content),
            "└" + "─" * (width + 2) + "┘"]


def _link(commands: Sequence[NodeCommandRecord], ranks: Sequence[RankRecord], text: Text) -> str:
    if len(ranks) == 1:
        return text["link_none"]
    backend = "gloo" if ranks[0].device == "cpu" else "NCCL"
    return text["link_many" if len(commands) > 1 else "link_one"].format(backend=backend)
