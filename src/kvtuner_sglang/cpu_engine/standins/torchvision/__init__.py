"""Stand-in: SGLang imports it for images; its wheel's operators do not load beside a CPU build of torch."""

from kvtuner_standin import stand_in_for

__version__ = "0+standin"  # transformers compares it while it loads

stand_in_for(__name__)
