"""Executors and numbers of ranks against each other, side by side in one run.

    sides (what can run here) -> engines, all loaded -> rollouts, chunk by chunk in turns <-> ceilings, in the same rounds
          -> report (quantiles, ratios with intervals, checks) -> bench.json, bench.png, a table

No figure stands without its manifest, and no difference without an interval that leaves 1 out.
"""
