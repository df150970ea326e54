"""Stand-in: SGLang's compiled kernels: their wheel is CUDA only, and its CPU build needs AVX512 or AMX."""

from kvtuner_standin import stand_in_for

stand_in_for(__name__)
