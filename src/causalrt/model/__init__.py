"""What is computed, in eager torch: the causal Wan transformer, its rotary tables, and its schedule."""
