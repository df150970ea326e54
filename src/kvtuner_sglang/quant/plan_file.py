"""A per-layer plan as a file: which format each layer's keys and values are stored in, for which model, made by whom.

    model: {architecture: Qwen2ForCausalLM, layers: 28, kv_heads: 4, head_dim: 128}
    name: qwen_4bit                                          # what runs call it; without it the file's name
    page_size: 128                                           # tokens; without it the default of its formats
    default: {nbits_key: 4, nbits_value: 2, axis_key: 0}     # of layers not listed; without it every layer is listed
    layers:                                                  # numbers in the whole model, from 0
      0: {nbits_key: 8, nbits_value: 8, axis_key: 0}
      3,13-15: {nbits_key: 8, nbits_value: 2, axis_key: 0}
    provenance: {tool: ..., commit: ..., calibration: ..., date: ..., score: {kl: 0.01}}

A format's keys are those of conf/quant and of the plugin's flags, with the same defaults, and asym_value, which says of
values alone whether they have a zero.  Also read is the older JSON
form {"layer_bits": {"0-5": 8, "6-20": 4}, "default_bits": 4}, which names no model: keys and values have the same bits,
everything else is what the flags say.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quant.format import KVFormat, kv_format, page_tokens
from kvtuner_sglang.quant.layer_numbers import layer_numbers, layer_text

STRICT = ConfigDict(extra="forbid")
PRESET = "preset:"
PRESETS = Path(__file__).parent / "presets"
OLDER_FORM = ("layer_bits", "default_bits")
PositiveInt = Annotated[int, Field(gt=0)]
Text = Annotated[str, BeforeValidator(str)]  # YAML takes a date or a commit of digits for something else
Bits = Literal[16, 8, 4, 2]


@dataclass(frozen=True, config=STRICT)
class ModelIdentity:
    """The model a plan is for: its shape, and its weights if `sha256` (as in a run's record) says which."""

    architecture: str
    layers: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    name: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, config=STRICT)
class Provenance:
    """Who made a plan, with what, when, and what it scored (name of the metric, with its unit: value)."""

    tool: str
    commit: Text | None = None
    calibration: str | None = None
    date: Text | None = None
    score: dict[str, float] = field(default_factory=dict)
    source: str | None = None


@dataclass(frozen=True, config=STRICT)
class LayerFormat:
    """The format of one layer in the words of the flags: see quant.format.kv_format."""

    nbits_key: Bits
    nbits_value: Bits
    axis_key: Literal[0, 1] = 1
    axis_value: Literal[0, 1] = 0
    group_size: PositiveInt | None = None
    asym: bool = True
    key_boost: bool | None = None
    asym_value: bool | None = None

    def kv_format(self) -> KVFormat:
        """Raises ConfigError if it does not exist."""
        return kv_format(bits_key=self.nbits_key, bits_value=self.nbits_value, axis_key=self.axis_key,
                         axis_value=self.axis_value, group_size=self.group_size, asym=self.asym,
                         key_boost=self.key_boost, asym_value=self.asym_value)


def _text_keys(tree: Any) -> Any:
    return {str(key): value for key, value in tree.items()} if isinstance(tree, dict) else tree


