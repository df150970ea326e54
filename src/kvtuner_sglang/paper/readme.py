"""The results in README.md, between two marks: made from the published table and the claims marked as headlines."""

import csv
from collections.abc import Iterable
from pathlib import Path

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import write_atomically
from kvtuner_sglang.evidence.sweep import markdown_table
from kvtuner_sglang.paper.claims import Claims, written
from kvtuner_sglang.paper.published_folders import PUBLISHED
from kvtuner_sglang.quality.summary import CSV_FILE

README_FILE = Path("README.md")  # under the project's root
START, END = "<!-- results: made by python run.py task=paper -->", "<!-- end of results -->"
LOSES = "**Where it loses**"
FORMATS = ("kv8", "k8v4", "kv4", "kv4_token", "k4v2", "kv2")
MODELS = {"smollm2_135m": "SmolLM2-135M", "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B"}
SMALL_KL = 0.001
ENGINES = ("sglang", "transformers")  # the served one where there is one
FAKE = " †"
BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
Table = dict[tuple[str, str, str], dict[str, str]]  # by model, format and engine


def results_text(claims: Claims, root: Path) -> str:
    """The table of quality, then a line for every headline claim, then one for everything that loses."""
    good = [f"- {claim.said(claim.values(root))}" for claim in claims.claims if claim.headline]
    bad = [f"- {claim.said(claim.values(root))}" for claim in claims.claims if claim.loses]
    return "\n\n".join([quality_table(root), "\n".join(good), LOSES, "\n".join(bad)])


def write_results(claims: Claims, root: Path) -> Path:
    """Put the results between the marks of root/README.md; raises UserError if it has none."""
    path = root / README_FILE
    text = path.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise UserError(f"{path} has no place for the results: put back the lines {START} and {END}.")
    write_atomically(path, f"{before}{START}\n{results_text(claims, root)}\n{END}{after}")
    return path


def quality_table(root: Path) -> str:
    """Raises UserError, one sentence, if the published table lacks a row, a column or a number."""
    path = root / PUBLISHED / "quality" / CSV_FILE
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = {(row["model"], row["quant"], row["engine"]): row for row in csv.DictReader(file)}
        return _table_of(table)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be put into {README_FILE} ({type(error).__name__}: {error}): it needs a row of "
                        f"{', '.join(FORMATS)} for {' and '.join(MODELS)}: publish them.") from error


def _measured(table: Table, model: str, quant: str) -> dict[str, str]:
    """Through the engine, where it was, else by fake quantization; raises KeyError if neither was."""
    return table.get((model, quant, ENGINES[0])) or table[model, quant, ENGINES[1]]


def full_precision_bits(dtypes: Iterable[str]) -> int:
    """Bits of an element of the cache that formats are compared with; raises ValueError for unlike or unknown ones."""
    found = set(dtypes)
    if len(found) != 1 or not found <= BITS.keys():
        raise ValueError(f"full precision is {', '.join(sorted(found))}, not one of {', '.join(BITS)}")
    return BITS[found.pop()]


def _table_of(table: Table) -> str:
    header = ["format", "bits an element"]
    header += [f"{name}: {what}" for name in MODELS.values() for what in ("KL, nats", "same first choice", "recall")]
    rows = []
    for quant in FORMATS:
        found = [_measured(table, model, quant) for model in MODELS]
        cells = [f"{quant}{FAKE if any(row['engine'] != ENGINES[0] for row in found) else ''}",
                 f"{float(found[0]['effective_bits']):g}"]
        for row in found:
            kl = float(row["kl"])
            cells += [written(kl, ".4f" if kl > SMALL_KL else ".6f"), written(float(row["top1_agreement"]), ".2%"),
                      written(float(row["recall"]), ".1%")]
        rows.append(cells)
    dtypes = (row["dtype"] for row in table.values() if row["model"] in MODELS)
    full = ["full precision", str(full_precision_bits(dtypes))]
    for model in MODELS:
        full += ["0", "", written(float(table[model, "kv8", ENGINES[0]]["recall_full"]), ".1%")]
    return markdown_table(header, [full, *rows]) + (
        f"\n\n{FAKE.strip()} fake quantization in transformers; the others through the SGLang engine. Metadata counts.")
