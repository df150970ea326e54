"""python -m kvtuner_sglang.quant.presets     lists the plans that come with the package, and what they take."""

import sys

from kvtuner_sglang.quant import KVShape, describe_plan, load_plan, mean_bits
from kvtuner_sglang.quant.plan_file import PRESET, preset_names

ITEMSIZE = 2  # of the 16 bits that a token is compared with


def lines(name: str) -> list[str]:
    """A preset: mean bits as papers count them and with metadata, bytes a token, which layers have what, its source."""
    plan = load_plan(f"{PRESET}{name}")
    assert plan.model is not None  # load_plan has refused a plan without one
    assert plan.provenance is not None
    formats = plan.any_formats()
    shape = KVShape(plan.model.kv_heads, plan.model.head_dim, ITEMSIZE, plan.page_tokens(None))
    full = plan.model.layers * 2 * shape.kv_heads * shape.head_dim * ITEMSIZE
    head = (f"{PRESET}{name}: {plan.model.name}, {mean_bits(formats):.2f} bits, "
            f"{shape.effective_bits(formats):.3f} with metadata; {shape.bytes_per_token(formats):.0f} bytes a token of "
            f"{full}; pages of {shape.page_size}")
    return [head, *(f"    {part}" for part in describe_plan(formats).split(" | ")), f"    {plan.provenance.source}"]


if __name__ == "__main__":
    for preset in preset_names():
        sys.stdout.write("\n".join(lines(preset)) + "\n")