@dataclass(frozen=True, config=STRICT)
class PlanFile:
    """`layers`: formats by layer numbers, "0", "3-5" or "0,3-5"; `default`: of all others, None if all are listed.

    `model` is None for the older JSON form alone, which fits any model that has the layers it names.  `page_size`: the
    pages in tokens that the plan was made for, and with which it is served; None leaves them to who serves it.
    """

    model: ModelIdentity | None
    layers: Annotated[dict[str, LayerFormat], BeforeValidator(_text_keys)]
    default: LayerFormat | None = None
    provenance: Provenance | None = None
    page_size: PositiveInt | None = None
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] | None = None

    def page_tokens(self, chosen: int | None) -> int:
        """Tokens of a page as served: `chosen`, the plan's own, or the default; raises ConfigError if none fits."""
        if chosen is not None and self.page_size is not None and chosen != self.page_size:
            raise ConfigError(f"the plan is for pages of {self.page_size} tokens and has other bits and errors with "
                              f"pages of {chosen}: leave --page-size (quant.page_size) out.")
        return page_tokens(self.any_formats(), chosen or self.page_size)

    def is_for(self, model: ModelIdentity) -> bool:
        """Whether the plan's own model, which it must name, is this one."""
        return self.model is not None and _difference(self.model, model) is None

    def formats(self, model: ModelIdentity | None, layers: int) -> tuple[KVFormat, ...]:
        """The format of each of a model's `layers` layers; raises ConfigError if the plan does not fit.

        model: what is served; None leaves out the comparison with the plan's own model.
        """
        if model is not None and self.model is not None:
            _require_same_model(self.model, model)
        listed = self._listed()
        unknown = sorted(number for number in listed if number >= layers)
        if unknown:
            raise ConfigError(f"the plan names layer {unknown[0]} but the model has layers 0 to {layers - 1}: take it "
                              "out, or choose the model that the plan is for.")
        missing = [number for number in range(layers) if number not in listed]
        if missing and self.default is None:
            raise ConfigError(f"the plan says nothing of layer {missing[0]}: list it, or give the plan a default.")
        return tuple(self._format(number, listed.get(number, self.default)) for number in range(layers))

    def any_formats(self) -> tuple[KVFormat, ...]:
        """The formats of all layers, or, of a plan that names no model, all formats that it may give a layer."""
        if self.model is not None:
            return self.formats(None, self.model.layers)
        given = [*self._listed().values(), self.default]
        return tuple(fmt.kv_format() for fmt in given if fmt is not None)

    def _listed(self) -> dict[int, LayerFormat]:
        listed: dict[int, LayerFormat] = {}
        for text, fmt in self.layers.items():
            for number in layer_numbers(text):
                if number in listed:
                    raise ConfigError(f"the plan gives layer {number} two formats, one under {text!r}: take one out.")
                listed[number] = fmt
        return listed

    def _format(self, number: int, fmt: LayerFormat | None) -> KVFormat:
        assert fmt is not None  # formats() has refused a missing layer
        try:
            found = fmt.kv_format()
            if self.model is not None:
                found.check(self.model.head_dim)
        except ConfigError as error:
            raise ConfigError(f"layer {number} of the plan: {error}") from error
        return found


def _require_same_model(planned: ModelIdentity, served: ModelIdentity) -> None:
    """Raise ConfigError at the first thing in which the plan's model is not the one served."""
    name = _difference(planned, served)
    if name is not None:
        raise ConfigError(f"the plan is for {planned.name or 'a model'} with {name} {getattr(planned, name)} but the "
                          f"model served has {name} {getattr(served, name)}: choose a plan made for this model.")


def _difference(planned: ModelIdentity, served: ModelIdentity) -> str | None:
    """The first thing that is known of both and not the same."""
    for name in ("architecture", "layers", "kv_heads", "head_dim", "sha256"):
        wanted, found = getattr(planned, name), getattr(served, name)
        if wanted is not None and found is not None and wanted != found:
            return name
    return None


def plan_file(choices: Sequence[LayerFormat], model: ModelIdentity, provenance: Provenance, *,
              page_size: int | None = None, name: str | None = None) -> PlanFile:
    """The plan that gives layer i of `model` choices[i]: every layer is listed, equal ones together."""
    if len(choices) != model.layers:
        raise ConfigError(f"{len(choices)} formats for the {model.layers} layers of a model: give one a layer.")
    layers = {layer_text([i for i, other in enumerate(choices) if other == fmt]): fmt for fmt in dict.fromkeys(choices)}
    return PlanFile(model=model, layers=layers, provenance=provenance, page_size=page_size, name=name)


