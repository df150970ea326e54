"""What a tuned plan is compared with: uniform formats, first and last layers high, random plans, published plans."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quant import KVFormat, kv_format, uniform_plan
from kvtuner_sglang.quant.format import CHANNEL_PAGE_SIZES
from kvtuner_sglang.quant.plan_file import PRESET, ModelIdentity, load_plan, preset_names
from kvtuner_sglang.tuner.menu import Menu, Plan, effective_bits, pair_name

UNIFORM, UNIFORM_MENU, FIRST_LAST, RANDOM, PUBLISHED = "uniform", "uniform_menu", "first_last", "random", "published"
NO_PAGE = 1
DRAWS = 10_000


def _format(key: int, value: int, *, axis: int = 1, boost: bool | None = None) -> KVFormat:
    return kv_format(bits_key=key, bits_value=value, axis_key=axis, axis_value=0, group_size=None, asym=True,
                     key_boost=boost)


FORMATS = {  # every format of conf/quant
    "kv8": _format(8, 8), "kv4": _format(4, 4), "kv4_unboosted": _format(4, 4, boost=False), "kv2": _format(2, 2),
    "k8v4": _format(8, 4), "k4v2": _format(4, 2), "kv8_token": _format(8, 8, axis=0),
    "kv4_token": _format(4, 4, axis=0), "kv2_token": _format(2, 2, axis=0), "k8v4_token": _format(8, 4, axis=0),
    "k4v2_token": _format(4, 2, axis=0),
}
# First and last layers in the first of each pair, as many as the budget allows, the others in the second.
HIGH_LOW = (("K8 V8s", "K4 V2s"), ("K4b V4s", "K4 V2s"), ("K8 V8s", "K2 V2s"), ("K4b V4s", "K2 V2s"))


@dataclass(frozen=True)
class Baseline:
    """A plan and the pages it is served with; `kind` is one of the names above."""

    kind: str
    name: str
    plan: Plan
    page_size: int
    effective_bits: float


def uniform_baselines(menu: Menu, layers: int, bits: float) -> list[Baseline]:
    """conf/quant's formats with every page they can have, and of the menu's other pairs those of at most `bits`."""
    found: dict[tuple[KVFormat, int], Baseline] = {}
    for name, fmt in FORMATS.items():
        for page in CHANNEL_PAGE_SIZES if fmt.key.per_channel else (NO_PAGE,):
            label = name if page in (NO_PAGE, CHANNEL_PAGE_SIZES[0]) else f"{name} page {page}"
            found[fmt, page] = _baseline(UNIFORM, label, uniform_plan(fmt, layers), page, menu)
    for fmt in menu.pairs:
        if (fmt, menu.page_size) not in found and menu.bits([fmt]) <= bits:
            found[fmt, menu.page_size] = _baseline(UNIFORM_MENU, f"{pair_name(fmt)} page {menu.page_size}",
                                                   uniform_plan(fmt, layers), menu.page_size, menu)
    return list(found.values())


def first_last_baselines(menu: Menu, layers: int, bits: float) -> list[Baseline]:
    """The first and last layers in a better format than the rest: as many of them as `bits` allow."""
    by_name = {pair_name(fmt): fmt for fmt in menu.pairs}
    found = []
    for high, low in HIGH_LOW:
        if not {high, low} <= by_name.keys():
            continue
        plans = {n: first_last(by_name[high], by_name[low], n, layers) for n in range(1, layers + 1)}
        fitting = [n for n, plan in plans.items() if menu.bits(plan) <= bits + 1e-6]
        if fitting:
            n = max(fitting)
            found.append(_baseline(FIRST_LAST, f"{high} in {n} first and last layers, {low}", plans[n], menu.page_size,
                                   menu))
    return found


def first_last(high: KVFormat, low: KVFormat, count: int, layers: int) -> Plan:
    """`high` in `count` layers, alternately from the front and the back, `low` in the others."""
    front, back = (count + 1) // 2, count // 2
    return tuple(high if i < front or i >= layers - back else low for i in range(layers))


def random_baselines(menu: Menu, surviving: Sequence[tuple[int, ...]], bits: float, count: int,
                     seed: int) -> list[Baseline]:
    """Plans of the layers' surviving pairs at just below `bits`: drawn anew until within one step of it.

    Raises ConfigError if the pairs allow none.
    """
    rng = random.Random(f"random plans {seed}")
    return [_baseline(RANDOM, f"random {number}", _random_plan(menu, surviving, bits, rng), menu.page_size, menu)
            for number in range(count)]


def _random_plan(menu: Menu, surviving: Sequence[tuple[int, ...]], bits: float, rng: random.Random) -> Plan:
    layers = len(surviving)
    step = 0.25 / layers  # one layer's pair more or less
    plan = [menu.pairs[rng.choice(pairs)] for pairs in surviving]
    for _ in range(DRAWS):
        now = menu.bits(plan)
        if bits - step <= now <= bits + 1e-6:
            return tuple(plan)
        layer = rng.randrange(layers)
        other = menu.pairs[rng.choice(surviving[layer])]
        changed = menu.bits([*plan[:layer], other, *plan[layer + 1 :]])
        if (changed < now) == (now > bits):
            plan[layer] = other
    raise ConfigError(f"no plan of {bits:g} effective bits was drawn from the menu: offer more formats (tune.keys, "
                      "tune.values).")


def published_baselines(menu: Menu, model: ModelIdentity) -> list[Baseline]:
    """The plans that come with the package and are for a model of this shape."""
    found = []
    for name in preset_names():
        plan = load_plan(f"{PRESET}{name}")
        if plan.is_for(model):
            found.append(_baseline(PUBLISHED, name, plan.formats(model, model.layers), menu.page_size, menu))
    return found


def _baseline(kind: str, name: str, plan: Plan, page_size: int, menu: Menu) -> Baseline:
    return Baseline(kind, name, plan, page_size, effective_bits(plan, menu.head_dim, page_size))
