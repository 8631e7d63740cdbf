"""Executors and numbers of ranks compared with each other, side by side in one run.

    replicas (what can run here) -> engines, all loaded -> rollouts, chunk by chunk in turns <-> ceilings, in the same rounds
          -> rows of the report (quantiles, ratios with intervals, checks) -> bench.json, bench.png, a table

Every figure comes with a manifest, and a difference counts only where its interval excludes 1.
"""
