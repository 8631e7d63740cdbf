"""The causal Wan transformer and its rotary positions."""