def write_plan(path: Path | str, plan: PlanFile) -> None:
    """Write the YAML form; load_plan gives an equal plan back. Raises ConfigError if it is not whole."""
    if plan.model is None or plan.provenance is None:
        raise ConfigError("a plan without a model or a provenance cannot be written: say whom it is for and who made "
                          "it.")
    plan.page_tokens(None)
    kept = {name: {key: value for key, value in asdict(part).items() if value not in (None, {})}
            for name, part in (("model", plan.model), ("provenance", plan.provenance))}
    tree: dict[str, Any] = {"model": kept["model"]}
    tree |= {key: value for key, value in (("name", plan.name), ("page_size", plan.page_size)) if value is not None}
    if plan.default is not None:
        tree["default"] = asdict(plan.default)
    tree["layers"] = {text: asdict(fmt) for text, fmt in plan.layers.items()}
    tree["provenance"] = kept["provenance"]
    Path(path).write_text(yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=120), encoding="utf-8")


def load_plan(path: Path | str, others: LayerFormat | None = None) -> PlanFile:
    """Read and check a plan; raises ConfigError, one sentence that names the file.

    path: a file, or "preset:NAME".  others: for the older JSON form, what is not bits; None: the flags' defaults.
    """
    file = plan_path(path)
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"the plan {path} cannot be read ({reason}): give the path of a per-layer file, or "
                          f"{PRESET}NAME.") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the plan {path} is not YAML or JSON ({reason}): mend it.") from error
    with naming(path):
        plan = _parsed(tree, others)
        plan.page_tokens(None)
    return plan


@contextlib.contextmanager
def naming(path: Path | str | None) -> Iterator[None]:
    """A ConfigError about the plan at `path` begins with that."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def plan_path(path: Path | str) -> Path:
    """The file that "preset:NAME" or a path means; raises ConfigError at a preset that does not exist."""
    name = str(path).removeprefix(PRESET)
    if name == str(path):
        return Path(path).expanduser()
    names = preset_names()
    if name not in names:
        raise ConfigError(f"{path} does not exist: choose {PRESET}NAME from {', '.join(names)}.")
    return PRESETS / f"{name}.yaml"


def absolute(path: str) -> str:
    """The same plan for a process that runs elsewhere on this machine."""
    return path if path.startswith(PRESET) else str(plan_path(path).resolve())


def preset_names() -> list[str]:
    """The plans that come with the package."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def _parsed(tree: Any, others: LayerFormat | None) -> PlanFile:
    if not isinstance(tree, dict):
        raise ConfigError("a plan is a mapping with model, default, layers and provenance: write one.")
    if set(tree) & set(OLDER_FORM):
        return _older_form(tree, others or LayerFormat(4, 4))
    if others is not None and others != LayerFormat(4, 4):
        raise ConfigError("this plan says itself how layers are stored: leave --kvtuner-axis-key (quant.axis_key) and "
                          "the other flags of a format out.")
    plan = _validated(tree)
    if plan.model is None:
        raise ConfigError("the plan names no model: say for which architecture, layers, kv_heads and head_dim it is.")
    return plan


def _older_form(tree: dict[str, Any], others: LayerFormat) -> PlanFile:
    unknown = sorted(set(map(str, tree)) - set(OLDER_FORM))
    if unknown:
        raise ConfigError(f"the JSON form has layer_bits and default_bits but no {unknown[0]}: take it out.")

    def with_bits(bits: Any) -> dict[str, Any]:
        return {**asdict(others), "nbits_key": bits, "nbits_value": bits}

    bits = tree.get("layer_bits", {})
    if not isinstance(bits, dict):
        raise ConfigError('layer_bits is not a mapping: write {"0-5": 8, "6-20": 4}.')
    default = tree.get("default_bits")
    return _validated({"model": None, "layers": {layer: with_bits(b) for layer, b in bits.items()},
                       "default": None if default is None else with_bits(default)})


def _validated(tree: dict[str, Any]) -> PlanFile:
    try:
        return pydantic.TypeAdapter(PlanFile).validate_python(tree)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reasons = {"missing": "it is missing", "unexpected_keyword_argument": "no such key exists"}
        reason = reasons.get(first["type"], first["msg"][:1].lower() + first["msg"][1:])
        given = "" if first["type"] == "missing" else f"={first['input']!r}"
        raise ConfigError(f"{where}{given} cannot be used: {reason}.") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


