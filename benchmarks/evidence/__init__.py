"""The paper's claims, tested on real data with seeds: a grid of runs of `train.py`, their results, a page."""
