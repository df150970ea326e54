"""The SGLang side: flags, sizing, pool, attention backend, start-up check.  Usable alone, without run.py."""
