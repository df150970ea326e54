"""Starts, checks, watches, asks and ends real SGLang servers."""
