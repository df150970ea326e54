"""The plugin's command-line flags and the options they become.

Names are those of the earlier KVTuner adapter for SGLang.  The same names, with underscores, are keywords of
`sglang.Engine(...)`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, get_args

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.plugin.attention_choice import Attention
from kvtuner_sglang.quant import (
    KVFormat,
    LayerFormat,
    ModelIdentity,
    PlanFile,
    TensorFormat,
    kv_format,
    load_plan,
    page_tokens,
    uniform_plan,
)
from kvtuner_sglang.quant.plan_file import naming

KEYWORD_PREFIXES = ("enable_kvtuner_", "kvtuner_")
# What means something without quantization; of attention, that a sweep over formats gives it to full precision, too.
WITHOUT_QUANTIZATION = ("enable_kvtuner_quant", "kvtuner_kv_gib", "kvtuner_heartbeat_dir", "kvtuner_logits_dir",
                        "kvtuner_attention")


@dataclass(frozen=True)
class KvtunerOptions:
    """What the user asked of the plugin; the default is to leave SGLang as it is."""

    enable_kvtuner_quant: bool = False
    kvtuner_nbits_key: int = 4
    kvtuner_nbits_value: int = 4
    kvtuner_axis_key: int = 1
    kvtuner_axis_value: int = 0
    kvtuner_q_group_size: int | None = None
    kvtuner_asym: bool = True
    kvtuner_key_boost: bool | None = None
    kvtuner_layer_config_file: str | None = None
    kvtuner_residual_length: int = 0
    kvtuner_kv_gib: float | None = None
    kvtuner_attention: Attention = "auto"
    kvtuner_heartbeat_dir: str | None = None
    kvtuner_logits_dir: str | None = None
    kvtuner_kv_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.kvtuner_kv_gib is not None and not self.kvtuner_kv_gib > 0:
            raise ConfigError(f"--kvtuner-kv-gib {self.kvtuner_kv_gib} holds nothing: give GiB per rank above 0.")
        if self.kvtuner_residual_length:
            raise ConfigError(f"--kvtuner-residual-length {self.kvtuner_residual_length} cannot be kept: the prefix "
                              "cache shares pages, which have no full-precision copy, and a window does not rescue "
                              "models with outlier keys; give 0 and use --kvtuner-axis-key 1.")
        if self.kvtuner_attention not in get_args(Attention):
            raise ConfigError(f"--kvtuner-attention {self.kvtuner_attention} does not exist: choose "
                              f"{', '.join(get_args(Attention))}.")
        if not 0 <= self.kvtuner_kv_noise < 1:
            raise ConfigError(f"--kvtuner-kv-noise {self.kvtuner_kv_noise} is a relative noise: give 0 to below 1.")
        if not self.enabled:
            self._check_off()
        if self.kvtuner_layer_config_file is not None:
            self._check_beside_file()
        if self.enabled and not any(fmt.quantized for fmt in self.any_formats()):
            raise ConfigError("16-bit keys and values are not quantized: give --enable-kvtuner-quant=False instead.")

    @property
    def enabled(self) -> bool:
        return self.enable_kvtuner_quant

    def plan(self, layers: int, model: ModelIdentity | None = None) -> tuple[KVFormat, ...]:
        """The format of each of the model's layers; raises ConfigError if a per-layer file is not for `model`."""
        if not self.enabled:
            return uniform_plan(KVFormat(TensorFormat(16), TensorFormat(16)), layers)
        if self._file is None:
            return uniform_plan(self._kv_format(), layers)
        with naming(self.kvtuner_layer_config_file):
            return self._file.formats(model, layers)

    def any_formats(self) -> tuple[KVFormat, ...]:
        """The formats that layers may have, before the model is known; raises ConfigError if one does not exist."""
        return self.plan(1) if not self.enabled or self._file is None else self._file.any_formats()

    def page_tokens(self, chosen: int | None) -> int:
        """Tokens of a page of all layers: `--page-size` as chosen, the file's, or the default; raises ConfigError."""
        if not self.enabled or self._file is None:
            return page_tokens(self.any_formats(), chosen)
        with naming(self.kvtuner_layer_config_file):
            return self._file.page_tokens(chosen)

    def _kv_format(self) -> KVFormat:
        return kv_format(
            bits_key=self.kvtuner_nbits_key, bits_value=self.kvtuner_nbits_value, axis_key=self.kvtuner_axis_key,
            axis_value=self.kvtuner_axis_value, group_size=self.kvtuner_q_group_size, asym=self.kvtuner_asym,
            key_boost=self.kvtuner_key_boost,
        )

    @cached_property
    def _file(self) -> PlanFile | None:
        """Read once, in the launcher: the ranks get what it read."""
        if self.kvtuner_layer_config_file is None:
            return None
        others: dict[str, Any] = {"axis_key": self.kvtuner_axis_key, "axis_value": self.kvtuner_axis_value,
                                  "group_size": self.kvtuner_q_group_size, "asym": self.kvtuner_asym,
                                  "key_boost": self.kvtuner_key_boost}
        return load_plan(self.kvtuner_layer_config_file, LayerFormat(4, 4, **others))

    def _check_off(self) -> None:
        for f in fields(self):
            if f.name not in WITHOUT_QUANTIZATION and getattr(self, f.name) != f.default:
                raise ConfigError(f"--{f.name.replace('_', '-')} is given but quantization is off: give "
                                  "--enable-kvtuner-quant, too, or leave it out.")

    def _check_beside_file(self) -> None:
        if (self.kvtuner_nbits_key, self.kvtuner_nbits_value) != (4, 4):
            raise ConfigError("--kvtuner-layer-config-file says the bits of every layer: leave --kvtuner-nbits-key and "
                              "--kvtuner-nbits-value out.")
        self._kv_format()

    @property
    def measurement_only(self) -> dict[str, Any]:
        """Flags that change what is computed or written for a measurement; shown in /server_info."""
        return {"kv_noise": self.kvtuner_kv_noise, "logits_dir": self.kvtuner_logits_dir}


