"""What a run leaves behind: its record, its samples, where it ran, and the mirror in W&B.

Light on purpose: nothing here imports torch or SGLang, so that a sweep whose jobs are finished ends at once.
"""
