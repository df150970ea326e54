"""Stand-in: SGLang imports it for notebooks."""

from kvtuner_standin import stand_in_for

stand_in_for(__name__)