def pop_options(keywords: dict[str, Any]) -> KvtunerOptions:
    """Take the plugin's keywords out of a ServerArgs call; raises ConfigError on one that does not exist."""
    known = {f.name for f in fields(KvtunerOptions)}
    given = {name: keywords.pop(name) for name in list(keywords) if name.startswith(KEYWORD_PREFIXES)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigError(f"{unknown[0]} is not a kvtuner option: choose from {', '.join(sorted(known))}.")
    return KvtunerOptions(**given)


def keywords_of(options: KvtunerOptions, **changes: Any) -> dict[str, Any]:
    """Keywords of `sglang.Engine` that give these options with `changes`; only those that differ from the defaults."""
    default = asdict(KvtunerOptions())
    return {name: value for name, value in asdict(replace(options, **changes)).items() if value != default[name]}


def options_of(server_args: Any) -> KvtunerOptions:
    """The options a ServerArgs carries through pickling into every rank; raises ConfigError if it carries none."""
    options = getattr(server_args, "_kvtuner", None)
    if options is None:
        raise ConfigError("these server arguments never passed the kvtuner hooks: reinstall kvtuner-sglang, so that "
                          "its entry point is found before SGLang parses its arguments.")
    return options


def add_cli_flags(parser: argparse.ArgumentParser) -> None:
    """Add the plugin's flags to SGLang's own parser."""
    group = parser.add_argument_group("kvtuner", "Low-bit keys and values (plugin kvtuner-sglang).")
    group.add_argument("--enable-kvtuner-quant", type=_boolean, nargs="?", const=True, default=False,
                       metavar="True|False", help="Keep the KV cache in low bits. Default: False.")
    bits: dict[str, Any] = {"type": int, "choices": [16, 8, 4, 2], "default": 4}
    group.add_argument("--kvtuner-nbits-key", **bits, help="Bits of keys; 16 keeps the model's precision. Default: 4.")
    group.add_argument("--kvtuner-nbits-value", **bits, help="Bits of values, like keys. Default: 4.")
    group.add_argument("--kvtuner-axis-key", type=int, choices=[0, 1], default=1,
                       help="1: one scale per channel over a page of tokens; 0: one per token and group of channels, "
                            "which breaks models with outlier keys. Default: 1.")
    group.add_argument("--kvtuner-axis-value", type=int, choices=[0], default=0, help="Values: per token only.")
    group.add_argument("--kvtuner-q-group-size", type=int, default=None,
                       help="Channels that share a scale on axis 0; must divide head_dim. Default: the whole head.")
    group.add_argument("--kvtuner-asym", type=_boolean, nargs="?", const=True, default=True, metavar="True|False",
                       help="Asymmetric (scale and zero) or symmetric (scale); values beside boosted keys are "
                            "symmetric. Default: True.")
    group.add_argument("--kvtuner-key-boost", type=_boolean, nargs="?", const=True, default=None, metavar="True|False",
                       help="8 bits for the 1 in 16 channels of a page of asymmetric 4-bit keys that matter most, paid "
                            "for by symmetric values of 4 or 8 bits. Default: True for such keys on axis 1 beside "
                            "such values.")
    group.add_argument("--kvtuner-layer-config-file", default=None, metavar="FILE",
                       help="The format of every layer, instead of the flags above: a YAML plan, preset:NAME (python "
                            "-m kvtuner_sglang.quant.presets lists them), or JSON "
                            '{"layer_bits": {"0-5": 8}, "default_bits": 4}, for which flags other than bits count.')
    group.add_argument("--kvtuner-residual-length", type=int, default=0,
                       help="Recent tokens in full precision: only 0, the page in progress aside. Default: 0.")
    group.add_argument("--kvtuner-kv-gib", type=float, default=None,
                       help="Bytes for keys and values per rank in GiB, honoured for full precision too. "
                            "Default: what --mem-fraction-static gives; on CPU 1 GiB.")
    group.add_argument("--kvtuner-attention", choices=get_args(Attention), default="auto",
                       help="fused: the GPU kernels; reference: plain torch, slow, what the kernels are held to. "
                            "Default: auto, fused on a GPU and reference on a CPU.")
    group.add_argument("--kvtuner-heartbeat-dir", default=None,
                       help="Folder where every rank of this node writes a sign of life once a second.")
    group.add_argument("--kvtuner-logits-dir", default=None,
                       help="Measurement only: write whole-vocabulary logits of every forward pass here.")
    group.add_argument("--kvtuner-kv-noise", type=float, default=0.0,
                       help="Measurement only: relative noise on keys and values, to measure the noise floor.")


def options_from_namespace(args: argparse.Namespace) -> KvtunerOptions:
    return KvtunerOptions(**{f.name: getattr(args, f.name) for f in fields(KvtunerOptions) if hasattr(args, f.name)})


def flags_of(options: KvtunerOptions) -> Sequence[str]:
    """The command line that gives these options; what equals a default is left out, the switch never is."""
    flags = ["--enable-kvtuner-quant" if options.enabled else "--enable-kvtuner-quant=False"]
    for f in fields(KvtunerOptions)[1:]:
        value = getattr(options, f.name)
        shown_bits = (options.enabled and options.kvtuner_layer_config_file is None
                      and f.name in ("kvtuner_nbits_key", "kvtuner_nbits_value"))
        if value != f.default or shown_bits:
            flags += [f"--{f.name.replace('_', '-')}", str(value)]
    return flags


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
