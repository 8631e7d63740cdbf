"""Commands' insides: compare, demo, doctor, inspect."""
