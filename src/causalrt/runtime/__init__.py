"""Online: ranks, collectives, KV slots, sampler, sessions. Knows bundles and executors, not how they are built."""
