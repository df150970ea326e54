"""Bits per layer by search: sensitivity, pruning, clustering, NSGA-II, and a check on text the search never saw.

After KVTuner (arXiv 2502.04420); unlike it, metadata counts and the error is the logit KL of the whole model.
"""
